"""The training frameworks: one file each, one line each below; the first to answer is believed."""

from __future__ import annotations

from mcorefs.formats import Checkpoint
from mcorefs.locate import Location
from mcorefs.trainers.base import Companions, LoraTraining, Trainer
from mcorefs.trainers.megatron_bridge import MegatronBridge
from mcorefs.trainers.megatron_lm import MegatronLM
from mcorefs.trainers.ms_swift import MsSwift
from mcorefs.trainers.nemo import NeMo
from mcorefs.trainers.nemo1 import NeMo1
from mcorefs.trainers.slime import Slime
from mcorefs.trainers.verl import Verl

TRAINERS: tuple[Trainer, ...] = (
    Verl(),
    MegatronBridge(),
    MsSwift(),
    NeMo(),
    NeMo1(),
    Slime(),
    MegatronLM(),
)

__all__ = ["TRAINERS", "Companions", "LoraTraining", "Trainer", "companions"]


def companions(location: Location, checkpoint: Checkpoint) -> Companions:
    """What the framework that wrote `checkpoint` left beside it."""
    for trainer in TRAINERS:
        if (found := trainer.read(location, checkpoint)) is not None:
            return found
    raise AssertionError("the last trainer always answers")
