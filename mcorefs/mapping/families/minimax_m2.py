"""MiniMax-M2, M2.5 and M2.7: experts in every layer, a router of sigmoids with a bias for each
expert, norms of all query heads and of all key heads together, part of each head rotated.

megatron-core has no such norms: Megatron-Bridge (src/megatron/bridge/models/minimax_m2/
minimax_m2_provider.py) has them where core has those of each head, ms-swift (mcore-bridge:
src/mcore_bridge/model/gpts/minimax_m2.py) and slime beside them. None trains the hub's layers for
multi-token prediction.
"""

from __future__ import annotations

from dataclasses import replace

from mcorefs.mapping.blocks.attention import GQA, WHOLE_QK_NORM
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    GQA_KEYS,
    PARTIAL_ROTARY,
    arg,
    constant,
    decoder_requires,
    dim,
)
from mcorefs.mapping.blocks.mlp import expert_bias, gated_experts, router
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.blocks.names import MLAYER
from mcorefs.mapping.blocks.routing import (
    AUX_LOSS_COEF,
    FREE_SIGMOID_REQUIRES,
    no_sinkhorn,
    several_experts,
)
from mcorefs.mapping.family import Facts, Family, Key, Proven

_NORMS = tuple(
    replace(rule, source=(*rule.sources, f"{MLAYER}self_attention.{x}_norm.weight"), shape=(rows,))
    for x, rows, rule in zip("qk", ("q_rows", "kv_rows"), WHOLE_QK_NORM, strict=True)
)
_MOE = "block_sparse_moe."


def _rotary_dim(facts: Facts) -> int | None:
    share, head_dim = facts.arg("rotary_percent"), facts.dims.get("head_dim")
    if head_dim is None or not isinstance(share, int | float):
        return None
    return int(head_dim * share)


MINIMAX_M2 = Family(
    name="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    rules=(
        EMBED,
        *GQA,
        *_NORMS,
        *gated_experts(_MOE + "experts.{expert}.", ("w1", "w3", "w2"), fused="mlp.experts."),
        router(_MOE + "gate.weight", sorts_as="mlp.gate.weight"),
        expert_bias(_MOE + "e_score_correction_bias", sorts_as="mlp.e_score_correction_bias"),
        *LAYER_NORMS,
        NORM,
        HEAD,
    ),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        "intermediate_size": dim("moe_ffn"),
        "num_local_experts": dim("experts", "num_experts"),
        "num_experts_per_tok": arg("moe_router_topk"),
        "partial_rotary_factor": PARTIAL_ROTARY,
        "router_aux_loss_coef": AUX_LOSS_COEF,
        "router_jitter_noise": constant(0.0),
        "output_router_logits": constant(False),
        # What other code than transformers' asks for.
        "rotary_dim": Key(_rotary_dim),
        "scoring_func": Key(lambda facts: "sigmoid"),
        "use_routing_bias": Key(lambda facts: True),
        "use_qk_norm": Key(lambda facts: True),
        "qk_norm_type": Key(lambda facts: "per_layer"),
        "use_mtp": Key(lambda facts: Proven(False)),
        "num_mtp_modules": Key(lambda facts: Proven(0)),
    },
    requires={
        **decoder_requires("rotary_percent"),
        **FREE_SIGMOID_REQUIRES,
        "moe_router_topk_scaling_factor": (1, 1.0),
    },
    checks=(no_sinkhorn, several_experts),
    natural_order=True,
)
