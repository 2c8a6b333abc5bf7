"""OLMoE: experts in every layer, and norms of all query heads and of all key heads together.

megatron-core has no such norms: Megatron-Bridge and ms-swift bring attention modules of their own
(Megatron-Bridge:src/megatron/bridge/models/olmoe/olmoe_provider.py, mcore-bridge:src/mcore_bridge/
model/gpts/olmoe.py). Up to mcore-bridge 1.4, ms-swift calls the norms as Megatron-Bridge does, but
its linear_qkv is q, k and v one above the other; then it calls them q_norm and k_norm, and its
linear_qkv is megatron-core's.
"""

from __future__ import annotations

from dataclasses import replace

from mcorefs.mapping.blocks.attention import GQA, QK_NORM_WEIGHT, WHOLE_QK_NORM, in_halves
from mcorefs.mapping.blocks.keys import BASE_KEYS, DECODER_REQUIRES, GQA_KEYS, arg, constant, dim
from mcorefs.mapping.blocks.mlp import gated_experts, router
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.blocks.routing import (
    AUX_LOSS_COEF,
    SOFTMAX_NORM_TOPK_PROB,
    SOFTMAX_REQUIRES,
    no_sinkhorn,
)
from mcorefs.mapping.family import Facts, Family, Rule
from mcorefs.views import Narrow, View


def _has_rows_apart(facts: Facts) -> bool:
    """Whether q, k and v lie one above the other: in what ms-swift trained, which is known by how
    it trains, with norms by the names that it began with."""
    of_swift = facts.arg("tuner_type", "train_type") is not None
    return of_swift and QK_NORM_WEIGHT in facts.kinds


def _apart(rule: Rule, section: str) -> Rule:
    """`rule`, of which the rows may be those of one section of linear_qkv."""

    def made(view: View, facts: Facts) -> View:
        if not _has_rows_apart(facts):
            return rule.block(view, facts)
        queries, keys = facts.dims["q_rows"], facts.dims["kv_rows"]
        start = {"q": 0, "k": queries, "v": queries + keys}[section]
        rows = Narrow(view, 0, start, queries if section == "q" else keys)
        return rows if section == "v" else in_halves(rows, facts)

    return replace(rule, block=made)


def rows_of_one_rank(facts: Facts) -> str | None:
    """Check: no tensor-parallel ranks each took rows of q, k and v for their own q, k and v, as
    they do of those that lie one above the other."""
    if not _has_rows_apart(facts) or facts.arg("tensor_model_parallel_size") == 1:
        return None
    return (
        "ms-swift trained it before each tensor-parallel rank had its own rows of q, k and v in "
        "linear_qkv of OLMoE, and not with tensor_model_parallel_size=1: which rows are which "
        "cannot be told"
    )


_Q, _K, _V, _O = GQA
OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    rules=(
        EMBED,
        *(_apart(rule, section) for rule, section in zip((_Q, _K, _V), "qkv", strict=True)),
        _O,
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
    checks=(no_sinkhorn, rows_of_one_rank),
    natural_order=True,
)
