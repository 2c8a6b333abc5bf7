"""Patterns of modules in adapter_config.json: other ranks and alphas for some of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mcorefs.adapters import Problems
from mcorefs.trainers.base import number

_LITERAL = re.compile(r"[\w.-]+")
_MOST_PATTERNS = 64
"""Patterns of modules that are no names: each is tried on each module."""


@dataclass(frozen=True)
class Patterns:
    """Values for the modules whose names, or the ends of whose names, a pattern matches: the first
    one that does (peft:src/peft/utils/other.py get_pattern_key)."""

    names: Mapping[str, tuple[int, float]]
    """Of patterns that are names: (position, value)."""
    others: tuple[tuple[int, re.Pattern[str], float], ...]

    @staticmethod
    def of(config: Mapping[str, object], setting: str, problems: Problems, source: str) -> Patterns:
        stated = config.get(setting) or {}
        names: dict[str, tuple[int, float]] = {}
        others: list[tuple[int, re.Pattern[str], float]] = []
        if not isinstance(stated, dict):
            problems.add(f"{source} says {setting}={stated!r:.80}: no patterns")
            stated = {}
        for position, (pattern, value) in enumerate(stated.items()):
            size = number(value)
            plain = pattern.replace("\\.", ".")
            if size is None:
                problems.add(f"{source} says {setting}: {pattern:.200}: {value!r:.80}, no number")
            elif _LITERAL.fullmatch(plain):
                names.setdefault(plain, (position, size))
            elif (compiled := _compiled(pattern)) is None or len(others) == _MOST_PATTERNS:
                problems.add(f"{source} says {setting}: {pattern:.200}: not simple enough")
            else:
                others.append((position, compiled, size))
        return Patterns(names, tuple(others))

    def value(self, module: str) -> float | None:
        """That of `module`; None where no pattern matches."""
        parts = module.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        found = [self.names[end] for end in ends if end in self.names]
        found += [
            (position, value) for position, regex, value in self.others if regex.match(module)
        ]
        return min(found)[1] if found else None


def _compiled(pattern: str) -> re.Pattern[str] | None:
    """None where matching it could take for ever: anyone may have made the file it is from."""
    if "(" in pattern or sum(map(pattern.count, "*+?{")) > 1 or len(pattern) > 1000:
        return None
    try:
        return re.compile(rf"(?:.*\.)?(?:{pattern})$")
    except (re.error, RecursionError, OverflowError):
        return None
