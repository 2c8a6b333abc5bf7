"""From the path a user gives to one complete iteration: every level people point at is recognised.

Layout facts: Megatron-LM:megatron/training/checkpointing.py get_checkpoint_name, read_metadata.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mcorefs.errors import CheckpointError
from mcorefs.formats import Format, detect

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_([0-9]{7,})")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Location:
    """One iteration of a run."""

    root: Path
    """The directory that holds the iterations (and the tracker file)."""
    path: Path
    """The iteration's own directory."""
    iteration: int | None
    """None for `release`."""
    format: Format
    complete: Sequence[str] = ()
    """Names of all iterations under `root` that can be opened."""
    incomplete: Sequence[str] = ()
    """Names of iterations that are still being written or were never finished."""
    remarks: Sequence[str] = ()


def locate(path: Path, iteration: int | None = None) -> Location:
    """The iteration to open for `path`: a checkpoint root, one iteration, or a run directory.

    Raises CheckpointError that says what was found instead and what to pass.
    """
    path = _absolute(path)
    if detect(path) is not None:
        return _open(path, iteration)
    _children(path)  # says why if it cannot be looked at
    if _is_root(path):
        return _open(path, iteration)
    below = _below(path)
    if iteration is not None and len(below) > 1:
        holding = [root for root in below if iteration in map(_number, _iterations(root))]
        below = holding if len(holding) == 1 else below
    if len(below) != 1:
        raise CheckpointError(_explain(path, below))
    found = _open(below[0], iteration)
    remark = f"{path} is a run directory; the checkpoint in it is {below[0]}"
    return replace(found, remarks=(remark, *found.remarks))


def _absolute(path: Path) -> Path:
    """`path` as a directory that exists, with its own name if that says which iteration it is."""
    path = path.absolute()
    try:
        if not path.exists():
            if path.is_symlink():
                raise CheckpointError(f"{path} is a symbolic link to {path.readlink()}: not there")
            raise CheckpointError(f"{path} does not exist")
        if not path.is_dir():
            above = path.parent
            is_checkpoint = detect(above) is not None or _is_root(above)
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


def _open(path: Path, iteration: int | None) -> Location:
    """The iteration directory `path`, or one iteration of the root `path`."""
    format_ = detect(path)
    if format_ is None:
        return _in_root(path, iteration)
    found = Location(path.parent, path, _number(path.name), format_)
    if iteration not in (None, found.iteration):
        raise CheckpointError(
            f"{path} is one iteration already; --iteration {iteration} needs the directory above "
            f"it, {found.root}"
        )
    return found


def _number(name: str) -> int | None:
    match = _ITERATION.fullmatch(name)
    return int(match[1]) if match else None


def _names_iteration(name: str) -> bool:
    return name == "release" or _number(name) is not None


def _children(path: Path) -> list[Path]:
    try:
        return sorted(child for child in path.iterdir() if child.is_dir())
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be listed: {problem.strerror}") from None


def _readable_children(path: Path) -> list[Path]:
    """Those of a directory that may be anything: lost+found, another user's, gone meanwhile."""
    try:
        return _children(path)
    except CheckpointError:
        return []


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _iterations(root: Path) -> list[str]:
    """Names of the iterations under `root`, complete or not."""
    names = [child.name for child in _readable_children(root) if _names_iteration(child.name)]
    if "release" in names and _why_incomplete(root / "release") == NOTHING:
        names.remove("release")  # a word that other programs use too
    return names


def _is_root(path: Path) -> bool:
    return _is_file(path / TRACKER) or bool(_iterations(path))


def _below(path: Path) -> list[Path]:
    """Checkpoints one and two levels below, roots or single iterations: ms-swift nests
    vN-TIMESTAMP/checkpoint-N, NeMo weights, verl actor/dist_ckpt."""
    found: list[Path] = []
    for child in _readable_children(path):
        for place in (child, *_readable_children(child)):
            if _is_root(place) or detect(place) is not None:
                found.append(place)
                if place is child:
                    break
    return found


def _in_root(root: Path, iteration: int | None) -> Location:
    formats: dict[str, Format] = {}
    incomplete: list[str] = []
    for name in _iterations(root):
        if (format_ := detect(root / name)) is not None:
            formats[name] = format_
        else:
            incomplete.append(name)
    names = sorted(formats, key=lambda name: (_number(name) is None, _number(name) or 0))
    wanted, remarks = _wanted(root, iteration, names, incomplete)
    if wanted not in formats:
        raise CheckpointError(_cannot_open(root, wanted, names, incomplete))
    return Location(
        root, root / wanted, _number(wanted), formats[wanted], names, incomplete, remarks
    )


def _wanted(
    root: Path, iteration: int | None, names: list[str], incomplete: list[str]
) -> tuple[str, list[str]]:
    """Name of the iteration to open, and remarks."""
    if iteration is not None:
        return _named(iteration, names), []
    if _is_file(root / TRACKER):
        number = _tracked(root / TRACKER)
        if number is None:
            return "release", []
        newer = [name for name in names if (_number(name) or 0) > number]
        remark = f"{TRACKER} names iteration {number}; not published: {', '.join(newer)}"
        return _named(number, names), [remark] if newer else []
    if len(names) == 1:
        return names[0], [f"{root} has no {TRACKER}; {names[0]} is its only complete iteration"]
    if not names:
        raise CheckpointError(
            f"{root}: none of {', '.join(incomplete)} is complete in a format that mcorefs reads"
            f" ({_why_incomplete(root / incomplete[-1])})"
        )
    raise CheckpointError(
        f"{root} has no {TRACKER} and several iterations: {', '.join(names)}; pass --iteration N "
        "or the directory of one"
    )


def _tracked(tracker: Path) -> int | None:
    """The iteration that the tracker file names; None for `release`."""
    try:
        with tracker.open("rb") as file:
            said = file.read(100).decode(errors="replace").strip()
    except OSError as problem:
        raise CheckpointError(f"{tracker} cannot be read: {problem.strerror}") from None
    if said == "release":
        return None
    if not (said.isascii() and said.isdecimal()):
        raise CheckpointError(
            f"{tracker} says {said[:40]!r}, expected an iteration number or 'release'; "
            "pass --iteration N"
        )
    return int(said)


def _named(iteration: int, names: list[str]) -> str:
    """The directory's name; seven digits is only the usual width."""
    usual = f"iter_{iteration:07d}"
    return next((name for name in names if _number(name) == iteration), usual)


def _cannot_open(root: Path, wanted: str, names: list[str], incomplete: list[str]) -> str:
    have = f"Complete here: {', '.join(names) or 'none'}"
    if names:
        have += "; pass --iteration N to open one of these"
    if wanted in incomplete:
        return f"{root / wanted} cannot be opened: {_why_incomplete(root / wanted)}. {have}"
    number = _number(wanted)
    if (step := root / f"global_step_{number}").is_dir():
        return f"{root} is a run of verl; pass the directory of one model, such as {step}/actor"
    return f"{root} holds no {wanted}. {have}"


NOTHING = "it holds no checkpoint files"


def _why_incomplete(path: Path) -> str:
    if any(path.glob("mp_rank_*")):
        return (
            "it has mp_rank_* directories but none holds model_optim_rng.pt: it was not copied or "
            "saved completely"
        )
    described = _is_file(path / "metadata.json")
    if described and any(path.glob("*/.zarray")):
        return "it is in the zarr format, which is not supported yet"
    if described and _is_file(path / ".metadata"):
        return "its metadata.json names no format that mcorefs reads (torch_dist, fsdp_dtensor)"
    if described:
        return "it has metadata.json but no .metadata: it was not copied or saved completely"
    if any(path.glob("*.distcp")):
        return "it has shard files but no .metadata: the save was interrupted or still goes on"
    if _is_file(path / "common.pt"):
        return (
            "it holds only common.pt: ms-swift with save_safetensors and no_save_optim puts the "
            "weights in Hugging Face safetensors beside it; use those directly"
        )
    return NOTHING


def _explain(path: Path, below: list[Path]) -> str:
    """Why `path` is not a checkpoint: what it is, and what to pass."""
    if below:
        listed = "\n  ".join(str(place) for place in below)
        return f"{path} holds several checkpoints; pass one of them:\n  {listed}"
    if any(_is_file(path / name) for name in _ADAPTER_FILES):
        return (
            f"{path} holds a LoRA adapter (PEFT), not a Megatron checkpoint; load it with peft on "
            "top of its base model"
        )
    if any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
        return (
            f"{path} is a Hugging Face model directory already: no conversion is needed, pass it "
            "to from_pretrained as it is"
        )
    if (path / "model_optim_rng.pt").is_file():
        return f"{path} holds what one rank saved; pass the directory above it, {path.parent}"
    why = _why_incomplete(path)
    if why != NOTHING:
        return f"{path} cannot be opened: {why}"
    if _is_file(path / "config.json"):
        return (
            f"{path} holds a config.json but no weights; pass the Megatron checkpoint directory "
            "(with iter_XXXXXXX in it) and give this one as --hf-config"
        )
    names = sorted(child.name for child in path.iterdir())
    if not names:
        return f"{path} is empty"
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return (
        f"{path} is not a Megatron checkpoint: it has neither {TRACKER} nor an iter_XXXXXXX "
        f"directory. It holds: {shown}"
    )
