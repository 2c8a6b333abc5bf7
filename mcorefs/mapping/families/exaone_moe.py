"""K-EXAONE: the windows of EXAONE 4, norms before attention and MLP, the first layers dense, then
experts with shared ones and a router of sigmoids with a bias for each expert.

Megatron-Bridge:src/megatron/bridge/models/exaone/exaone_moe/. Its layers for multi-token prediction
have no place here yet.
"""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA, QK_NORM
from mcorefs.mapping.blocks.exaone import HYBRID_WINDOW_KEYS, full_layers_do_not_rotate
from mcorefs.mapping.blocks.keys import BASE_KEYS, GQA_KEYS, constant, decoder_requires, dim
from mcorefs.mapping.blocks.mlp import (
    GATED_MLP,
    expert_bias,
    gated_experts,
    router,
    shared_experts,
)
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.blocks.mtp import NEXTN_KEYS
from mcorefs.mapping.blocks.routing import (
    FIRST_K_DENSE,
    MLP_LAYER_TYPES,
    N_SHARED_EXPERTS,
    SIGMOID_KEYS,
    SIGMOID_REQUIRES,
    best_two_of_each_group,
    leading_dense,
    no_sinkhorn,
    whole_shared_experts,
)
from mcorefs.mapping.family import Facts, Family

_BIAS = "e_score_correction_bias"


def _one_window(facts: Facts) -> str | None:
    """Check: what Megatron-Bridge's layers have of their own is the same for all: windows, and
    limits of what the gates let through, which transformers has none of."""
    limits, windows = facts.arg("swiglu_limits"), facts.arg("sliding_windows")
    if isinstance(limits, list | tuple) and any(limits):
        return f"with swiglu_limits={limits!r} gates are limited, in transformers they are not"
    if not isinstance(windows, list | tuple):
        return None
    common = facts.arg("window_size")
    one = common[0] + 1 if isinstance(common, list | tuple) and common else None
    if set(windows) <= {0, one}:
        return None
    return f"sliding_windows={windows!r} are not all window_size={common!r}: transformers has one"


EXAONE_MOE = Family(
    name="exaone_moe",
    architecture="ExaoneMoeForCausalLM",
    rules=(
        EMBED,
        *GQA,
        *QK_NORM,
        *GATED_MLP,
        *gated_experts("mlp.experts.{expert}."),
        router("mlp.gate.weight"),
        expert_bias(f"mlp.{_BIAS}", sorts_as=f"mlp.gate.{_BIAS}"),
        *shared_experts("mlp.shared_experts."),
        *LAYER_NORMS,
        NORM,
        HEAD,
    ),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        **HYBRID_WINDOW_KEYS,
        **SIGMOID_KEYS,
        **NEXTN_KEYS,
        "num_experts": dim("experts", "num_local_experts"),
        "num_shared_experts": N_SHARED_EXPERTS,
        "moe_intermediate_size": dim("moe_ffn"),
        "mlp_layer_types": MLP_LAYER_TYPES,
        "first_k_dense_replace": FIRST_K_DENSE,
        "output_router_logits": constant(False),
    },
    requires={**decoder_requires("window_size", "no_rope_freq"), **SIGMOID_REQUIRES},
    checks=(
        no_sinkhorn,
        leading_dense,
        whole_shared_experts,
        best_two_of_each_group,
        full_layers_do_not_rotate,
        _one_window,
    ),
    given=("window_size",),
    natural_order=True,
)
