"""What stands in for CUDA where megatron-core asks for it on paths that need no GPU, and for
modules of TransformerEngine and Megatron-Bridge."""

from __future__ import annotations

import queue
import warnings
from typing import Any

import torch
from megatron.core import model_parallel_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed.fsdp import mcore_fsdp_adapter
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import layer_norm, rms_norm
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


class _LayerNorm1P(torch.nn.LayerNorm):
    def forward(self, hidden: Tensor) -> Tensor:
        return layer_norm(hidden, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class _RMSNorm1P(torch.nn.RMSNorm):
    def forward(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.normalized_shape, self.weight + 1, self.eps)


def centre_norms_at_zero(model: torch.nn.Module) -> None:
    """Add 1 to the weights of norms when they are used, as Apex's and TransformerEngine's norms do
    with layernorm_zero_centered_gamma (megatron/core/fusions/fused_layer_norm.py)."""
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.__class__ = _LayerNorm1P
        elif isinstance(module, torch.nn.RMSNorm):
            module.__class__ = _RMSNorm1P


class _OutputNorm(torch.nn.RMSNorm):
    """Sharded like any other replicated module, also where megatron-core's MLP asks it."""

    def sharded_state_dict(self, prefix: str, sharded_offsets: Any, metadata: Any) -> Any:
        state = self.state_dict(keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)


def norm_outputs(model: GPTModel, attention: str, mlp: str) -> None:
    """Norms of what attention and MLP put out, at these places in each layer.

    So have them Megatron-Bridge:src/megatron/bridge/models/common/te_layers.py
    TERowParallelLinearLayerNorm, the layers of slime:docker/patch/latest/megatron.patch, and
    mcore-bridge:src/mcore_bridge/model/gpts/glm4.py Glm4MLP.
    """
    for layer in model.decoder.layers:
        for path, module in ((attention, layer.self_attention), (mlp, layer.mlp)):
            norm = _OutputNorm(model.config.hidden_size, eps=model.config.layernorm_epsilon)
            place, _, name = path.rpartition(".")
            layer.get_submodule(place).add_module(name, norm)
            module.register_forward_hook(
                lambda module, inputs, outputs, norm=norm: (norm(outputs[0]), *outputs[1:])
            )


def take_in_turns(model: GPTModel, size: int) -> None:
    """Blocks of what gate and up put out by turns, taken apart as TEGroupedMLP does from
    megatron-core 0.17 on (megatron/core/transformer/moe/experts.py _remove_glu_interleaving)."""

    def apart(module: torch.nn.Module, inputs: Any, outputs: tuple[Tensor, Any]) -> Any:
        blocks = torch.unflatten(outputs[0], -1, (-1, 2, size))
        return blocks.transpose(-3, -2).flatten(-3), *outputs[1:]

    for name, module in model.named_modules():
        if ".local_experts." in name and name.endswith(".linear_fc1"):
            module.register_forward_hook(apart)


def scale_embedding(model: GPTModel) -> None:
    """As EmbeddingScalingMixin of Megatron-Bridge:src/megatron/bridge/models/gemma/modules.py."""
    scale = model.config.hidden_size**0.5
    model.embedding.register_forward_hook(lambda module, inputs, output: output * scale)


def prepare_fsdp() -> None:
    """For the FSDP wrappers as well; in each rank, after the model is built."""

    def on_cpu(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return from_group(group, "cpu", *args, **kwargs)

    from_group = DeviceMesh.from_group
    DeviceMesh.from_group = on_cpu  # type: ignore[method-assign]
    torch.cuda.current_device = lambda: 0
    mcore_fsdp_adapter.TELinear = type("TELinear", (), {})
