"""Writing the tree as real files: in parallel, resumable, by one process or many, and never looking
complete before it is (`output`)."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mcorefs.errors import OutputError
from mcorefs.materialize.output import PARTIAL, PLAN, check_space, claimed, finish, large, locked
from mcorefs.materialize.writing import OnProgress, Part, write_parts
from mcorefs.shares import Share
from mcorefs.tree import VirtualTree

__all__ = ["PARTIAL", "Share", "Written", "finish_parts", "materialize", "write_files"]


@dataclass(frozen=True)
class Written:
    """What `materialize` did."""

    files: int
    total_bytes: int
    resumed_bytes: int
    """Bytes that an earlier, interrupted run had written."""
    missing: tuple[str, ...] = ()
    """Files of weights that others have still to write; without any, OUT is complete."""


def materialize(
    tree: VirtualTree,
    out: Path,
    threads: int | None = None,
    on_progress: OnProgress = lambda count: None,
    share: Share | None = None,
) -> Written:
    """Write every file of `tree` below `out`, or go on with what an interrupted run left there.

    Of a `share`, only its files of weights; whoever is the last completes `out`.
    Raises OutputError if `out` holds anything else, if the disk is too small or if writing fails,
    and ReadFault if a shard cannot be read; the same call then goes on later.
    """
    weights = large(tree)
    names = list(weights) if share is None else share.names(weights)
    small = tree.total_bytes - sum(file.size for file in weights.values())
    total = sum(weights[name].size for name in names)
    if share is not None and not names:
        return Written(0, 0, 0)
    with claimed(tree, out) as partial:
        resumed = _write(tree, out, partial, names, threads, on_progress, small)
        missing = finish(tree, out)
    if missing:
        return Written(len(names), total, resumed, missing)
    on_progress(small)
    return Written(len(names) + len(tree.files) - len(weights), total + small, resumed)


def write_files(tree: VirtualTree, out: Path, names: Collection[str]) -> None:
    """Write these files of weights, and nothing else. Raises as `materialize` does."""
    with claimed(tree, out) as partial:
        _write(tree, out, partial, names, None, lambda count: None, 0)


def _write(
    tree: VirtualTree,
    out: Path,
    partial: Path,
    names: Collection[str],
    threads: int | None,
    on_progress: OnProgress,
    spare: int,
) -> int:
    """Write these files of weights, beside which `spare` bytes must be free; how many bytes of
    them were there already."""
    with ExitStack() as locks:
        for name in names:
            locks.enter_context(locked(partial / f"{name}.lock"))
        parts = [Part(name, tree.files[name], out, partial) for name in names]
        resumed = sum(part.done for part in parts)
        on_progress(resumed)
        check_space(out, sum(part.file.size for part in parts) - resumed + spare)
        write_parts(parts, threads or _threads(), on_progress)
    return resumed


def finish_parts(tree: VirtualTree, out: Path) -> None:
    """Complete what the parts of a materialization wrote. Raises OutputError where one is wanting,
    or nothing was begun."""
    if not (out / PARTIAL / PLAN).exists():
        raise OutputError(f"{out} holds nothing to finish: no part was begun there, or it is done")
    with claimed(tree, out):
        missing = finish(tree, out)
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise OutputError(f"{out} is not complete: {missing[0]}{more} still to be written")


def _threads() -> int:
    return max(2, min(8, len(os.sched_getaffinity(0))))
