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
    soft_arg,
)
from mcorefs.mapping.blocks.mlp import GATED_MLP, gated_experts, router
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.family import Facts, Family, Key


def _normalised(facts: Facts) -> bool | None:
    """Softmax after top-k gives weights that sum to one; softmax before it does not."""
    before = facts.arg("moe_router_pre_softmax")
    return None if before is None else not before


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
        "norm_topk_prob": Key(_normalised, True),
        "decoder_sparse_step": Key(lambda facts: 1),
        "mlp_only_layers": Key(lambda facts: facts.dense_layers),
        "router_aux_loss_coef": soft_arg("moe_aux_loss_coeff", default=0.001),
        "output_router_logits": constant(False),
    },
    requires={
        **DECODER_REQUIRES,
        "moe_router_score_function": ("softmax",),
        "moe_router_topk_scaling_factor": (1, 1.0),
        "moe_router_num_groups": (),
        "moe_router_group_topk": (),
        "moe_apply_probs_on_input": (False,),
    },
    natural_order=True,
)
