"""Which files of weights are whose, where several processes write one OUT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mcorefs.files import VirtualFile


@dataclass(frozen=True)
class Share:
    """Part `number` (from 1) of `count`."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ValueError(f"there is no part {self.number} of {self.count}")

    @classmethod
    def parse(cls, text: str) -> Share:
        """From "I/N". Raises ValueError."""
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal()):
            raise ValueError(f"{text!r} is not a part such as 3/16")
        return cls(int(number), int(count))

    def names(self, files: Mapping[str, VirtualFile]) -> list[str]:
        """Those of `files` that are this part's: every process comes to the same, and the parts are
        as equal in bytes as the largest first, each to the part that has least, makes them."""
        loads = [0] * self.count
        mine: list[str] = []
        for name, file in sorted(files.items(), key=lambda item: (-item[1].size, item[0])):
            least = loads.index(min(loads))
            loads[least] += file.size
            if least == self.number - 1:
                mine.append(name)
        return sorted(mine)
