"""`mcorefs status`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mcorefs import wording
from mcorefs.arguments import MNT, Command
from mcorefs.console import say

if TYPE_CHECKING:
    from mcorefs.mount.status import Value


@click.command(cls=Command)
@MNT
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(mnt: Path, as_json: bool) -> None:
    """Say what a mount shows and what it has done: bytes served and read, errors, memory.

    The same is in `MNT/.mcorefs/status.json`, which no listing of MNT shows.
    """
    from mcorefs.mount import ask

    found = ask(mnt)
    if as_json:
        say(json.dumps(found, indent=2))
        return
    for label, text in _lines(found):
        say(f"{label:>13}  {text}")


def _lines(found: Mapping[str, Value]) -> Iterator[tuple[str, str]]:
    """(label, text) for each thing that is known."""
    for key, label in (
        ("checkpoint", "checkpoint"),
        ("iteration", "iteration"),
        ("architecture", "model"),
        ("format", "format"),
        ("run", "run"),
    ):
        if found.get(key) is not None:
            yield label, str(found[key])
    iterations, opened = found.get("iterations"), found.get("opened")
    if isinstance(iterations, list):
        yield "iterations", ", ".join(map(str, iterations)) or "none yet"
    if isinstance(opened, list):
        numbers = [str(about.get("iteration")) for about in opened if isinstance(about, dict)]
        yield "opened", ", ".join(numbers) or "none"
    yield "served", wording.size(_number(found, "served_bytes"))
    yield "of shards", f"{wording.size(_number(found, 'shard_bytes'))} read"
    hits, misses = _number(found, "tile_hits"), _number(found, "tile_misses")
    if hits + misses:
        yield "tile cache", f"{hits:,} hits, {misses:,} misses ({hits / (hits + misses):.0%})"
    yield "errors", f"{_number(found, 'read_errors'):,}"
    if found.get("last_error"):
        yield "last error", str(found["last_error"])
    yield "memory", wording.size(_number(found, "resident_bytes"))
    yield "up", f"{_number(found, 'uptime_s'):,} s, as process {found.get('pid')}"


def _number(found: Mapping[str, Value], key: str) -> int:
    value = found.get(key)
    return int(value) if isinstance(value, int | float) else 0
