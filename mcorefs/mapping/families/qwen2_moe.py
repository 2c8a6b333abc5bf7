"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 attention, softmax router, a shared expert with a gate."""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA_QKV_BIAS
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    DECODER_REQUIRES,
    FULL_ATTENTION_KEYS,
    GQA_KEYS,
    arg,
    constant,
    dim,
)
from mcorefs.mapping.blocks.mlp import (
    GATED_MLP,
    gated_experts,
    router,
    shared_expert_gate,
    shared_experts,
)
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.blocks.routing import (
    AUX_LOSS_COEF,
    SOFTMAX_NORM_TOPK_PROB,
    SOFTMAX_REQUIRES,
    SPARSE_LAYER_KEYS,
    no_sinkhorn,
)
from mcorefs.mapping.family import Family

QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    rules=(
        EMBED,
        *GQA_QKV_BIAS,
        *GATED_MLP,
        *gated_experts("mlp.experts.{expert}."),
        router("mlp.gate.weight"),
        *shared_experts("mlp.shared_expert."),
        shared_expert_gate("mlp.shared_expert_gate.weight"),
        *LAYER_NORMS,
        NORM,
        HEAD,
    ),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        **FULL_ATTENTION_KEYS,
        "qkv_bias": constant(True),
        "num_experts": dim("experts", "num_local_experts"),
        "num_experts_per_tok": arg("moe_router_topk"),
        "moe_intermediate_size": dim("moe_ffn"),
        "shared_expert_intermediate_size": dim("shared_ffn"),
        "norm_topk_prob": SOFTMAX_NORM_TOPK_PROB,
        **SPARSE_LAYER_KEYS,
        "router_aux_loss_coef": AUX_LOSS_COEF,
        "output_router_logits": constant(False),
    },
    requires={**DECODER_REQUIRES, **SOFTMAX_REQUIRES, "add_qkv_bias": (True,)},
    checks=(no_sinkhorn,),
    natural_order=True,
)
