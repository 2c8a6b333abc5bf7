"""megatron-core's own hybrid of Mamba layers, attention, MLPs and experts, without a GPU.

Its modules, their parameters and how they are saved are megatron-core's. What stands in: the two
kernels of mamba_ssm (written from the recurrence that they compute, not from transformers), and,
for TransformerEngine's linear layers with the norm before them, megatron-core's own with that norm
on its own, under the names that theirs are saved under.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor
from torch.nn.functional import silu, softplus

from . import falcon
from .spec import Spec
from .te_linear import TELinear

_TRITON = "megatron.core.inference.contexts.attention_context.triton.tensor_ops"


class _GatedNorm(torch.nn.Module):
    """mamba_ssm:mamba_ssm/ops/triton/layernorm_gated.py RMSNorm: what is gated is normed, each
    group by itself."""

    def __init__(
        self, hidden_size: int, eps: float, group_size: int, norm_before_gate: bool, **made: Any
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, **made))
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate

    def forward(self, hidden: Tensor, gate: Tensor) -> Tensor:
        if self.norm_before_gate:
            raise ValueError("megatron-core norms behind the gate")
        gated = hidden * silu(gate)
        groups = gated.view(*gated.shape[:-1], -1, self.group_size)
        scale = torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.eps)
        normed: Tensor = (groups * scale).flatten(-2) * self.weight
        return normed


def _scan(
    x: Tensor,
    dt: Tensor,
    rates: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    chunk_size: int,
    *,
    D: Tensor,  # noqa: N803 (the kernel's own name)
    dt_bias: Tensor,
    dt_softplus: bool,
    z: Tensor | None,
    **rest: object,
) -> Tensor:
    """mamba_ssm:mamba_ssm/ops/triton/ssd_combined.py mamba_chunk_scan_combined, token by token:
    the state decays by exp(dt * rates), takes in dt * x * inputs and is read by outputs, which
    heads share in groups. Steps have no limit; `z` are gates of what is read."""
    if not dt_softplus or any(rest.values()):
        raise ValueError(f"megatron-core asks for something else: {rest}")
    batch, length, heads, size = x.shape
    per_group = heads // inputs.shape[2]
    steps = softplus(dt + dt_bias)
    state = x.new_zeros(batch, heads, size, inputs.shape[3])
    made: list[Tensor] = []
    for at in range(length):
        step = steps[:, at, :, None]
        into, out = (
            shared[:, at].repeat_interleave(per_group, 1)[:, :, None]
            for shared in (inputs, outputs)
        )
        decay = torch.exp(step * rates[:, None])
        state = state * decay[..., None] + (step * x[:, at])[..., None] * into
        made.append((state * out).sum(-1) + D[:, None] * x[:, at])
    read = torch.stack(made, 1)
    return read if z is None else read * silu(z)


@contextmanager
def _kernels() -> Iterator[None]:
    """While megatron-core's modules are imported, mamba_ssm is there, and Triton not wanted."""
    scans = ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined")
    for_inference = ("tensor_get_slice_after", "tensor_masked_update", "tensor_merge")
    kernels: dict[str, dict[str, object]] = {
        "mamba_ssm": {},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": _GatedNorm},
        "mamba_ssm.ops.triton.ssd_combined": dict.fromkeys(scans, _scan),
        _TRITON: dict.fromkeys(for_inference),
    }
    made = {name: ModuleType(name) for name in kernels}
    for name, members in kernels.items():
        made[name].__dict__.update(members)
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def build_hybrid(spec: Spec, args: dict[str, Any], config: TransformerConfig) -> torch.nn.Module:
    """This rank's MambaModel."""
    with _kernels():
        from megatron.core.models.mamba import MambaModel
        from megatron.core.ssm import mamba_block, mamba_mixer  # noqa: F401 (for `_stack`)
    CudaRNGStatesTracker.fork = lambda *_: nullcontext()  # there is nothing random
    mamba_block.TENorm = WrappedTorchNorm
    moe_layer.HAVE_TE, moe_layer.TELinear = True, _whole_linear
    model: torch.nn.Module = MambaModel(
        config=config,
        mamba_stack_spec=_stack(spec, args),
        vocab_size=spec.padded_vocab_size,
        max_sequence_length=spec.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        hybrid_override_pattern=(spec.pattern or "").replace("P", "*"),
        share_embeddings_and_output_weights=spec.tied,
        position_embedding_type=args["position_embedding_type"],
        rotary_base=args["rotary_base"],
    )
    if spec.family == "falcon_h1":
        falcon.multiply_ends(model, args)
    return model


class _Latent(TELinear):
    """With what TransformerEngine's computes."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return torch.nn.functional.linear(hidden, self.weight), None


def _whole_linear(input_size: int, output_size: int, **rest: Any) -> _Latent:
    return _Latent(input_size, output_size, rest["config"], is_expert=False)


def _stack(spec: Spec, args: dict[str, Any]) -> ModuleSpec:
    """As megatron/core/models/mamba/mamba_layer_specs.py mamba_stack_spec has it."""
    from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer

    def fused(norm: str, linear: str) -> dict[str, str]:
        return {f"{norm}.": f"{linear}.layer_norm_"}

    mixer = ModuleSpec(
        module=MambaMixer,
        submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear),
    )
    mamba = MambaLayerSubmodules(
        norm=WrappedTorchNorm,
        mixer=mixer,
        mamba_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=fused("norm", "mixer.in_proj"),
    )
    attention = TransformerLayerSubmodules(
        input_layernorm=WrappedTorchNorm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear,
                core_attention=DotProductAttention,
                linear_proj=RowParallelLinear,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=fused("input_layernorm", "self_attention.linear_qkv"),
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=WrappedTorchNorm,
        mlp=ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        ),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=fused("pre_mlp_layernorm", "mlp.linear_fc1"),
    )
    experts = TransformerLayerSubmodules(
        pre_mlp_layernorm=WrappedTorchNorm,
        mlp=get_moe_module_spec(use_te=False, num_experts=spec.experts, moe_grouped_gemm=False),
        mlp_bda=get_bias_dropout_add,
    )
    attention_layer = ModuleSpec(module=TransformerLayer, submodules=attention)
    if spec.family == "falcon_h1":
        both = replace(
            attention,
            pre_mlp_layernorm=mlp.pre_mlp_layernorm,
            mlp=mlp.mlp,
            sharded_state_dict_keys_map=mlp.sharded_state_dict_keys_map,
        )
        attention_layer = ModuleSpec(
            module=falcon.ParallelLayer, submodules=both, params={"mixer": mixer, "args": args}
        )
    return ModuleSpec(
        module=MambaStack,
        submodules=MambaStackSubmodules(
            mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
            attention_layer=attention_layer,
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
            moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=experts),
        ),
    )
