"""The on-disk formats: one file each, one line each below."""

from __future__ import annotations

from pathlib import Path

from mcorefs.formats.base import Checkpoint, Format, WeightsFrom
from mcorefs.formats.fsdp_dtensor import FsdpDtensor
from mcorefs.formats.huggingface import HuggingFace
from mcorefs.formats.torch_dist import TorchDist
from mcorefs.formats.torch_legacy import TorchLegacy
from mcorefs.formats.zarr import Zarr

FORMATS: tuple[Format, ...] = (TorchDist(), TorchLegacy(), FsdpDtensor(), Zarr())
"""What training writes, in the order in which Megatron-LM looks for it."""
HUGGINGFACE = HuggingFace()
"""What needs no conversion: read where it is asked for, or where nothing else is."""
NAMES = tuple(format_.name for format_ in (*FORMATS, HUGGINGFACE))

__all__ = [
    "FORMATS",
    "HUGGINGFACE",
    "NAMES",
    "Checkpoint",
    "Format",
    "WeightsFrom",
    "detect",
    "matching",
]


def detect(path: Path, name: str | None = None) -> Format | None:
    """The format of the iteration directory `path`, None if it is none of ours.

    With `name`, only that format is looked for; "huggingface" is looked for by name only.
    """
    if name is None:
        return next(iter(matching(path)), None)
    return next((f for f in (*FORMATS, HUGGINGFACE) if f.name == name and f.detect(path)), None)


def matching(path: Path) -> list[Format]:
    """All formats that training writes in which `path` could be read; usually one."""
    return [format_ for format_ in FORMATS if format_.detect(path)]
