"""The figures: a Markdown table, JSON, a plot."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One comparison. `ratio` is ours over the reference's, in `unit`."""

    section: str
    path: str
    ours: float
    unit: str
    reference: str
    theirs: float | None
    at_most: float | None = None
    at_least: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.ours / self.theirs if self.theirs else None

    @property
    def verdict(self) -> str:
        found = self.ours if self.theirs is None else self.ratio
        if found is None or (self.at_most is None and self.at_least is None):
            return ""
        low = self.at_least is None or found >= self.at_least
        high = self.at_most is None or found <= self.at_most
        return "ok" if low and high else "MISSED"

    @property
    def cells(self) -> tuple[str, ...]:
        bars = [(">=", self.at_least), ("<=", self.at_most)]
        return (
            self.path,
            f"{self.ours:.3g} {self.unit}",
            self.reference,
            "" if self.theirs is None else f"{self.theirs:.3g} {self.unit}",
            "" if self.ratio is None else f"x {self.ratio:.2f}",
            " ".join(f"{sign} {bar:g}" for sign, bar in bars if bar is not None),
            self.verdict,
        )


@dataclass
class Report:
    machine: str
    data: str
    rounds: int
    rows: list[Row] = field(default_factory=list)
    floors: dict[str, float] = field(default_factory=dict)
    """GB/s that nothing can be faster than, by what it is."""

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print("  ".join(cell for cell in row.cells if cell), flush=True)

    def markdown(self) -> str:
        head = ("path", "mcorefs", "reference", "", "ratio", "bar", "")
        lines = [head, ("---",) * len(head), *(row.cells for row in self.rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        floors = ", ".join(f"{name} {speed:.2f} GB/s" for name, speed in self.floors.items())
        about = f"{self.machine}\n\n{self.data}; medians of {self.rounds} rounds; {floors}"
        return f"{about}\n\n{table}\n"

    def to_json(self) -> str:
        rows = [asdict(row) | {"ratio": row.ratio, "verdict": row.verdict} for row in self.rows]
        about = {"machine": self.machine, "data": self.data, "rounds": self.rounds}
        return json.dumps(about | {"floors": self.floors, "rows": rows}, indent=2) + "\n"

    def plot(self, file: Path) -> None:
        """Read speed by path, and the floors. matplotlib is needed for this alone."""
        from matplotlib.figure import Figure

        rows = [row for row in self.rows if row.unit == "GB/s"]
        figure = Figure(figsize=(9, 1.5 + 0.5 * len(rows)), layout="constrained")
        axes = figure.subplots()
        places = range(len(rows))
        axes.barh([at + 0.2 for at in places], [row.ours for row in rows], 0.4, label="mcorefs")
        axes.barh(
            [at - 0.2 for at in places], [row.theirs or 0 for row in rows], 0.4, label="reference"
        )
        for at, row in enumerate(rows):
            axes.text(row.theirs or 0, at - 0.2, f" {row.reference}", va="center", fontsize=7)
        for (name, speed), style in zip(self.floors.items(), ("--", ":", "-."), strict=False):
            axes.axvline(speed, linestyle=style, color="black", label=name)
        axes.set_yticks(list(places), [row.path for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("GB/s")
        axes.set_title(f"{self.machine}\n{self.data}", fontsize=8)
        axes.legend(loc="lower right", fontsize=8)
        figure.savefig(file, dpi=120)
