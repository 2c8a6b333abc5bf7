"""What is there instead of a checkpoint, in words that say what to pass."""

from __future__ import annotations

import re
from pathlib import Path

from mcorefs import lightning, steps
from mcorefs.errors import CheckpointError
from mcorefs.formats import matching
from mcorefs.formats.dcp import sharded_backend
from mcorefs.patience import again
from mcorefs.storage import is_file
from mcorefs.tracker import TRACKER

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
LOCAL = re.compile(r"iter_[0-9]{7,}_[0-9]+_local(\.dirty)?\.pt")
"""nvidia-resiliency-ext: checkpointing/local/ckpt_managers/local_manager.py."""
LOCAL_REFUSED = (
    "holds a local (non-persistent) checkpoint of nvidia-resiliency-ext: Python objects of one "
    "rank each, usually spread over the nodes, meant only to resume the run that wrote them; save "
    "a global one (--save with --ckpt-format torch_dist) and pass that"
)


def children(path: Path) -> list[Path]:
    try:
        return again(lambda: sorted(child for child in path.iterdir() if child.is_dir()))
    except OSError as problem:
        name = str(problem.filename or path)
        which = "" if name == str(path) else f" ({name})"
        raise CheckpointError(f"{path} cannot be listed: {problem.strerror}{which}") from None


def readable_children(path: Path) -> list[Path]:
    """Those of a directory that may be anything: lost+found, another user's, gone meanwhile."""
    try:
        return children(path)
    except CheckpointError:
        return []


def _holds_local(path: Path) -> bool:
    """ROOT/SESSION/RANK/iter_XXXXXXX_RANK_local.pt; the session may have no name."""
    places = [path, *readable_children(path)]
    places += [child for place in places[1:] for child in readable_children(place)]
    return any(LOCAL.fullmatch(file.name) for place in places for file in place.glob("iter_*.pt"))


def _holds_peft(path: Path) -> bool:
    return any(is_file(path / name) for name in _ADAPTER_FILES)


NOTHING = "it holds no checkpoint files"


def why_incomplete(path: Path) -> str:
    """Why the iteration `path` cannot be opened, or NOTHING."""
    if (role := steps.enclosing(path) or steps.role_at(path)) is not None:
        if role.is_fsdp:
            return (
                "verl's FSDP backend saved it, which is no Megatron checkpoint; convert it with "
                "`python -m verl.model_merger merge --backend fsdp`"
            )
        why = _why_incomplete(role.sharded) if role.sharded.is_dir() else "it is not there"
        return f"{role.sharded}: {why}; and {role.huggingface} holds no weights"
    return _why_incomplete(path)


def _why_incomplete(path: Path) -> str:
    if formats := matching(path):
        return f"it is in format {formats[0].name}, not in the one that was asked for"
    if any(path.glob("mp_rank_*")):
        return (
            "it has mp_rank_* directories but none holds model_optim_rng.pt: it was not copied or "
            "saved completely"
        )
    described, index = is_file(path / "metadata.json"), is_file(path / ".metadata")
    if zarr := _why_no_zarr(path):
        return zarr
    if described and index:
        return "its metadata.json names no format that mcorefs reads (torch_dist, fsdp_dtensor)"
    if described:
        return "it has metadata.json but no .metadata: it was not copied or saved completely"
    if any(path.glob("*.distcp")):
        return "it has shard files but no .metadata: the save was interrupted or still goes on"
    if is_file(path / "common.pt") and _holds_peft(path.parent):
        merged = path.parent.with_name(f"{path.parent.name}-merged")
        what = "it holds only common.pt: ms-swift saved the LoRA adapter that it trained"
        if is_file(merged / "config.json"):
            return f"{what} beside it, in PEFT's format, and the model merged with it in {merged}"
        return f"{what} beside it, in PEFT's format; {_with_base(path.parent)}"
    if is_file(path / "common.pt"):
        return (
            "it holds only common.pt: ms-swift with save_safetensors and no_save_optim puts the "
            "weights in Hugging Face safetensors beside it, but none are there"
        )
    return NOTHING


def _why_no_zarr(path: Path) -> str | None:
    """What is wrong with a checkpoint in the zarr format, if it is one."""
    if sharded_backend(path) == "zarr":
        return "its metadata.json says zarr but it has no arrays: it was not copied completely"
    if any(path.glob("*/.zarray")):
        return (
            "it has zarr arrays but no metadata.json that says so, which is written last: the save "
            "was interrupted, or it was not copied completely"
        )
    return None


def _with_base(path: Path) -> str:
    """What to do with the adapter in `path`."""
    try:
        base = (steps.read_json(path / _ADAPTER_FILES[0]) or {}).get("base_model_name_or_path")
    except CheckpointError:
        base = None
    named = f" ({base:.200})" if isinstance(base, str) and base else ""
    return f"pass its base model{named} as CKPT, and --adapter {path}"


def explain(path: Path, below: list[Path]) -> str:
    """Why `path` is not a checkpoint: what it is, and what to pass."""
    if below:
        listed = "\n  ".join(str(place) for place in below)
        return f"{path} holds several checkpoints; pass one of them:\n  {listed}"
    if _holds_peft(path):
        return f"{path} holds a LoRA adapter (PEFT), not a Megatron checkpoint; {_with_base(path)}"
    if any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin")):
        return (
            f"{path} holds weights in a Hugging Face format but no config.json; they need no "
            "conversion, only the config.json of their model"
        )
    if _holds_local(path):
        return f"{path} {LOCAL_REFUSED}"
    if (path / "model_optim_rng.pt").is_file():
        return f"{path} holds what one rank saved; pass the directory above it, {path.parent}"
    for place in (path, path / lightning.WEIGHTS):
        if (why := why_incomplete(place)) != NOTHING:
            return f"{place} cannot be opened: {why}"
    if is_file(path / "config.json"):
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
