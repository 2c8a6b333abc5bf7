"""megatron-core's own gated delta nets without the kernels of flash-linear-attention.

The module takes those without asking, but for `deterministic_mode` has a chunked rule in torch,
which stands in for the kernel here. Only the norm of queries and keys is written anew.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_linear_attention_pattern,
)
from megatron.core.ssm import gated_delta_net
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor


def _l2norm(vectors: Tensor) -> Tensor:
    """flash-linear-attention:fla/modules/l2norm.py, with its eps."""
    return vectors * torch.rsqrt(vectors.pow(2).sum(-1, keepdim=True) + 1e-6)


def with_delta_nets(
    config: TransformerConfig, layers: list[ModuleSpec], first: int
) -> list[ModuleSpec]:
    """`layers`, from number `first` on, with gated delta nets where their attention is linear.

    As get_transformer_block_with_experimental_attention_variant_spec has them with
    TransformerEngine, under the names that its layers are saved under.
    """
    gated_delta_net.HAVE_FLA = True
    gated_delta_net.l2norm = _l2norm
    gated_delta_net.chunk_gated_delta_rule = gated_delta_net.torch_chunk_gated_delta_rule
    linear = get_linear_attention_pattern(config)
    return [
        _with_delta_net(layer) if linear[number] else layer
        for number, layer in enumerate(layers, first)
    ]


def _with_delta_net(layer: ModuleSpec) -> ModuleSpec:
    mixer = ModuleSpec(
        module=gated_delta_net.GatedDeltaNet,
        submodules=gated_delta_net.GatedDeltaNetSubmodules(
            in_proj=ColumnParallelLinear, out_norm=WrappedTorchNorm, out_proj=RowParallelLinear
        ),
    )
    names = {
        **layer.submodules.sharded_state_dict_keys_map,
        "input_layernorm.": "self_attention.in_proj.layer_norm_",
    }
    submodules = replace(layer.submodules, self_attention=mixer, sharded_state_dict_keys_map=names)
    return replace(layer, submodules=submodules)
