"""Gated delta nets, and the gated attention between them.

Formulas: Megatron-LM:megatron/core/ssm/gated_delta_net.py, transformer/attention.py
get_query_key_value_tensors; checked against GDNLinearMapping and merge_qkv_weights of
Megatron-Bridge:src/megatron/bridge/models/conversion/param_mapping.py. ms-swift has modules of its
own: rows of its gated delta nets are grouped by key head, their norm is not around zero, and each
gate of its attention lies behind its query
(mcore-bridge:src/mcore_bridge/model/modules/gated_delta_net.py, gated_self_attention.py,
bridge/gpt_bridge.py _set_linear_in_proj).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mcorefs.arithmetic import Add
from mcorefs.mapping.blocks.attention import GQA, QK_NORM_AT_ZERO, key, value
from mcorefs.mapping.blocks.keys import NORMS_AT_ZERO, PARTIAL_ROTARY, decoder_requires, dim
from mcorefs.mapping.blocks.model import at_zero, norm
from mcorefs.mapping.blocks.names import INPUT_NORM, LAYER, MLAYER, MLP_NORM
from mcorefs.mapping.family import Block, Check, Facts, Key, Rule
from mcorefs.views import Cat, Flatten, Narrow, Permute, Unflatten, View

_AT, _HF = MLAYER + "self_attention.", LAYER + "linear_attn."
_IN_PROJ = (_AT + "in_proj.weight.joined", _AT + "in_proj.weight")
_CONV = (_AT + "conv1d.weight.joined", _AT + "conv1d.weight")
_JOINED = "decoder.layers.*.self_attention.in_proj.weight.joined"
_GROUPED = "decoder.layers.*.self_attention.in_proj.weight"
_SWIFT = "tuner_type"
"""An argument that only ms-swift records."""


def _is_of_core(facts: Facts) -> bool:
    """Whether the modules are megatron-core's, or else ms-swift's; see `known_rows`."""
    return _JOINED in facts.kinds


# -- gated attention ------------------------------------------------------------------------------


def _gated_query(view: View, facts: Facts) -> View:
    """q_proj with a gate behind each query head; megatron-core has the gates of a group behind its
    queries, ms-swift as transformers has them."""
    groups, head_dim = facts.dims["groups"], facts.dims["head_dim"]
    per_group = facts.dims["heads"] // groups
    rows = Unflatten(view, 0, (groups, 2 * per_group + 2, head_dim))
    queries = Narrow(rows, 1, 0, 2 * per_group)
    if not _is_of_core(facts):
        return Flatten(queries, 0, 3)
    both = Unflatten(queries, 1, (2, per_group))
    axes = (0, 2, 1, *range(3, len(both.shape)))
    return Flatten(Permute(both, axes), 0, 4)


def _without_gate(block: Block) -> Block:
    """`block` of what linear_qkv is without its gates."""

    def made(view: View, facts: Facts) -> View:
        groups, head_dim = facts.dims["groups"], facts.dims["head_dim"]
        per_group = facts.dims["heads"] // groups
        rows = Unflatten(view, 0, (groups, 2 * per_group + 2, head_dim))
        others = Narrow(rows, 1, per_group, per_group + 2)
        return block(Flatten(others, 0, 3), facts)

    return made


_Q, _K, _V, _O = (replace(rule, layers="full") for rule in GQA)
GATED_GQA = (
    replace(_Q, shape=("gated_q_rows", "hidden"), block=_gated_query),
    replace(_K, block=_without_gate(key)),
    replace(_V, block=_without_gate(value)),
    _O,
)
"""Attention whose output is gated (--attention-output-gate)."""
FULL_QK_NORM = tuple(replace(rule, layers="full") for rule in QK_NORM_AT_ZERO)

# -- gated delta nets -----------------------------------------------------------------------------


def _by_key_head(view: View, facts: Facts) -> Mapping[str, View]:
    """The sections of in_proj or conv1d, their rows by key head: [key heads, rows, ...]."""
    dims = facts.dims
    heads, per_head = dims["linear_key_heads"], dims["linear_key_dim"]
    of_values, one = dims["linear_values"] // heads, dims["linear_value_heads"] // heads
    rows = {"q": per_head, "k": per_head, "v": of_values, "z": of_values, "b": one, "a": one}
    found: dict[str, View] = {}
    at = 0
    for name, count in rows.items():
        if at == view.shape[0]:  # conv1d has but q, k and v
            break
        if _is_of_core(facts):
            found[name] = Unflatten(Narrow(view, 0, at, heads * count), 0, (heads, count))
            at += heads * count
        else:
            grouped = Unflatten(view, 0, (heads, view.shape[0] // heads))
            found[name] = Narrow(grouped, 1, at // heads, count)
            at += heads * count
    return found


def in_turns(sections: str) -> Block:
    """These sections of each key head, one key head after the other."""

    def made(view: View, facts: Facts) -> View:
        found = _by_key_head(view, facts)
        return Flatten(Cat(tuple(found[name] for name in sections), 1), 0, 2)

    return made


def one_by_one(sections: str) -> Block:
    """These sections of all key heads, one section after the other."""

    def made(view: View, facts: Facts) -> View:
        found = _by_key_head(view, facts)
        return Cat(tuple(Flatten(found[name], 0, 2) for name in sections), 0)

    return made


def _out_norm(view: View, facts: Facts) -> View:
    """megatron-core's is around zero as all its norms are; transformers' and ms-swift's are not."""
    return Add(view, 1.0) if _is_of_core(facts) else view


def in_proj(hf: str, size: str, block: Block) -> Rule:
    """A linear layer called `hf`, made from in_proj."""
    return Rule(f"{_HF}{hf}.weight", _IN_PROJ, (size, "hidden"), block, "linear")


DELTA_NET = (
    Rule(_HF + "dt_bias", _AT + "dt_bias", ("linear_value_heads",), layers="linear"),
    Rule(_HF + "A_log", _AT + "A_log", ("linear_value_heads",), layers="linear"),
    Rule(
        _HF + "conv1d.weight",
        _CONV,
        ("linear_mixed", 1, "conv_kernel"),
        one_by_one("qkv"),
        "linear",
    ),
    Rule(_HF + "norm.weight", _AT + "out_norm.weight", ("linear_value_dim",), _out_norm, "linear"),
    Rule(
        _HF + "out_proj.weight",
        _AT + "out_proj.weight",
        ("hidden", "linear_values"),
        layers="linear",
    ),
)
"""What is no part of in_proj, in the order of transformers' module."""
HYBRID_NORMS = at_zero(
    norm(LAYER + "input_layernorm.", *INPUT_NORM, _AT + "in_proj.layer_norm_"),
    norm(LAYER + "post_attention_layernorm.", *MLP_NORM),
)
"""Before full or linear attention, and before the MLP: around zero on both sides."""

# -- config.json ----------------------------------------------------------------------------------


def _layer_types(facts: Facts) -> object:
    kinds = {True: "linear_attention", False: "full_attention"}
    return [kinds[layer in facts.linear_layers] for layer in range(facts.dims["layers"])]


HYBRID_KEYS: Mapping[str, Key] = {
    "layer_types": Key(_layer_types),
    "linear_conv_kernel_dim": dim("conv_kernel"),
    "linear_key_head_dim": dim("linear_key_dim"),
    "linear_value_head_dim": dim("linear_value_dim"),
    "linear_num_key_heads": dim("linear_key_heads"),
    "linear_num_value_heads": dim("linear_value_heads"),
    "partial_rotary_factor": PARTIAL_ROTARY,
}
HYBRID_REQUIRES: Mapping[str, tuple[object, ...]] = {
    **decoder_requires("rotary_percent"),
    "attention_output_gate": (True,),
    **NORMS_AT_ZERO,
    "rotary_interleaved": (False,),
    "experimental_attention_variant": ("gated_delta_net",),
}


def known_rows(facts: Facts) -> str | None:
    """Check: the rows of in_proj lie in an order that is known. Formats that keep what a rank holds
    name neither megatron-core's order nor ms-swift's."""
    if _GROUPED in facts.kinds and _SWIFT not in facts.args:
        return (
            "the rows of self_attention.in_proj.weight lie in an order that nothing tells: "
            "megatron-core and ms-swift have them in different ones"
        )
    if _JOINED in facts.kinds and _SWIFT in facts.args:
        return (
            "ms-swift trained it, which orders the rows of self_attention.in_proj.weight otherwise "
            "than this checkpoint names them"
        )
    return None


def zero_centred(facts: Facts) -> str | None:
    """Check: norms have 1 added to their weights, as transformers' have."""
    if facts.norms_at_zero or not facts.args:
        return None
    return (
        f"none of {', '.join(NORMS_AT_ZERO)} is set, so that norms are not around zero as those of "
        "transformers' model are: its output would differ"
    )


HYBRID_CHECKS: tuple[Check, ...] = (known_rows, zero_centred)
