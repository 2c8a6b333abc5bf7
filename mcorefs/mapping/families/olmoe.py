"""OLMoE: experts in every layer, and norms of all query heads and of all key heads together.

megatron-core has no such norms: Megatron-Bridge and ms-swift bring attention modules of their own
(Megatron-Bridge:src/megatron/bridge/models/olmoe/olmoe_provider.py, mcore-bridge:src/mcore_bridge/
model/gpts/olmoe.py). They call their parameters alike, but do not lay out linear_qkv alike.
"""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA, WHOLE_QK_NORM
from mcorefs.mapping.blocks.keys import BASE_KEYS, DECODER_REQUIRES, GQA_KEYS, arg, constant, dim
from mcorefs.mapping.blocks.mlp import gated_experts, router
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.blocks.routing import (
    AUX_LOSS_COEF,
    SOFTMAX_NORM_TOPK_PROB,
    SOFTMAX_REQUIRES,
    no_sinkhorn,
)
from mcorefs.mapping.family import Facts, Family


def _of_ms_swift(facts: Facts) -> str | None:
    """Check: ms-swift's module has q, k and v one above the other, in a tensor of the same name and
    shape. Its arguments are known by how it trains."""
    if facts.arg("tuner_type", "train_type") is None:
        return None
    return (
        "ms-swift trained it, whose linear_qkv of OLMoE is q, k and v one above the other: that is "
        "not supported yet"
    )


OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    rules=(
        EMBED,
        *GQA,
        *WHOLE_QK_NORM,
        *gated_experts("mlp.experts.{expert}."),
        router("mlp.gate.weight"),
        *LAYER_NORMS,
        NORM,
        HEAD,
    ),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        "intermediate_size": dim("moe_ffn"),
        "attention_bias": constant(False),
        "clip_qkv": constant(None),
        "num_experts": dim("experts", "num_local_experts"),
        "num_experts_per_tok": arg("moe_router_topk"),
        "norm_topk_prob": SOFTMAX_NORM_TOPK_PROB,
        "router_aux_loss_coef": AUX_LOSS_COEF,
        "output_router_logits": constant(False),
    },
    requires={**DECODER_REQUIRES, **SOFTMAX_REQUIRES},
    checks=(no_sinkhorn, _of_ms_swift),
    natural_order=True,
)
