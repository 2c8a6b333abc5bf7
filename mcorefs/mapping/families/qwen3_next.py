"""Qwen3-Next: gated delta nets with gated attention between them, norms around zero, many experts
and a shared one with a gate, a layer for multi-token prediction."""

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
from mcorefs.mapping.blocks.mtp import NEXTN_KEYS, mtp_apart, one_around_all
from mcorefs.mapping.blocks.routing import (
    AUX_LOSS_COEF,
    SOFTMAX_NORM_TOPK_PROB,
    SOFTMAX_REQUIRES,
    SPARSE_LAYER_KEYS,
    no_sinkhorn,
)
from mcorefs.mapping.family import Facts, Family


def halves_in_known_order(facts: Facts) -> str | None:
    """Check: the columns of eh_proj lie as megatron-core and transformers use them.

    slime swaps their halves when it loads Hugging Face's and when it exports, though its
    megatron-core is not changed to match, and only where it does that itself, not by a bridge
    (slime:slime/backends/megatron_utils/{hf_to_megatron,megatron_to_hf}/qwen3_next.py).
    """
    if not facts.dims.get("mtp") or facts.arg("hf_checkpoint") is None:
        return None
    return (
        "slime trained it, which swaps the halves of mtp.layers.0.eh_proj of a Qwen3-Next, or does "
        "not, and nothing tells which: --no-mtp serves the model without it"
    )


_LAYER = (
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
)

QWEN3_NEXT = Family(
    name="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    rules=(EMBED, *_LAYER, *at_zero(NORM), HEAD, *mtp_apart(_LAYER)),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        **HYBRID_KEYS,
        **NEXTN_KEYS,
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
    checks=(no_sinkhorn, *HYBRID_CHECKS, one_around_all, halves_in_known_order),
    natural_order=True,
)
