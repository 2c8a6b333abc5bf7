"""GLM-4.5, 4.6 and 4.7 (not Flash): part of each head rotates, the first layers are dense, a router
of sigmoids with a bias for each expert, shared experts, a layer for multi-token prediction. The
large ones have norms of heads."""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import (
    GQA_QKV_OR_NO_BIAS,
    QK_NORM_OR_NONE,
    QK_NORM_WEIGHT,
    QKV_BIAS,
)
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    GQA_KEYS,
    arg,
    decoder_requires,
    dim,
    holds,
)
from mcorefs.mapping.blocks.mlp import (
    GATED_MLP,
    expert_bias,
    gated_experts,
    router,
    shared_experts,
)
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.blocks.mtp import NEXTN_KEYS, mtp_behind
from mcorefs.mapping.blocks.routing import (
    FIRST_K_DENSE,
    N_SHARED_EXPERTS,
    SIGMOID_KEYS,
    SIGMOID_REQUIRES,
    best_two_of_each_group,
    leading_dense,
    no_sinkhorn,
    whole_shared_experts,
)
from mcorefs.mapping.family import Family

_LAYER = (
    *GQA_QKV_OR_NO_BIAS,
    *QK_NORM_OR_NONE,
    *GATED_MLP,
    *gated_experts("mlp.experts.{expert}."),
    router("mlp.gate.weight"),
    expert_bias("mlp.gate.e_score_correction_bias"),
    *shared_experts("mlp.shared_experts."),
    *LAYER_NORMS,
)

GLM4_MOE = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    rules=(EMBED, *_LAYER, NORM, *mtp_behind(_LAYER), HEAD),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        **SIGMOID_KEYS,
        **NEXTN_KEYS,
        "attention_bias": holds(QKV_BIAS),
        "use_qk_norm": holds(QK_NORM_WEIGHT),
        "partial_rotary_factor": arg("rotary_percent"),
        "n_routed_experts": dim("experts", "num_local_experts"),
        "n_shared_experts": N_SHARED_EXPERTS,
        "moe_intermediate_size": dim("moe_ffn"),
        "first_k_dense_replace": FIRST_K_DENSE,
    },
    requires={**decoder_requires("add_qkv_bias", "rotary_percent"), **SIGMOID_REQUIRES},
    checks=(no_sinkhorn, leading_dense, whole_shared_experts, best_two_of_each_group),
    natural_order=True,
)
