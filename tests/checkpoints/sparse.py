"""megatron-core's own sparse attention (DSA) without the kernel of fast_hadamard_transform.

Version 0.16.1 has its parameters, their sharding and their use; what it computes of them is not yet
what later versions do (NVIDIA/Megatron-LM pull requests 3026 and 5246), so two things are
as there: the indexer rotates the first part of its heads, by halves unless told otherwise, and it
is given queries behind their norm, which is therefore no part of linear_q_up_proj.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from megatron.core.transformer.experimental_attention_variant import dsa
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor, nn

from .te_linear import TELinear


def _rotate_activation(heads: Tensor) -> Tensor:
    """A Hadamard transform in any precision: orthogonal."""
    size = heads.size(-1)
    matrix = torch.ones(1, 1, dtype=heads.dtype)
    while matrix.size(0) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.matmul(heads, matrix) * float(size**-0.5)


class _Linear(TELinear):
    """`parallel_mode="duplicated"`: the same on every tensor-parallel rank."""

    def __init__(self, input_size: int, output_size: int, config: Any, **_: Any) -> None:
        super().__init__(input_size, output_size, config, is_expert=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.linear(x, self.weight), None


class _Indexer(dsa.DSAIndexer):  # type: ignore[misc]
    def __init__(self, *args: Any, interleaved: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.interleaved = interleaved

    def _apply_rope(self, x: Tensor, rotary_pos_emb: Tensor, mscale: float) -> Tensor:
        size = self.qk_pos_emb_head_dim
        rotated = _apply_rotary_pos_emb_bshd(
            x[..., :size],
            rotary_pos_emb,
            rotary_interleaved=False,
            multi_latent_attention=self.interleaved,
            mscale=mscale,
        )
        return torch.cat([rotated, x[..., size:]], dim=-1)


def with_indexers(layers: list[ModuleSpec], interleaved: bool) -> list[ModuleSpec]:
    """`layers` with sparse attention, as get_dsa_module_spec_for_backend has it."""
    dsa.rotate_activation = _rotate_activation
    indexer = ModuleSpec(
        module=_Indexer,
        params={"interleaved": interleaved},
        submodules=dsa.DSAIndexerSubmodules(
            linear_wq_b=_Linear,
            linear_wk=_Linear,
            k_norm=WrappedTorchNorm,
            linear_weights_proj=_Linear,
        ),
    )
    core = ModuleSpec(module=dsa.DSAttention, submodules=dsa.DSAttentionSubmodules(indexer=indexer))
    return [_with_core(layer, core) for layer in layers]


def _with_core(layer: ModuleSpec, core: ModuleSpec) -> ModuleSpec:
    attention = layer.submodules.self_attention
    attention = replace(attention, submodules=replace(attention.submodules, core_attention=core))
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))
