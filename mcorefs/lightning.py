"""NeMo 2's checkpoints, which bear Lightning's names: no tracker says which is the latest.

    DIRECTORY/qwen3--val_loss=1.23-step=99-consumed_samples=3200.0/{weights,context}/
    DIRECTORY/qwen3--val_loss=1.23-step=99-consumed_samples=3200.0-last/
                                        the newest; may be a link to the one above
    DIRECTORY/qwen3--...-unfinished     a file: that one is being written, or being deleted

Layout facts: NeMo:nemo/lightning/pytorch/callbacks/model_checkpoint.py, nemo/lightning/resume.py
AutoResume, nemo/lightning/ckpt_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

WEIGHTS, CONTEXT = "weights", "context"
_STEP = re.compile(r"(?:^|[-_])step=(\d{1,18})(?![.\d])")
_UNFINISHED, _AVERAGED = "-unfinished", "-EMA"


def top(path: Path) -> Path:
    """The checkpoint whose weights are in `path`; without a directory for them, `path` itself."""
    return path.parent if path.name == WEIGHTS else path


def step(path: Path) -> int | None:
    """The step in the name of the checkpoint whose weights are in `path`."""
    match = _STEP.search(top(path).name)
    return int(match[1]) if match else None


def marker(path: Path) -> Path | None:
    """The file that says that the checkpoint with its weights in `path` is not finished."""
    try:
        for place in dict.fromkeys((top(path), top(path).resolve())):
            file = place.with_name(place.name.removesuffix(_AVERAGED) + _UNFINISHED)
            if place.name and file.exists():
                return file
    except (OSError, ValueError):
        return None
    return None


def is_finished(path: Path) -> bool:
    """Whether nothing says that the checkpoint with its weights in `path` is not."""
    return marker(path) is None


def choose(places: Sequence[Path], iteration: int | None) -> Path | None:
    """Which of the weights at `places` to open: those of the step `iteration`, else what NeMo
    itself would resume from. None if that cannot be told, or if others are among them."""
    if not places or any(place.name != WEIGHTS for place in places):
        return None
    finished = [place for place in places if is_finished(place)]
    different = list({place.resolve(): place for place in finished}.values())
    if iteration is not None:
        # Of one step there may be two, the second called `-last`: they hold the same.
        of_step = [place for place in different if step(place) == iteration]
        return of_step[0] if of_step else None
    if len(different) <= 1:
        return different[0] if different else places[-1]
    last = [place for place in finished if top(place).name.endswith("-last")]
    steps = [step(place) for place in last]
    if len(last) > 1 and (None in steps or len(set(steps)) < len(steps)):
        return None
    return max(last, key=lambda place: step(place) or 0, default=None)
