"""Attention over query groups.

Formulas: Megatron-LM:megatron/core/transformer/attention.py; checked against
Megatron-Bridge:src/megatron/bridge/models/conversion/param_mapping.py.
"""

from __future__ import annotations

from dataclasses import replace

from mcorefs.mapping.blocks.model import gamma
from mcorefs.mapping.blocks.names import LAYER, MLAYER
from mcorefs.mapping.family import Facts, Rule
from mcorefs.views import Cat, Flatten, Narrow, Unflatten, View

_QKV, _PROJ = MLAYER + "self_attention.linear_qkv.", MLAYER + "self_attention.linear_proj."
QKV_BIAS = "decoder.layers.*.self_attention.linear_qkv.bias"
"""The kind of tensor that models with biases in attention hold."""


def _grouped(view: View, facts: Facts, first: int, count: int) -> View:
    """Heads [first, first + count) of every query group of linear_qkv.

    Its rows are, per group, `heads / groups` query heads, one key head, one value head.
    """
    groups, head_dim = facts.dims["groups"], facts.dims["head_dim"]
    rows = Unflatten(view, 0, (groups, (_per_group(facts) + 2) * head_dim))
    return Flatten(Narrow(rows, 1, first * head_dim, count * head_dim), 0, 2)


def _per_group(facts: Facts) -> int:
    return facts.dims["heads"] // facts.dims["groups"]


def query(view: View, facts: Facts) -> View:
    """q_proj from linear_qkv."""
    return _grouped(view, facts, 0, _per_group(facts))


def key(view: View, facts: Facts) -> View:
    """k_proj from linear_qkv."""
    return _grouped(view, facts, _per_group(facts), 1)


def value(view: View, facts: Facts) -> View:
    """v_proj from linear_qkv."""
    return _grouped(view, facts, _per_group(facts) + 1, 1)


def fused_qkv(view: View, facts: Facts) -> View:
    """q, k and v one above the other."""
    return Cat((query(view, facts), key(view, facts), value(view, facts)), 0)


_Q_BIAS = Rule(LAYER + "self_attn.q_proj.bias", _QKV + "bias", ("q_rows",), query)
_K_BIAS = Rule(LAYER + "self_attn.k_proj.bias", _QKV + "bias", ("kv_rows",), key)
_V_BIAS = Rule(LAYER + "self_attn.v_proj.bias", _QKV + "bias", ("kv_rows",), value)
_O_BIAS = Rule(LAYER + "self_attn.o_proj.bias", _PROJ + "bias", ("hidden",))

GQA = (
    Rule(LAYER + "self_attn.q_proj.weight", _QKV + "weight", ("q_rows", "hidden"), query),
    Rule(LAYER + "self_attn.k_proj.weight", _QKV + "weight", ("kv_rows", "hidden"), key),
    Rule(LAYER + "self_attn.v_proj.weight", _QKV + "weight", ("kv_rows", "hidden"), value),
    Rule(LAYER + "self_attn.o_proj.weight", _PROJ + "weight", ("hidden", "q_rows")),
)
GQA_QKV_BIAS = (GQA[0], _Q_BIAS, GQA[1], _K_BIAS, GQA[2], _V_BIAS, GQA[3])
"""With biases on q, k and v (--add-qkv-bias)."""
GQA_ALL_OR_NO_BIAS = (
    *(replace(rule, when=QKV_BIAS if rule.hf.endswith(".bias") else "") for rule in GQA_QKV_BIAS),
    replace(_O_BIAS, when=QKV_BIAS),
)
"""With biases on q, k, v and o (--add-bias-linear), or with none."""

QK_NORM = (
    Rule(
        LAYER + "self_attn.q_norm.weight",
        MLAYER + "self_attention.q_layernorm.weight",
        ("head_dim",),
        gamma,
    ),
    Rule(
        LAYER + "self_attn.k_norm.weight",
        MLAYER + "self_attention.k_layernorm.weight",
        ("head_dim",),
        gamma,
    ),
)
"""Norms of each query and key head."""
