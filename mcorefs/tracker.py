"""Which iteration a run last published: the files at its root that say so.

    latest_checkpointed_iteration.txt   Megatron-LM and all who follow it: a number, or `release`
    latest_train_state.pt               Megatron-Bridge, which up to 0.1 wrote no other

Layout facts: Megatron-LM:megatron/training/checkpointing.py read_metadata;
Megatron-Bridge:src/megatron/bridge/training/state.py TrainState.state_dict (0-d tensors) and
training/checkpointing.py save_checkpoint.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from mcorefs.errors import CheckpointError
from mcorefs.formats.base import reading
from mcorefs.storage import is_file, read_start, regular_file
from mcorefs.torchzip import data_start, load, record_of
from mcorefs.unpickle import StoredView

TRACKER = "latest_checkpointed_iteration.txt"
TRAIN_STATE = "latest_train_state.pt"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Latest:
    """What was published last."""

    iteration: int | None
    """None for `release`."""
    file: str
    """Name of the file that says so."""
    remark: str = ""


def is_tracked(root: Path) -> bool:
    """Whether a file in `root` says which iteration is the latest."""
    return any(is_file(root / name) for name in (TRACKER, TRAIN_STATE))


def latest(root: Path) -> Latest | None:
    """What was last published in `root`; None where no file says.

    Whoever goes on with a run updates what it knows of, so the later of two files is right; one
    that cannot be read was being written. Raises CheckpointError where that leaves none.
    """
    found: list[Latest] = []
    unread: list[CheckpointError] = []
    for name, read in ((TRACKER, _number), (TRAIN_STATE, _step)):
        if is_file(root / name):
            try:
                found.append(Latest(read(root / name), name))
            except CheckpointError as problem:
                unread.append(problem)
    if not found:
        if unread:
            raise CheckpointError(f"{unread[0]}; pass --iteration N")
        return None
    right = max(found, key=lambda each: each.iteration or 0)
    remarks = [f"{problem}; {right.file} is believed" for problem in unread]
    for other in found:
        if (other.iteration or 0) != (right.iteration or 0):
            stale = "release" if other.iteration is None else f"iteration {other.iteration}"
            remarks.append(f"{other.file} names {stale}, {right.file} the later {right.iteration}")
    return Latest(right.iteration, right.file, "; ".join(remarks))


def _number(path: Path) -> int | None:
    """The iteration that the text file at `path` names; None for `release`."""
    try:
        said = read_start(path, 100).decode(errors="replace").strip()
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}") from None
    if said == "release":
        return None
    if not (said.isascii() and said.isdecimal()):
        raise CheckpointError(
            f"{path} says {said[:40]!r}, expected an iteration number or 'release'"
        )
    return int(said)


def _step(path: Path) -> int:
    """The step in the TrainState at `path`."""
    what = str(path)
    identity, why = regular_file(what)
    if identity is None or identity.size > _MAX_BYTES:
        raise CheckpointError(f"{path} {why or 'is too large'}")
    with reading(what) as pread:
        state, records = load(pread, identity.size, what)
        step = state.get("step") if isinstance(state, dict) else None
        if not (isinstance(step, StoredView) and step.dtype.torch == "int64" and step.size == ()):
            raise CheckpointError(f"{path} holds no step")
        start = data_start(pread, record_of(step, records, what), identity.size, what)
        (value,) = struct.unpack("<q", pread(start + 8 * step.offset, 8))
    if value < 0:
        raise CheckpointError(f"{path} says that the step is {value}")
    return int(value)
