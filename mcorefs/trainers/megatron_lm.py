"""Megatron-LM, and whoever saves its arguments as it does (Pai-Megatron-Patch)."""

from __future__ import annotations

from mcorefs.formats import Checkpoint
from mcorefs.locate import Location
from mcorefs.trainers.base import Companions, is_model_directory


class MegatronLM:
    """All it leaves is in the checkpoint itself: the training arguments.

    Pai-Megatron-Patch (and many users) copy the Hugging Face files of the model that was trained
    beside the iterations: tools of both kinds then find them.
    """

    name = "Megatron-LM"

    def read(self, location: Location, checkpoint: Checkpoint) -> Companions:
        """Always answers: it is asked last."""
        beside = tuple(
            place for place in (location.path, location.root) if is_model_directory(place)
        )
        return Companions(self.name, checkpoint.args, checkpoint.args_source, hf_directories=beside)
