"""What every way of checking answers, and what they share."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

PIECE = 4 << 20
"""Bytes that a thread holds of what it checks."""

OnProgress = Callable[[int], None]
"""Called from any thread with a number of bytes that were checked."""


@dataclass(frozen=True)
class Difference:
    """What is wrong with one tensor or file, in words."""

    name: str
    problem: str


@dataclass(frozen=True)
class Findings:
    """What was checked, and what is wrong. Sound: no differences."""

    sound: int
    """Files or tensors that are as they should be."""
    total_bytes: int
    """Bytes that were read."""
    differences: tuple[Difference, ...]
    remarks: tuple[str, ...] = ()
    """What is not wrong, but was not checked either."""


def threads() -> int:
    """How many files to read at once: checksums leave the interpreter to other threads."""
    return max(2, min(8, len(os.sched_getaffinity(0))))
