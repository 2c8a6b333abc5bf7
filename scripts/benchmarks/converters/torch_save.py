"""torch's own way to one file, then names changed and saved: less than a converter has to do, since
nothing is split or put in order."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def main(checkpoint: Path, out: Path) -> None:
    out.mkdir()
    dcp_to_torch_save(checkpoint, out / "whole.pt")
    whole = torch.load(out / "whole.pt", weights_only=False, mmap=False)
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in _flat(whole)}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "whole.pt").unlink()


def _flat(value: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _flat(one, f"{name}.{key}" if name else str(key))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
