"""Which iterations of a run can be opened now, asked again and again while it trains.

    RUN/iter_0000100/  RUN/release/                Megatron-LM and most others
    RUN/global_step_100/                           verl
    RUN/checkpoint-100/{iter_0000100,latest_...}   ms-swift: each with a tracker file of its own
    RUN/NAME--step=100.../weights/                 NeMo 2: an `-unfinished` file while it is written

One is shown when nothing of it is still to come. Where a tracker file is kept beside the iterations
it decides, being written last; where there is none (verl's asynchronous saves, copies) the save's
own last file does. What cannot tell (`mp_rank_*` directories without a tracker) is not shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mcorefs import lightning, steps
from mcorefs.deadline import Deadline, LateError
from mcorefs.errors import CheckpointError
from mcorefs.explain import children, explain, readable_children
from mcorefs.files import FileIdentity
from mcorefs.locate import locate
from mcorefs.patience import READ_TIMEOUT, again
from mcorefs.remote import is_url
from mcorefs.tracker import is_tracked, latest

_NAMES = re.compile(r"iter_([0-9]{7,})|global_step_([0-9]+)|checkpoint-([0-9]+)")
_OWN_TRACKER = "checkpoint-"
_WRITTEN_LAST = "metadata.json"
"""By megatron-core, when all ranks have saved (core/dist_checkpointing/serialization.py save)."""
_WITNESSES = (".metadata", _WRITTEN_LAST, "config.json", "model.safetensors.index.json")

Mark = tuple[tuple[str, FileIdentity], ...]


@dataclass(frozen=True)
class Published:
    """An iteration that can be opened."""

    name: str
    path: Path
    number: int
    """-1 of `release`."""
    mark: Mark
    """Files that every save writes, as they are: it differs between two saves of one name."""


class Run:
    """The directory that holds the iterations. Not thread-safe."""

    def __init__(
        self,
        root: Path,
        format_name: str | None = None,
        read_timeout: float | None = READ_TIMEOUT,
    ) -> None:
        self.root = root
        self.late: dict[str, int] = {}
        """Iterations by name that the last scan could not look at, for their storage does not
        answer."""
        self._format = format_name
        self._known: dict[str, Published] = {}
        self._looks = Deadline.of(read_timeout)

    def scan(self) -> dict[str, Published]:
        """What can be opened, in order; costs little where nothing has changed. What does not
        answer is what it was, and is waited for once.

        Raises CheckpointError where that cannot be told now: a tracker file that is being written.
        """
        said = latest(self.root)
        found: list[Published] = []
        late: dict[str, int] = {}
        is_waiting = True
        for number, child in reversed(_numbered(self.root)):
            if said is not None and said.iteration is not None and number > said.iteration:
                continue
            known = self._known.get(child.name)
            try:
                if is_waiting or child.name in self.late:
                    known = self._in_time(child, number, said is not None, known)
            except LateError:
                late[child.name] = number
                is_waiting = child.name in self.late  # another new one would take as long again
            if known is not None:
                found.append(known)
        found.sort(key=lambda each: (each.number, each.name))
        self.late = late
        self._known = {each.name: each for each in found}
        return dict(self._known)

    def _in_time(
        self, child: Path, number: int, is_published: bool, known: Published | None
    ) -> Published | None:
        """What `child` is by now. Raises LateError."""

        def look() -> Published | None:
            if known is not None and _mark(_paths(known.mark)) == known.mark:
                return known
            return self._look(child, number, is_published)

        if self._looks is None:
            return look()
        return self._looks.run(str(child), look, lambda _: None)

    def _look(self, child: Path, number: int, is_published: bool) -> Published | None:
        if not (child.is_dir() and _holds(child)):
            return None
        own = child.name.startswith(_OWN_TRACKER)
        try:
            if own and not is_tracked(child):
                return None
            location = locate(child, None, self._format)
        except (CheckpointError, OSError):
            return None
        role = steps.role_at(child) or steps.enclosing(location.path)
        if not own and not lightning.is_finished(location.path):
            return None
        if role is not None and not role.is_finished:
            return None
        says_so = role is not None and (role.path / steps.CONTENTS).is_file()
        says_so = says_so or (location.path / _WRITTEN_LAST).is_file()
        if not (is_published or own or says_so):
            return None
        ranks = [place / "model_optim_rng.pt" for place in readable_children(location.path)[:1]]
        places = [location.path / name for name in _WITNESSES] + ranks
        mark = _mark(places) or _mark([location.path])
        return Published(child.name, child, number, mark)


def find_run(path: Path) -> Path:
    """The directory of iterations that `path` means: itself, the one above, the only one below.

    Raises CheckpointError that says what to pass.
    """
    if is_url(str(path)):
        raise CheckpointError(f"{path}: --all-iterations needs a directory of this machine")
    path = path.resolve()
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: pass the one that a run saves to")
    if _is_run(path):
        return path
    if _number(path) is not None and _holds(path):
        return path.parent
    below = children(path)
    runs = [child for child in below if _is_run(child)]
    if len(runs) == 1:
        return runs[0]
    if runs:
        listed = "\n  ".join(map(str, runs))
        raise CheckpointError(f"{path} holds several runs; pass one of them:\n  {listed}")
    if next(os.scandir(path), None) is None:
        return path  # nothing saved yet
    raise CheckpointError(f"{path} holds no iterations: {explain(path, [])}")


def _is_run(path: Path) -> bool:
    return is_tracked(path) or any(
        _number(child) is not None and _holds(child) for child in readable_children(path)
    )


def _numbered(root: Path) -> list[tuple[int, Path]]:
    """What may be iterations of a run by their names, in order. Raises CheckpointError."""
    try:
        entries = again(lambda: list(root.iterdir()))
    except OSError as problem:
        raise CheckpointError(f"{root} cannot be listed: {problem.strerror}") from None
    return sorted((number, child) for child in entries if (number := _number(child)) is not None)


def _number(path: Path) -> int | None:
    """Of which iteration the directory `path` is, by its name."""
    if match := _NAMES.fullmatch(path.name):
        return int(next(filter(None, match.groups())))
    if path.name == "release":
        return -1
    return lightning.step(path)


def _holds(path: Path) -> bool:
    """Whether the directory `path`, which has a number, is an iteration; of NeMo's alone the name
    does not say so."""
    if _NAMES.fullmatch(path.name) or path.name == "release":
        return True
    return (path / lightning.WEIGHTS).is_dir()


def _paths(mark: Mark) -> list[Path]:
    return [Path(path) for path, _ in mark]


def _mark(paths: Iterable[Path]) -> Mark:
    """Those of `paths` that are there, as they are."""
    found: list[tuple[str, FileIdentity]] = []
    for path in paths:
        with suppress(OSError):
            found.append((str(path), FileIdentity.of(path.stat())))
    return tuple(found)
