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

from .spec import Spec
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
    chosen: tuple[Tensor, Tensor]
    """By the last indexer that there was."""

    def __init__(self, *args: Any, interleaved: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.interleaved = interleaved

    def forward_with_scores(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        _Indexer.chosen = super().forward_with_scores(*args, **kwargs)
        return _Indexer.chosen

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


class _SlimesIndexer(_Indexer):
    """slime:slime_plugins/models/glm5/glm5.py rotates as megatron-core 0.16.1 does: neighbours, in
    the last part of each head."""

    def _apply_rope(self, x: Tensor, rotary_pos_emb: Tensor, mscale: float) -> Tensor:
        rotated: Tensor = dsa.DSAIndexer._apply_rope(self, x, rotary_pos_emb, mscale)
        return rotated


class _SharedChoice(nn.Module):
    """In place of an indexer, what the one before chose (since megatron-core 0.19)."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward_with_scores(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return _Indexer.chosen


SLIMES_NAMES = {
    **{
        f"self_attention.core_attention.indexer.{name}.": f"self_attention.{hf}."
        for name, hf in (
            ("linear_wq_b", "wq_b"),
            ("linear_wk", "wk"),
            ("k_norm", "k_norm"),
            ("linear_weights_proj", "weights_proj"),
        )
    },
    **{
        f"self_attention.{latent}_layernorm.": f"self_attention.linear_{latent}_up_proj.layer_norm_"
        for latent in ("q", "kv")
    },
}
"""Its norms of latents are part of the linear layers behind, as in any latent attention."""


def with_indexers(
    spec: Spec, args: dict[str, Any], layers: list[ModuleSpec], first: int
) -> list[ModuleSpec]:
    """`layers`, from number `first` on, with sparse attention, as get_dsa_module_spec_for_backend
    has it."""
    dsa.rotate_activation = _rotate_activation
    submodules = dsa.DSAIndexerSubmodules(
        linear_wq_b=_Linear, linear_wk=_Linear, k_norm=WrappedTorchNorm, linear_weights_proj=_Linear
    )
    indexer = ModuleSpec(
        module=_SlimesIndexer if spec.slime_indexers else _Indexer,
        params={"interleaved": args["dsa_indexer_rope_interleaved"]},
        submodules=submodules,
    )
    shared = ModuleSpec(module=_SharedChoice)
    names = SLIMES_NAMES if spec.slime_indexers else {}
    return [
        _with_indexer(layer, shared if number % spec.index_every else indexer, names)
        for number, layer in enumerate(layers, first)
    ]


def _with_indexer(layer: ModuleSpec, indexer: ModuleSpec, names: dict[str, str]) -> ModuleSpec:
    core = ModuleSpec(module=dsa.DSAttention, submodules=dsa.DSAttentionSubmodules(indexer=indexer))
    attention = layer.submodules.self_attention
    attention = replace(attention, submodules=replace(attention.submodules, core_attention=core))
    names = {**layer.submodules.sharded_state_dict_keys_map, **names}
    submodules = replace(
        layer.submodules, self_attention=attention, sharded_state_dict_keys_map=names
    )
    return replace(layer, submodules=submodules)
