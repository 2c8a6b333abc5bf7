"""From the path a user gives to one complete iteration: every level people point at is recognised.

Layout facts: Megatron-LM:megatron/training/checkpointing.py get_checkpoint_name, read_metadata.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mcorefs.errors import CheckpointError
from mcorefs.formats import Format, detect

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_(\d{7,})$")
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
    path = path.absolute()
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is a file; pass the checkpoint directory: the one with {TRACKER}, or one "
            "iter_XXXXXXX directory"
        )
    if (format_ := detect(path)) is not None:
        found = Location(path.parent, path, _number(path.name), format_)
        if iteration is not None and iteration != found.iteration:
            raise CheckpointError(
                f"{path} is one iteration already; --iteration {iteration} needs the directory "
                f"above it, {path.parent}"
            )
        return found
    if _is_root(path):
        return _in_root(path, iteration)
    roots = [child for child in _below(path) if _is_root(child)]
    if len(roots) == 1:
        found = _in_root(roots[0], iteration)
        remark = f"{path} is a run directory; the checkpoint in it is {roots[0]}"
        return Location(**{**vars(found), "remarks": (remark, *found.remarks)})
    raise CheckpointError(_explain(path, roots))


def _number(name: str) -> int | None:
    match = _ITERATION.match(name)
    return int(match[1]) if match else None


def _is_root(path: Path) -> bool:
    return (path / TRACKER).is_file() or any(
        _ITERATION.match(child.name) or child.name == "release" for child in _children(path)
    )


def _children(path: Path) -> list[Path]:
    try:
        return sorted(child for child in path.iterdir() if child.is_dir())
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be listed: {problem.strerror}") from None


def _below(path: Path) -> list[Path]:
    """Directories one and two levels below: ms-swift nests vN-TIMESTAMP/checkpoint-N."""
    children = _children(path)
    return children + [grandchild for child in children for grandchild in _children(child)]


def _in_root(root: Path, iteration: int | None) -> Location:
    formats: dict[str, Format] = {}
    incomplete: list[str] = []
    for child in _children(root):
        if not (_ITERATION.match(child.name) or child.name == "release"):
            continue
        if (format_ := detect(child)) is not None:
            formats[child.name] = format_
        else:
            incomplete.append(child.name)
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
        return f"iter_{iteration:07d}", []
    tracker = root / TRACKER
    if tracker.is_file():
        said = tracker.read_text(errors="replace").strip()[:40]
        if said == "release":
            return said, []
        if not said.isdigit():
            raise CheckpointError(
                f"{tracker} says {said!r}, expected an iteration number or 'release'; "
                "pass --iteration N"
            )
        return f"iter_{int(said):07d}", []
    if len(names) == 1:
        return names[0], [f"{root} has no {TRACKER}; {names[0]} is its only complete iteration"]
    if not names:
        raise CheckpointError(
            f"{root}: none of {', '.join(incomplete)} is complete in a format that mcorefs reads"
            f" ({_why_incomplete(root / incomplete[0])})"
        )
    raise CheckpointError(
        f"{root} has no {TRACKER} and several iterations: {', '.join(names)}; pass --iteration N"
    )


def _cannot_open(root: Path, wanted: str, names: list[str], incomplete: list[str]) -> str:
    have = f"Complete here: {', '.join(names) or 'none'}"
    if wanted in incomplete:
        return f"{root / wanted} cannot be opened: {_why_incomplete(root / wanted)}. {have}"
    return f"{root} holds no {wanted}. {have}. Pass --iteration N to choose one"


def _why_incomplete(path: Path) -> str:
    if any(path.glob("mp_rank_*")):
        return "it is in the legacy torch format (mp_rank_*), which is not supported yet"
    if (path / "metadata.json").is_file() and not (path / ".metadata").is_file():
        if any(path.glob("*/.zarray")):
            return "it is in the zarr format, which is not supported yet"
        return "it has metadata.json but no .metadata: it was not copied or saved completely"
    if (path / ".metadata").is_file():
        return (
            "it has .metadata but no metadata.json: either the save was interrupted, or it is in "
            "the torch_dcp/fsdp_dtensor format, which is not supported yet"
        )
    if any(path.glob("*.distcp")):
        return "it has shard files but no .metadata: the save was interrupted or still goes on"
    if (path / "common.pt").is_file():
        return (
            "it holds only common.pt: ms-swift with save_safetensors and no_save_optim puts the "
            "weights in Hugging Face safetensors beside it; use those directly"
        )
    return "it holds no checkpoint files"


def _explain(path: Path, roots: list[Path]) -> str:
    """Why `path` is not a checkpoint: what it is, and what to pass."""
    if roots:
        listed = "\n  ".join(str(root) for root in roots)
        return f"{path} holds several checkpoints; pass one of them:\n  {listed}"
    if any((path / name).is_file() for name in _ADAPTER_FILES):
        return (
            f"{path} holds a LoRA adapter (PEFT), not a Megatron checkpoint; load it with peft on "
            "top of its base model"
        )
    if any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
        return (
            f"{path} is a Hugging Face model directory already: no conversion is needed, pass it "
            "to from_pretrained as it is"
        )
    why = _why_incomplete(path)
    if why != "it holds no checkpoint files":
        return f"{path} cannot be opened: {why}"
    if (path / "config.json").is_file():
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
