"""What a converter's documentation has its user write around it, for one process without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from torch.overrides import TorchFunctionMode


@contextmanager
def one_process(rendezvous: Path) -> Iterator[None]:
    """`rendezvous`: a file that does not exist yet."""
    where = f"file://{rendezvous}"
    torch.distributed.init_process_group("gloo", init_method=where, world_size=1, rank=0)
    parallel_state.initialize_model_parallel()
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def load(models: list[Any], checkpoint: Path) -> None:
    """As verl (verl/utils/megatron/dist_checkpointing.py) and ms-swift
    (swift/megatron/utils/megatron_lm_utils.py) load the weights."""
    (model,) = models
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint))
    model.load_state_dict(loaded["model"])


class CudaMeansCpu(TorchFunctionMode):
    """For what moves each tensor through a GPU on its way out: here it stays where it is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = {name: _cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_cpu, args), **named)


def _cpu(value: Any) -> Any:
    return "cpu" if isinstance(value, str) and value == "cuda" else value
