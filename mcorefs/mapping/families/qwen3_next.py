"""Qwen3-Next: gated delta nets with gated attention between them, norms around zero, many experts
and a shared one with a gate. Without multi-token prediction."""

from __future__ import annotations

from mcorefs.mapping.blocks.delta_net import (
    DELTA_NET,
    FULL_QK_NORM,
    GATED_GQA,
    HYBRID_CHECKS,
    HYBRID_KEYS,
    HYBRID_NORMS,
    HYBRID_REQUIRES,
    in_proj,
    in_turns,
)
from mcorefs.mapping.blocks.keys import BASE_KEYS, GQA_KEYS, arg, constant, dim
from mcorefs.mapping.blocks.mlp import (
    GATED_MLP,
    gated_experts,
    router,
    shared_expert_gate,
    shared_experts,
)
from mcorefs.mapping.blocks.model import EMBED, HEAD, NORM, at_zero
from mcorefs.mapping.blocks.routing import (
    AUX_LOSS_COEF,
    SOFTMAX_NORM_TOPK_PROB,
    SOFTMAX_REQUIRES,
    SPARSE_LAYER_KEYS,
    no_sinkhorn,
)
from mcorefs.mapping.family import Family

QWEN3_NEXT = Family(
    name="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    rules=(
        EMBED,
        *DELTA_NET,
        in_proj("in_proj_qkvz", "linear_qkvz", in_turns("qkvz")),
        in_proj("in_proj_ba", "linear_ba", in_turns("ba")),
        *GATED_GQA,
        *FULL_QK_NORM,
        *GATED_MLP,
        *gated_experts("mlp.experts.{expert}."),
        router("mlp.gate.weight"),
        *shared_experts("mlp.shared_expert."),
        shared_expert_gate("mlp.shared_expert_gate.weight"),
        *HYBRID_NORMS,
        *at_zero(NORM),
        HEAD,
    ),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        **HYBRID_KEYS,
        "attention_bias": constant(False),
        "num_experts": dim("experts", "num_local_experts"),
        "num_experts_per_tok": arg("moe_router_topk"),
        "moe_intermediate_size": dim("moe_ffn"),
        "shared_expert_intermediate_size": dim("shared_ffn"),
        "norm_topk_prob": SOFTMAX_NORM_TOPK_PROB,
        **SPARSE_LAYER_KEYS,
        "router_aux_loss_coef": AUX_LOSS_COEF,
        "output_router_logits": constant(False),
    },
    requires={**HYBRID_REQUIRES, **SOFTMAX_REQUIRES},
    checks=(no_sinkhorn, *HYBRID_CHECKS),
    natural_order=True,
)
