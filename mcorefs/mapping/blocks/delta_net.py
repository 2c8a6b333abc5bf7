"""Gated delta nets, and the gated attention between them.

Formulas: Megatron-LM:megatron/core/ssm/gated_delta_net.py, transformer/attention.py
get_query_key_value_tensors; checked against GDNLinearMapping and merge_qkv_weights of
Megatron-Bridge:src/megatron/bridge/models/conversion/param_mapping.py. ms-swift has modules of its
own: rows of its gated delta nets are grouped by key head, in one linear layer or in two
(linear_decoupled_in_proj), their norm is not around zero, and each gate of its attention lies
behind its query (mcore-bridge:src/mcore_bridge/model/modules/gated_delta_net.py,
gated_self_attention.py, bridge/gpt_bridge.py _set_linear_in_proj). With USE_MCORE_GDN=0, and for
Qwen3-Next up to mcore-bridge 1.3, it has transformers' own module as self_attention (mcore-bridge:
src/mcore_bridge/model/gpts/qwen3_next.py, mm_gpts/qwen3_5.py); slime has it inside, and
megatron-core's gated attention between (slime:slime_plugins/models/{qwen3_next,qwen3_5}.py).
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
_INSIDE = _AT + "linear_attn."
_IN_PROJ = (_AT + "in_proj.weight.joined", _AT + "in_proj.weight")
_CONV = (_AT + "conv1d.weight.joined", _AT + "conv1d.weight", _INSIDE + "conv1d.weight")
_KINDS = "decoder.layers.*.self_attention."
_JOINED, _GROUPED = _KINDS + "in_proj.weight.joined", _KINDS + "in_proj.weight"
_APART = _KINDS + "in_proj_qkvz.weight"
_WHOLE_MODULE, _MODULE_INSIDE = _KINDS + "norm.weight", _KINDS + "linear_attn.norm.weight"
"""What shows that there is transformers' module."""
_SWIFT = ("tuner_type", "train_type")
"""Arguments that only ms-swift records: the latter up to 3.x."""


def _has_transformers_module(facts: Facts) -> bool:
    return bool(facts.kinds & {_WHOLE_MODULE, _MODULE_INSIDE})


def _has_gates_of_core(facts: Facts) -> bool:
    """Whether the gated attention is megatron-core's, or else ms-swift's; see `known_rows`."""
    return bool(facts.kinds & {_JOINED, _MODULE_INSIDE})


# -- gated attention ------------------------------------------------------------------------------


def _gated_query(view: View, facts: Facts) -> View:
    """q_proj with a gate behind each query head; megatron-core has the gates of a group behind its
    queries, ms-swift as transformers has them."""
    groups, head_dim = facts.dims["groups"], facts.dims["head_dim"]
    per_group = facts.dims["heads"] // groups
    rows = Unflatten(view, 0, (groups, 2 * per_group + 2, head_dim))
    queries = Narrow(rows, 1, 0, 2 * per_group)
    if not _has_gates_of_core(facts):
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


def _rows(facts: Facts) -> Mapping[str, int]:
    """How many rows of each section of in_proj, or of conv1d, belong to one key head."""
    dims = facts.dims
    heads, per_head = dims["linear_key_heads"], dims["linear_key_dim"]
    of_values, one = dims["linear_values"] // heads, dims["linear_value_heads"] // heads
    return {"q": per_head, "k": per_head, "v": of_values, "z": of_values, "b": one, "a": one}


def _by_key_head(view: View, facts: Facts) -> Mapping[str, View]:
    """The sections of in_proj or conv1d, their rows by key head: [key heads, rows, ...]."""
    heads, rows = facts.dims["linear_key_heads"], _rows(facts)
    total = {name: heads * sum(rows[one] for one in name) for name in ("ba", "qkv", "qkvz")}
    held = next((name for name, count in total.items() if count == view.shape[0]), "qkvzba")
    found: dict[str, View] = {}
    at = 0
    for name in held:
        count = rows[name]
        if _JOINED in facts.kinds:
            found[name] = Unflatten(Narrow(view, 0, at, heads * count), 0, (heads, count))
            at += heads * count
        else:
            grouped = Unflatten(view, 0, (heads, view.shape[0] // heads))
            found[name] = Narrow(grouped, 1, at // heads, count)
            at += heads * count
    return found


def _of_transformers(block: Block, sections: str) -> Block:
    """`block`, but the tensor as it is if transformers' module holds no more than it asks for."""

    def made(view: View, facts: Facts) -> View:
        rows = facts.dims["linear_key_heads"] * sum(_rows(facts)[name] for name in sections)
        is_whole = _has_transformers_module(facts) and view.shape[0] == rows
        return view if is_whole else block(view, facts)

    return made


def in_turns(sections: str) -> Block:
    """These sections of each key head, one key head after the other."""

    def made(view: View, facts: Facts) -> View:
        found = _by_key_head(view, facts)
        return Flatten(Cat(tuple(found[name] for name in sections), 1), 0, 2)

    return _of_transformers(made, sections)


def one_by_one(sections: str) -> Block:
    """These sections of all key heads, one section after the other."""

    def made(view: View, facts: Facts) -> View:
        found = _by_key_head(view, facts)
        return Cat(tuple(Flatten(found[name], 0, 2) for name in sections), 0)

    return _of_transformers(made, sections)


def _out_norm(view: View, facts: Facts) -> View:
    """megatron-core's is around zero as all its norms are; transformers' and ms-swift's are not."""
    return Add(view, 1.0) if _JOINED in facts.kinds else view


def in_proj(hf: str, size: str, block: Block) -> Rule:
    """A linear layer called `hf`, made from in_proj, or from the part of it that holds it."""
    part = "in_proj_ba" if size in ("linear_ba", "linear_value_heads") else "in_proj_qkvz"
    names = dict.fromkeys((hf, part))
    sources = (f"{at}{name}.weight" for at in (_AT, _INSIDE) for name in names)
    return Rule(f"{_HF}{hf}.weight", (*_IN_PROJ, *sources), (size, "hidden"), block, "linear")


def _alike(hf: str, *shape: str, source: str = "") -> Rule:
    """A parameter that all modules hold alike."""
    sources = (_AT + (source or hf), *((_AT + hf,) if source else ()), _INSIDE + hf)
    return Rule(_HF + hf, sources, shape, layers="linear")


DELTA_NET = (
    _alike("dt_bias", "linear_value_heads"),
    _alike("A_log", "linear_value_heads"),
    Rule(
        _HF + "conv1d.weight",
        _CONV,
        ("linear_mixed", 1, "conv_kernel"),
        one_by_one("qkv"),
        "linear",
    ),
    replace(_alike("norm.weight", "linear_value_dim", source="out_norm.weight"), block=_out_norm),
    _alike("out_proj.weight", "hidden", "linear_values"),
)
"""What is no part of in_proj, in the order of transformers' module."""
_FUSED_NORMS = {_KINDS + "linear_qkv.layer_norm_weight"}
HYBRID_NORMS = at_zero(
    norm(
        LAYER + "input_layernorm.",
        *INPUT_NORM,
        _AT + "in_proj.layer_norm_",
        _AT + "input_layernorm.",
    ),
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
    "rotary_interleaved": (False,),
    "experimental_attention_variant": ("gated_delta_net",),
}


def known_rows(facts: Facts) -> str | None:
    """Check: the rows of in_proj lie in an order that is known. Formats that keep what a rank holds
    name neither megatron-core's order nor ms-swift's."""
    of_swift = facts.arg(*_SWIFT) is not None
    if facts.kinds & {_GROUPED, _APART, _WHOLE_MODULE} and not of_swift:
        return (
            "the rows of self_attention.in_proj.weight lie in an order that nothing tells: "
            "megatron-core and ms-swift have them in different ones"
        )
    if _JOINED in facts.kinds and of_swift:
        return (
            "ms-swift trained it, which orders the rows of self_attention.in_proj.weight otherwise "
            "than this checkpoint names them"
        )
    return None


def zero_centred(facts: Facts) -> str | None:
    """Check: norms have 1 added to their weights, as transformers' have. Those of ms-swift with
    transformers' module have, since 3.12, when it gave its layers a norm of its own in place of
    TransformerEngine's (ms-swift:swift/megatron/model/gpt/qwen3_next.py Qwen3NextRMSNorm)."""
    if _WHOLE_MODULE in facts.kinds:
        if facts.kinds & _FUSED_NORMS:
            return (
                "its norms are not around zero as those of transformers' model are: ms-swift added "
                "1 to their weights before 3.12, which is not undone; export it with that version"
            )
        return None
    for name in NORMS_AT_ZERO:
        if facts.args.get(name) is False:
            return (
                f"the model was trained with {name}=False, so that its norms are not around zero "
                "as those of transformers' model are: its output would differ"
            )
    if facts.norms_at_zero or not facts.args:
        return None
    return (
        f"none of {', '.join(NORMS_AT_ZERO)} is set, so that norms are not around zero as those of "
        "transformers' model are: its output would differ"
    )


HYBRID_CHECKS: tuple[Check, ...] = (known_rows, zero_centred)
