"""What DeepSeek-V2, DeepSeek-V3 and the models built like them have in common."""

from __future__ import annotations

from collections.abc import Mapping

from mcorefs.mapping.blocks.keys import constant, dim
from mcorefs.mapping.blocks.mla import MLA, MLA_KEYS, yarn_expressed
from mcorefs.mapping.blocks.mlp import GATED_MLP, gated_experts, router, shared_experts
from mcorefs.mapping.blocks.model import LAYER_NORMS
from mcorefs.mapping.blocks.routing import (
    FIRST_K_DENSE,
    N_SHARED_EXPERTS,
    SIGMOID_KEYS,
    leading_dense,
    no_sinkhorn,
    whole_shared_experts,
)
from mcorefs.mapping.family import Check, Key

DEEPSEEK_MLP = (
    *GATED_MLP,
    *gated_experts("mlp.experts.{expert}."),
    router("mlp.gate.weight"),
    *shared_experts("mlp.shared_experts."),
    *LAYER_NORMS,
)
"""What a layer holds but its attention."""
DEEPSEEK_LAYER = (*MLA, *DEEPSEEK_MLP)
DEEPSEEK_KEYS: Mapping[str, Key] = {
    **MLA_KEYS,
    **SIGMOID_KEYS,
    "n_routed_experts": dim("experts", "num_local_experts", "num_experts"),
    "n_shared_experts": N_SHARED_EXPERTS,
    "moe_intermediate_size": dim("moe_ffn"),
    "first_k_dense_replace": FIRST_K_DENSE,
    "moe_layer_freq": Key(lambda facts: 1),
    "output_router_logits": constant(False),
}
DEEPSEEK_CHECKS: tuple[Check, ...] = (
    yarn_expressed,
    leading_dense,
    whole_shared_experts,
    no_sinkhorn,
)
