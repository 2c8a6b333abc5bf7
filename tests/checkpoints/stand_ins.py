"""What stands in for CUDA where megatron-core asks for it on paths that need no GPU."""

from __future__ import annotations

import queue
import warnings
from typing import Any

import torch
from megatron.core import model_parallel_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed.fsdp import mcore_fsdp_adapter
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode


def prepare() -> None:
    """For modules and their states; call once, first."""

    def nothing(*_: object, **__: object) -> None:
        return None

    def parameter_type(parameter: Tensor, *args: Any, **kwargs: Any) -> Any:
        kind = Tensor.type(parameter, *args, **kwargs)
        return kind.replace("torch.", "torch.cuda.") if isinstance(kind, str) else kind

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.Stream = nothing  # type: ignore[assignment, misc]
    torch.cuda.synchronize = nothing
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    # A synchronous save collects its results in this very process: no need for the server process
    # that would be spawned for the queue, and would import everything again.
    filesystem_async._results_queue = queue.Queue()
    multi_latent_attention.HAVE_TE = False  # where it is not, its names are None, not missing
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    model_parallel_config.warnings = warnings  # 0.15 uses it without importing it
    torch.nn.Parameter.type = parameter_type  # type: ignore[method-assign, assignment]


class LatentCore(DotProductAttention):  # type: ignore[misc]
    """Megatron's own attention for multi-latent attention, with which it is used only by its tests:
    it does not know of values whose heads have another size than those of keys."""

    def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


class CudaMeansCpu(TorchFunctionMode):
    """Makes `torch.tensor(..., device="cuda")` and its like build CPU tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def prepare_fsdp() -> None:
    """For the FSDP wrappers as well; in each rank, after the model is built."""

    def on_cpu(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return from_group(group, "cpu", *args, **kwargs)

    from_group = DeviceMesh.from_group
    DeviceMesh.from_group = on_cpu  # type: ignore[method-assign]
    torch.cuda.current_device = lambda: 0
    mcore_fsdp_adapter.TELinear = type("TELinear", (), {})
