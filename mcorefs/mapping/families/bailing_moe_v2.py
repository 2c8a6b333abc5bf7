"""Ling 2.0 and its kin (Bailing MoE v2): q, k and v in one tensor, norms of heads, the first layers
dense, then experts with shared ones and a router of sigmoids with a bias for each expert; layers
for multi-token prediction.

transformers has no class of it: the hub's repository has code, which config.json names if a
reference does. Names, and what they are made of: Megatron-Bridge:src/megatron/bridge/models/
bailing/.
"""

from __future__ import annotations

from dataclasses import replace

from mcorefs.mapping.blocks.attention import GQA, QK_NORM, QKV_BIAS, fused_qkv
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    GQA_KEYS,
    PARTIAL_ROTARY,
    constant,
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
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM, gamma
from mcorefs.mapping.blocks.mtp import NEXTN_KEYS, inside
from mcorefs.mapping.blocks.names import LAYER, MLAYER
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
from mcorefs.mapping.family import Family, Key, Rule

_AT, _QKV = LAYER + "attention.", MLAYER + "self_attention.linear_qkv."
_NORMS = tuple(
    replace(rule, hf=f"{_AT}{name}_layernorm.weight")
    for name, rule in zip(("query", "key"), QK_NORM, strict=True)
)
_ATTENTION = (
    Rule(_AT + "query_key_value.weight", _QKV + "weight", ("qkv_rows", "hidden"), fused_qkv),
    Rule(_AT + "query_key_value.bias", _QKV + "bias", ("qkv_rows",), fused_qkv, when=QKV_BIAS),
    *_NORMS,
    replace(GQA[-1], hf=_AT + "dense.weight"),
)
_EXPERTS = (
    *(replace(rule, sorts_as="") for rule in gated_experts("mlp.experts.{expert}.")),
    router("mlp.gate.weight"),
    expert_bias("mlp.gate.expert_bias"),
    *shared_experts("mlp.shared_experts."),
)


def _norm(name: str) -> Rule:
    source = f"mtp.layers.{{mtp}}.{name}.weight"
    return Rule(f"{LAYER}{name}.weight", source, ("hidden",), gamma, stack="mtp")


BAILING_MOE_V2 = Family(
    name="bailing_moe_v2",
    architecture="BailingMoeV2ForCausalLM",
    rules=(
        replace(EMBED, hf="model.word_embeddings.weight"),
        *_ATTENTION,
        *GATED_MLP,
        *_EXPERTS,
        *LAYER_NORMS,
        inside(LAYER_NORMS[0]),
        _norm("enorm"),
        Rule(
            LAYER + "eh_proj.weight",
            "mtp.layers.{mtp}.eh_proj.weight",
            ("hidden", "mtp_columns"),
            stack="mtp",
        ),
        inside(LAYER_NORMS[1]),
        *map(inside, (*_ATTENTION, *GATED_MLP, *_EXPERTS)),
        _norm("hnorm"),
        _norm("final_layernorm"),
        NORM,
        HEAD,
    ),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        **SIGMOID_KEYS,
        **NEXTN_KEYS,
        "partial_rotary_factor": PARTIAL_ROTARY,
        "use_qkv_bias": holds(QKV_BIAS),
        "use_bias": Key(lambda facts: False),
        "use_qk_norm": Key(lambda facts: True),
        "num_experts": dim("experts"),
        "num_shared_experts": N_SHARED_EXPERTS,
        "moe_intermediate_size": dim("moe_ffn"),
        "first_k_dense_replace": FIRST_K_DENSE,
        "moe_router_enable_expert_bias": Key(lambda facts: True),
        "score_function": Key(lambda facts: "sigmoid"),
        "embedding_dropout": constant(0.0),
        "output_dropout": constant(0.0),
        "output_router_logits": constant(False),
    },
    requires={**decoder_requires("add_qkv_bias", "rotary_percent"), **SIGMOID_REQUIRES},
    checks=(no_sinkhorn, leading_dense, whole_shared_experts, best_two_of_each_group),
    named_only=True,
    has_own_code=True,
)
