"""From the path a user gives to one complete iteration: every level people point at is recognised.

Layout facts: Megatron-LM:megatron/training/checkpointing.py get_checkpoint_name, read_metadata;
what verl puts below an iteration is in `steps`, how NeMo names its in `lightning`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mcorefs import lightning, steps
from mcorefs.errors import CheckpointError
from mcorefs.explain import (
    LOCAL,
    LOCAL_REFUSED,
    NOTHING,
    children,
    explain,
    readable_children,
    why_incomplete,
)
from mcorefs.formats import HUGGINGFACE, NAMES, Format, detect, matching
from mcorefs.storage import is_file
from mcorefs.tar import archive_path
from mcorefs.tracker import TRACKER, is_tracked, latest

__all__ = ["TRACKER", "Location", "is_root", "locate"]

NEMO_CONFIG = "model_config.yaml"
"""NeMo 1's, in a .nemo archive or the directory that one was unpacked to."""
_ITERATION = re.compile(rf"iter_([0-9]{{7,}})|{steps.STEP.pattern}")


@dataclass(frozen=True)
class Location:
    """One iteration of a run."""

    root: Path
    """The directory that holds the iterations (and the tracker file)."""
    path: Path
    """The directory that holds the iteration's weights; usually its own."""
    iteration: int | None
    """None for `release`."""
    format: Format
    complete: Sequence[str] = ()
    """Names of all iterations under `root` that were published and can be opened."""
    incomplete: Sequence[str] = ()
    """Names of iterations that are still being written, were never finished, or are newer than
    what the tracker file names: never chosen, opened only where asked for by number and whole."""
    remarks: Sequence[str] = ()
    huggingface: Path | None = None
    """A Hugging Face directory with weights that the trainer saved with this iteration."""


@dataclass(frozen=True)
class _Place:
    """Where the weights of one iteration are, and in which format."""

    path: Path
    format: Format
    huggingface: Path | None
    is_finished: bool = True


def locate(path: Path, iteration: int | None = None, format_name: str | None = None) -> Location:
    """The iteration to open for `path`: a checkpoint root, one iteration, or a run directory.

    Raises CheckpointError that says what was found instead and what to pass.
    """
    if format_name not in (None, *NAMES):
        raise CheckpointError(f"--format {format_name}: expected one of {', '.join(NAMES)}")
    found = _locate(_absolute(path), iteration, format_name)
    formats = [format_.name for format_ in matching(found.path)]
    if format_name is None and len(formats) > 1:
        raise CheckpointError(
            f"{found.path} holds files of {len(formats)} formats: {', '.join(formats)}; pass "
            f"--format {formats[0]} (what Megatron-LM would load) or --format {formats[1]}"
        )
    return found


def _locate(path: Path, iteration: int | None, name: str | None) -> Location:
    if _place(path, name) is not None:
        return _open(path, iteration, name)
    children(path)  # says why if it cannot be looked at
    if is_root(path):
        return _open(path, iteration, name)
    if _names_iteration(path.name) and _saved_beside(path.parent, [path.name], name):
        return _in_root(path.parent, _number(path.name), name)
    below = _below(path, name)
    if (chosen := lightning.choose(below, iteration)) is not None:
        return _of_nemo(path, chosen, below, name)
    if iteration is not None and len(below) > 1:
        holding = [root for root in below if iteration in map(_number, _iterations(root))]
        below = holding if len(holding) == 1 else below
    if name in (None, HUGGINGFACE.name) and HUGGINGFACE.detect(path):
        if below and name is None:
            raise CheckpointError(
                f"{path} is a Hugging Face model directory with a Megatron checkpoint in it: pass "
                f"--format {HUGGINGFACE.name}, or {below[0]}"
            )
        return _one(path, _Place(path, HUGGINGFACE, path), iteration)
    if not below and name is None and (models := _below(path, HUGGINGFACE.name)):
        listed = "".join(f"\n  {model}" for model in models)
        raise CheckpointError(
            f"{path} holds no Megatron checkpoint. Pass what is a Hugging Face model directory in "
            f"it, if that is meant:{listed}"
        )
    if len(below) != 1:
        raise CheckpointError(explain(path, below))
    found = _open(below[0], iteration, name)
    return replace(found, remarks=(_where(path, below[0]), *found.remarks))


def _where(path: Path, place: Path) -> str:
    if is_file(path / NEMO_CONFIG):
        return f"the weights of {path} are in {place}"
    return f"{path} is a run directory; the checkpoint in it is {place}"


def _of_nemo(path: Path, chosen: Path, below: Sequence[Path], name: str | None) -> Location:
    """The checkpoint of NeMo's with its weights in `chosen`, of all that lie `below` the path."""
    found = _open(chosen, None, name)
    ordered = sorted(below, key=lambda place: (lightning.step(place) or 0, place))
    finished = [lightning.top(place).name for place in ordered if lightning.is_finished(place)]
    every = [lightning.top(place).name for place in ordered]
    remark = f"{lightning.top(chosen).name} is opened, of the {len(below)} in {path}"
    return replace(
        found,
        complete=finished,
        incomplete=[each for each in every if each not in finished],
        remarks=(*([remark] if len(below) > 1 else []), *found.remarks),
    )


def _absolute(path: Path) -> Path:
    """`path` as a directory that exists, with its own name if that says which iteration it is."""
    try:
        path = archive_path(path.absolute())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is nowhere, for the directory that this was started in is gone: cd to another"
        ) from None
    try:
        if not path.exists():
            if path.is_symlink():
                raise CheckpointError(f"{path} is a symbolic link to {path.readlink()}: not there")
            raise CheckpointError(f"{path} does not exist")
        if not path.is_dir():
            above = path.parent
            if LOCAL.fullmatch(path.name):
                raise CheckpointError(f"{above} {LOCAL_REFUSED}")
            is_checkpoint = is_root(above) or _place(above, None) is not None
            what = (
                f"the directory above it, {above}"
                if is_checkpoint
                else f"the checkpoint directory: the one with {TRACKER}, or one iter_XXXXXXX"
            )
            raise CheckpointError(f"{path} is not a directory; pass {what}")
        is_alias = path.is_symlink() and not _names_iteration(path.name)
        return path.resolve() if is_alias or ".." in path.parts else path
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be looked at: {problem.strerror}") from None


def _place(path: Path, name: str | None) -> _Place | None:
    """Where the weights of the iteration `path` are: there, or in a directory of verl's.

    Megatron-Bridge can put a Hugging Face copy into `hf`. What the trainer exported is taken only
    where it is asked for, or where verl saved nothing else.
    """
    inside = steps.enclosing(path)
    role = inside or steps.role_at(path)
    sharded, copy = (path, path / "hf") if role is None else (role.sharded, role.huggingface)
    finished = role is None or role.is_finished
    held = copy if HUGGINGFACE.detect(copy) else None
    asked = name == HUGGINGFACE.name or (inside is not None and path == copy)
    if not asked or held is None:
        if (format_ := detect(sharded, name)) is not None:
            return _Place(sharded, format_, held, finished)
        if role is None or name not in (None, HUGGINGFACE.name):
            return None
    return None if held is None else _Place(held, HUGGINGFACE, held, finished)


def _open(path: Path, iteration: int | None, name: str | None) -> Location:
    """The iteration directory `path`, or one iteration of the root `path`."""
    place = _place(path, name)
    return _in_root(path, iteration, name) if place is None else _one(path, place, iteration)


def _one(path: Path, place: _Place, iteration: int | None) -> Location:
    """The single iteration that `path` is, or is a part of."""
    step = steps.above(path)
    number = _number(path.name if step is None else step.name)
    if number is None:
        number = lightning.step(path)
    root = (path if step is None else step).parent
    if iteration not in (None, number):
        raise CheckpointError(
            f"{path} is one iteration already; --iteration {iteration} needs the directory above "
            f"it, {root if root != lightning.top(path) else root.parent}"
        )
    if not lightning.is_finished(path):
        raise CheckpointError(
            f"{lightning.top(path)} is not finished: as {lightning.marker(path)} says, NeMo was "
            "still writing or already deleting it. If you know better, remove that file"
        )
    remarks = [] if place.path == path else [f"the weights of {path} are in {place.path}"]
    remarks += _copies(place.huggingface, place)
    if not place.is_finished:
        remarks.append(
            f"{path} holds no {steps.CONTENTS}, which verl writes last: other parts of this save "
            "may be missing"
        )
    return Location(root, place.path, number, place.format, (), (), remarks, place.huggingface)


def _number(name: str) -> int | None:
    match = _ITERATION.fullmatch(name)
    return int(match[1] or match[2]) if match else None


def _names_iteration(name: str) -> bool:
    return name == "release" or _number(name) is not None


def _iterations(root: Path) -> list[str]:
    """Names of the iterations under `root`, complete or not."""
    names = [child.name for child in readable_children(root) if _names_iteration(child.name)]
    if "release" in names and why_incomplete(root / "release") == NOTHING:
        names.remove("release")  # a word that other programs use too
    return names


def is_root(path: Path) -> bool:
    """Whether iterations are kept in `path`."""
    return is_tracked(path) or bool(_iterations(path))


def _below(path: Path, name: str | None) -> list[Path]:
    """Checkpoints one and two levels below, roots or single iterations: ms-swift nests
    vN-TIMESTAMP/checkpoint-N, NeMo weights."""
    found: list[Path] = []
    for child in readable_children(path):
        for place in (child, *readable_children(child)):
            if _is_checkpoint(place, name):
                found.append(place)
                if place is child:
                    break
    return found


def _is_checkpoint(path: Path, name: str | None) -> bool:
    if name == HUGGINGFACE.name:
        return HUGGINGFACE.detect(path)
    return is_root(path) or _place(path, name) is not None


def _in_root(root: Path, iteration: int | None, name: str | None) -> Location:
    places: dict[str, _Place] = {}
    incomplete: list[str] = []
    newest = _newest_published(root)
    iterations = _iterations(root)
    for child in iterations:
        if (place := _place(root / child, name)) is not None:
            places[child] = place
        late = newest is not None and (_number(child) or 0) > newest
        if place is None or late or not place.is_finished:
            incomplete.append(child)
    published = [child for child in places if child not in incomplete]
    published.sort(key=lambda child: (_number(child) is None, _number(child) or 0))
    if not places and _saved_beside(root, iterations, name):
        number = _number(iterations[0]) if iterations else newest
        if iteration in (None, number):
            why = _why_beside(root, iterations)
            return Location(root, root, number, HUGGINGFACE, (), (), [why], root)
    wanted, remarks = _wanted(root, iteration, places, published, incomplete)
    if wanted not in places:
        raise CheckpointError(_cannot_open(root, wanted, places, incomplete))
    place = places[wanted]
    if place.path != root / wanted:
        remarks.append(f"the weights of {wanted} are in {place.path}")
    remarks += _copies(place.huggingface or root, place)
    passing = _newest_published(root / "non_persistent")
    if iteration is None and passing is not None and passing > (newest or 0):
        remarks.append(
            f"{root / 'non_persistent'} holds iteration {passing}, saved only for resuming; pass "
            "that directory to open it"
        )
    return Location(
        root,
        place.path,
        _number(wanted),
        place.format,
        published,
        incomplete,
        remarks,
        place.huggingface,
    )


def _saved_beside(root: Path, iterations: Sequence[str], name: str | None) -> bool:
    """Whether the weights of the only iteration lie as Hugging Face safetensors in `root`, by
    design: ms-swift with save_safetensors and no_save_optim puts only common.pt into the iteration
    (ms-swift:swift/megatron/trainers/base.py save_checkpoint), into `-merged` not even that."""
    if name not in (None, HUGGINGFACE.name) or len(iterations) > 1:
        return False
    try:
        held = {entry.name for child in iterations for entry in (root / child).iterdir()}
    except OSError:
        return False
    is_swift = bool(held) or is_file(root / "args.json")
    return is_swift and held <= {"common.pt"} and HUGGINGFACE.detect(root)


def _copies(directory: Path | None, place: _Place) -> list[str]:
    """What to say of Hugging Face weights in `directory`, beside the sharded ones that are read."""
    if place.format is HUGGINGFACE or directory is None or not HUGGINGFACE.detect(directory):
        return []
    return [
        f"{directory} holds Hugging Face weights too; --format {HUGGINGFACE.name} serves those as "
        "they are"
    ]


def _why_beside(root: Path, iterations: Sequence[str]) -> str:
    what = (
        f"{root / iterations[0]} holds no weights" if iterations else f"{root} holds no iteration"
    )
    return f"{what}; the trainer saved them as Hugging Face safetensors in {root}"


def _newest_published(root: Path) -> int | None:
    """What the tracker file names, where it names a number."""
    try:
        published = latest(root)
    except CheckpointError:
        return None
    return None if published is None else published.iteration


def _wanted(
    root: Path,
    iteration: int | None,
    places: Mapping[str, _Place],
    published: list[str],
    incomplete: list[str],
) -> tuple[str, list[str]]:
    """Name of the iteration to open, and remarks."""
    if iteration is not None:
        wanted = _named(iteration, places, incomplete)
        late = wanted in incomplete
        return wanted, [f"{wanted} was not published: {_why_late(root)}"] if late else []
    if (said := latest(root)) is not None:
        remarks = [said.remark] if said.remark else []
        if said.iteration is None:
            return "release", remarks
        if newer := [name for name in places if (_number(name) or 0) > said.iteration]:
            unpublished = f"names iteration {said.iteration}; not published: {', '.join(newer)}"
            remarks.append(f"{said.file} {unpublished}")
        return _named(said.iteration, places, incomplete), remarks
    if len(published) == 1:
        only = published[0]
        return only, [f"{root} has no {TRACKER}; {only} is its only complete iteration"]
    if not published:
        raise CheckpointError(
            f"{root}: none of {', '.join(incomplete)} is complete in a format that mcorefs reads"
            f" ({why_incomplete(root / incomplete[-1])})"
        )
    raise CheckpointError(
        f"{root} has no {TRACKER} and several iterations: {', '.join(published)}; pass "
        "--iteration N or the directory of one"
    )


def _why_late(root: Path) -> str:
    try:
        published = latest(root)
    except CheckpointError as problem:
        return str(problem)
    if published is None or published.iteration is None:
        return f"it holds no {steps.CONTENTS}, which is written last"
    return f"{published.file} names iteration {published.iteration}"


def _named(iteration: int, places: Iterable[str], incomplete: Sequence[str]) -> str:
    """The directory's name; seven digits is only the usual width."""
    names = (*places, *incomplete)
    usual = f"iter_{iteration:07d}"
    if any(steps.STEP.fullmatch(name) for name in names):
        usual = f"global_step_{iteration}"
    return next((name for name in names if _number(name) == iteration), usual)


def _cannot_open(root: Path, wanted: str, names: Iterable[str], incomplete: Sequence[str]) -> str:
    listed = ", ".join(names)
    have = f"Complete here: {listed or 'none'}"
    if listed:
        have += "; pass --iteration N to open one of these"
    if wanted in incomplete:
        return f"{root / wanted} cannot be opened: {why_incomplete(root / wanted)}. {have}"
    return f"{root} holds no {wanted}. {have}"
