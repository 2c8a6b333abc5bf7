"""What commands say to the terminal, in one way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from mcorefs import wording

if TYPE_CHECKING:
    from mcorefs.tree import Source

out = Console(highlight=False, soft_wrap=True, markup=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def say(text: str) -> None:
    out.print(wording.printable(text))


def remarks(source: Source) -> None:
    for remark in source.remarks:
        say(f"  note: {remark}")
    if not source.tokenizer.found:
        err.print(wording.printable(wording.no_tokenizer(source)), style="bold yellow")


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal; yields how to advance it by bytes."""
    if not err.is_terminal:
        yield lambda count: None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=total or None)
        yield lambda count: bar.advance(task, count)
