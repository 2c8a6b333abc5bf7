"""Megatron-LM, and whoever saves its arguments as it does (ms-swift, slime)."""

from __future__ import annotations

from mcorefs.formats import Checkpoint
from mcorefs.locate import Location
from mcorefs.trainers.base import Companions


class MegatronLM:
    """All it leaves is in the checkpoint itself: the training arguments."""

    name = "Megatron-LM"

    def read(self, location: Location, checkpoint: Checkpoint) -> Companions:
        """Always answers: it is asked last."""
        return Companions(self.name, checkpoint.args, checkpoint.args_source)
