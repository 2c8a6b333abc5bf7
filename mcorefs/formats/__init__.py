"""The on-disk formats: one file each, one line each below."""

from __future__ import annotations

from pathlib import Path

from mcorefs.formats.base import Checkpoint, Format
from mcorefs.formats.fsdp_dtensor import FsdpDtensor
from mcorefs.formats.torch_dist import TorchDist
from mcorefs.formats.torch_legacy import TorchLegacy

FORMATS: tuple[Format, ...] = (TorchDist(), TorchLegacy(), FsdpDtensor())

__all__ = ["FORMATS", "Checkpoint", "Format", "detect"]


def detect(path: Path) -> Format | None:
    """The format of the iteration directory `path`, None if it is none of ours."""
    return next((format_ for format_ in FORMATS if format_.detect(path)), None)
