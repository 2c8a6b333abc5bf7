"""What commands say to the terminal, in one way."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from mcorefs import wording

if TYPE_CHECKING:
    from mcorefs.tree import Source


def say(text: str) -> None:
    click.echo(wording.printable(text))


def complain(text: str) -> None:
    """Say it on stderr."""
    click.echo(wording.printable(text), err=True)


def remarks(source: Source) -> None:
    for remark in source.remarks:
        say(f"  note: {remark}")
    if not source.tokenizer.found:
        colour = None if os.environ.get("NO_COLOR") else "yellow"
        missing = wording.printable(wording.no_tokenizer(source))
        click.secho(missing, err=True, bold=True, fg=colour)


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal; yields how to advance it by bytes."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console  # it costs as much to import as all else that is said
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(
        "{task.description}", *columns, console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(what, total=total or None)
        yield lambda count: bar.advance(task, count)
