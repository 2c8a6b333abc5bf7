"""Where on this machine a model may lie that goes by a name. Nothing is downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")


def local_copies(names: Iterable[str]) -> Iterator[Path]:
    """Directories that `names` (paths, or names on a hub) may mean here, the likeliest first; they
    need not exist. Relative paths mean nothing here: they were relative where it was trained."""
    names = list(names)
    for name in names:
        if os.path.isabs(name) and "\0" not in name:
            yield Path(name)
    home = Path.home() / ".cache"
    modelscope = Path(os.environ.get("MODELSCOPE_CACHE") or home / "modelscope" / "hub")
    hub = os.environ.get("HF_HUB_CACHE")
    huggingface = Path(hub or Path(os.environ.get("HF_HOME") or home / "huggingface") / "hub")
    for name in names:
        if _HUB_NAME.fullmatch(name):
            # ModelScope's client writes "." in a name as "___".
            for spelled in dict.fromkeys((name, name.replace(".", "___"))):
                yield modelscope / "models" / spelled
                yield modelscope / spelled
            snapshots = huggingface / f"models--{name.replace('/', '--')}" / "snapshots"
            yield from sorted(snapshots.glob("*"), reverse=True)
