"""HunYuan's HY-V3: the first layers dense, then experts with shared ones and a router of sigmoids
with a bias for each expert; norms of heads. All of which GLM-4.5 can have: what is not named is
served as that, under its names, and computes the same."""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA, QK_NORM
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    DECODER_REQUIRES,
    GQA_KEYS,
    arg,
    constant,
    dim,
)
from mcorefs.mapping.blocks.mlp import (
    GATED_MLP,
    expert_bias,
    gated_experts,
    router,
    shared_experts,
)
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.blocks.mtp import NEXTN_KEYS, mtp_without_copies
from mcorefs.mapping.blocks.routing import (
    FIRST_K_DENSE,
    FREE_SIGMOID_REQUIRES,
    MLP_LAYER_TYPES,
    N_SHARED_EXPERTS,
    SIGMOID_KEYS,
    leading_dense,
    no_sinkhorn,
    several_experts,
    whole_shared_experts,
)
from mcorefs.mapping.family import Family, Key

_LAYER = (
    *GQA,
    *QK_NORM,
    *GATED_MLP,
    *gated_experts("mlp.experts.{expert}."),
    router("mlp.router.gate.weight", sorts_as="mlp.gate.weight"),
    expert_bias("mlp.expert_bias", sorts_as="mlp.e_score_correction_bias"),
    *shared_experts("mlp.shared_mlp.", sorts_as="mlp.shared_experts."),
    *LAYER_NORMS,
)

HY_V3 = Family(
    name="hy_v3",
    architecture="HYV3ForCausalLM",
    rules=(EMBED, *_LAYER, NORM, *mtp_without_copies(_LAYER), HEAD),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        **NEXTN_KEYS,
        "attention_bias": Key(lambda facts: False),
        "mlp_bias": Key(lambda facts: False),
        "num_experts": dim("experts", "num_local_experts"),
        "num_experts_per_tok": arg("moe_router_topk"),
        "num_shared_experts": N_SHARED_EXPERTS,
        "moe_intermediate_size": dim("moe_ffn", "expert_hidden_dim"),
        "router_scaling_factor": SIGMOID_KEYS["routed_scaling_factor"],
        "mlp_layer_types": MLP_LAYER_TYPES,
        "enable_moe_fp32_combine": constant(True),  # how sums are rounded
        "output_router_logits": constant(False),
        # What other code than transformers' asks for.
        "first_k_dense_replace": FIRST_K_DENSE,
        "moe_router_use_sigmoid": Key(lambda facts: True),
        "moe_router_enable_expert_bias": Key(lambda facts: True),
        "qk_norm": Key(lambda facts: True),
        "route_norm": Key(lambda facts: True),
    },
    requires={**DECODER_REQUIRES, **FREE_SIGMOID_REQUIRES},
    checks=(no_sinkhorn, leading_dense, whole_shared_experts, several_experts),
    named_only=True,
    natural_order=True,
)
