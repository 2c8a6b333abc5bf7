"""Qwen3-MoE (30B-A3B, 235B-A22B, Coder): Qwen3 attention, softmax router, no shared expert."""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA, QK_NORM, QKV_BIAS
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    DECODER_REQUIRES,
    FULL_ATTENTION_KEYS,
    GQA_KEYS,
    arg,
    constant,
    dim,
    holds,
)
from mcorefs.mapping.blocks.mlp import GATED_MLP, gated_experts, router
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.blocks.routing import (
    AUX_LOSS_COEF,
    SOFTMAX_NORM_TOPK_PROB,
    SOFTMAX_REQUIRES,
    SPARSE_LAYER_KEYS,
    no_sinkhorn,
)
from mcorefs.mapping.family import Family

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rules=(
        EMBED,
        *GQA,
        *QK_NORM,
        *GATED_MLP,
        *gated_experts("mlp.experts.{expert}."),
        router("mlp.gate.weight"),
        *LAYER_NORMS,
        NORM,
        HEAD,
    ),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        **FULL_ATTENTION_KEYS,
        "attention_bias": holds(QKV_BIAS),
        "num_experts": dim("experts", "num_local_experts"),  # as transformers 5 saves it
        "num_experts_per_tok": arg("moe_router_topk"),
        "moe_intermediate_size": dim("moe_ffn"),
        "norm_topk_prob": SOFTMAX_NORM_TOPK_PROB,
        **SPARSE_LAYER_KEYS,
        "router_aux_loss_coef": AUX_LOSS_COEF,
        "output_router_logits": constant(False),
    },
    requires={**DECODER_REQUIRES, **SOFTMAX_REQUIRES},
    checks=(no_sinkhorn,),
    natural_order=True,
)
