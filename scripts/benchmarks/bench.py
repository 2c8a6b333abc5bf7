"""What every section gets: the checkpoints and the report."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from scripts.benchmarks.places import Place, place
from scripts.benchmarks.report import Report, Row


@dataclass
class Bench:
    directory: Path
    rounds: int
    suffix: str
    """Of the names in places.SPECS."""
    report: Report
    section: str = ""

    @cached_property
    def moe(self) -> Place:
        return place(self.directory, "moe" + self.suffix)

    @cached_property
    def transposed(self) -> Place:
        return place(self.directory, "transposed" + self.suffix)

    def row(
        self,
        path: str,
        ours: float,
        unit: str,
        reference: str = "",
        theirs: float | None = None,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        row = Row(self.section, path, ours, unit, reference, theirs, at_most, at_least)
        self.report.add(row)

    def time(
        self, path: str, ours: float, reference: str, theirs: float, at_most: float | None
    ) -> None:
        self.row(path, ours, "s", reference, theirs, at_most=at_most)
