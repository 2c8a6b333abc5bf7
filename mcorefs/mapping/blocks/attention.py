"""Attention over query groups.

Formulas: Megatron-LM:megatron/core/transformer/attention.py; checked against
Megatron-Bridge:src/megatron/bridge/models/conversion/param_mapping.py.
"""

from __future__ import annotations

from dataclasses import replace

from mcorefs.mapping.blocks.model import gamma
from mcorefs.mapping.blocks.names import LAYER, MLAYER
from mcorefs.mapping.family import Block, Facts, Rule
from mcorefs.views import Cat, Flatten, Narrow, Permute, Unflatten, View

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


def in_halves(view: View, facts: Facts) -> View:
    """Rows (or elements) of heads in the order of most transformers models, which rotate element i
    of a head together with element i + n / 2 of the n that rotate; with --rotary-interleaved
    Megatron has the two side by side (Megatron-LM:megatron/core/models/common/embeddings/
    rope_utils.py _rotate_half)."""
    if not facts.arg("rotary_interleaved") or "positions" in facts.dims:
        return view
    head_dim, share = facts.dims["head_dim"], facts.arg("rotary_percent")
    rotated = int(head_dim * share) if isinstance(share, int | float) and share < 1 else head_dim
    heads = Unflatten(view, 0, (view.shape[0] // head_dim, head_dim))
    pairs = Unflatten(Narrow(heads, 1, 0, rotated), 1, (rotated // 2, 2))
    halves = Flatten(Permute(pairs, (0, 2, 1, *range(3, len(pairs.shape)))), 1, 2)
    rest = Narrow(heads, 1, rotated, head_dim - rotated)
    return Flatten(Cat((halves, rest), 1) if rotated < head_dim else halves, 0, 2)


def query(view: View, facts: Facts) -> View:
    """q_proj from linear_qkv."""
    return in_halves(query_as_stored(view, facts), facts)


def key(view: View, facts: Facts) -> View:
    """k_proj from linear_qkv."""
    return in_halves(key_as_stored(view, facts), facts)


def query_as_stored(view: View, facts: Facts) -> View:
    """`query`, of models that rotate the same elements of a head together as Megatron."""
    return _grouped(view, facts, 0, _per_group(facts))


def key_as_stored(view: View, facts: Facts) -> View:
    """`key`, likewise."""
    return _grouped(view, facts, _per_group(facts), 1)


def value(view: View, facts: Facts) -> View:
    """v_proj from linear_qkv."""
    return _grouped(view, facts, _per_group(facts) + 1, 1)


def fused_qkv(view: View, facts: Facts) -> View:
    """q, k and v one above the other."""
    return Cat((query(view, facts), key(view, facts), value(view, facts)), 0)


def as_stored(*rules: Rule) -> tuple[Rule, ...]:
    """Rules of attention in models that rotate neighbours too."""
    kept: dict[Block, Block] = {query: query_as_stored, key: key_as_stored}
    return tuple(replace(rule, block=kept.get(rule.block, rule.block)) for rule in rules)


def head_gamma(view: View, facts: Facts) -> View:
    """The weight of a norm of heads."""
    return in_halves(gamma(view, facts), facts)


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
GQA_ALL_BIAS = (*GQA_QKV_BIAS, _O_BIAS)
"""With biases on q, k, v and o (--add-bias-linear)."""
GQA_QKV_OR_NO_BIAS = tuple(
    replace(rule, when=QKV_BIAS if rule.hf.endswith(".bias") else "") for rule in GQA_QKV_BIAS
)
"""With biases on q, k and v, or with none."""
GQA_ALL_OR_NO_BIAS = (*GQA_QKV_OR_NO_BIAS, replace(_O_BIAS, when=QKV_BIAS))
"""With biases on q, k, v and o (--add-bias-linear), or with none."""

SINKS = Rule(
    LAYER + "self_attn.sinks", MLAYER + "self_attention.core_attention.softmax_offset", ("heads",)
)
"""How much each head attends to nothing (--softmax-type learnable)."""

_Q_NORM, _K_NORM = (MLAYER + f"self_attention.{x}_layernorm.weight" for x in "qk")
QK_NORM = (
    Rule(LAYER + "self_attn.q_norm.weight", _Q_NORM, ("head_dim",), head_gamma),
    Rule(LAYER + "self_attn.k_norm.weight", _K_NORM, ("head_dim",), head_gamma),
)
"""Norms of each query and key head."""
QK_NORM_AT_ZERO = tuple(replace(rule, block=in_halves) for rule in QK_NORM)
"""Likewise, of models that hold their weights around zero on both sides."""
QK_NORM_WEIGHT = "decoder.layers.*.self_attention.q_layernorm.weight"
"""The kind of tensor that models with norms of heads hold."""
QK_NORM_OR_NONE = tuple(replace(rule, when=QK_NORM_WEIGHT) for rule in QK_NORM)
WHOLE_QK_NORM = tuple(
    Rule(
        f"{LAYER}self_attn.{x}_norm.weight",
        (f"{MLAYER}self_attention.{x}_layernorm.weight", f"{MLAYER}self_attention.{x}_norm.weight"),
        (size,),
        head_gamma,
    )
    for x, size in (("q", "hidden"), ("k", "kv_rows"))
)
"""Norms of all query heads together, which fill the hidden size, and of all key heads."""
