"""Step-3.5-Flash: a gate for each head, layers with a window whose heads are more and rotate
otherwise, the first layers dense, then experts in one tensor for each projection, with a shared one
and a router of sigmoids with a bias for each; norms around zero.

transformers has no class of it, but reads its config.json: the hub's repository has code, which
config.json names if a reference does. Megatron's side: Megatron-Bridge:src/megatron/bridge/models/
stepfun/ (step35_bridge.py, step35_provider.py), which keeps some of what each layer has as
attributes of its provider that it does not save: a reference must say these.

megatron-core limits what a gate lets through before the activation (fusions/fused_bias_swiglu.py
clamped_swiglu), the hub's code behind it: a gate at its limit L is silu(L) in one and L in the
other, which bf16 cannot tell apart from 6.3 on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeGuard

from mcorefs.mapping.blocks.attention import GQA, QK_NORM_AT_ZERO
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    GQA_KEYS,
    NORMS_AT_ZERO,
    arg,
    decoder_requires,
    dim,
    soft_arg,
)
from mcorefs.mapping.blocks.mlp import GATED_MLP, expert_bias, gate, router, shared_experts, up
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM, at_zero
from mcorefs.mapping.blocks.names import LAYER, MLAYER
from mcorefs.mapping.blocks.routing import (
    FREE_SIGMOID_REQUIRES,
    SIGMOID_KEYS,
    no_sinkhorn,
    several_experts,
)
from mcorefs.mapping.family import (
    LEFT_OUT,
    Block,
    Facts,
    Family,
    Key,
    Proven,
    Rule,
    Soft,
    whole,
)
from mcorefs.views import View

_SETTING = "sliding_attention_setting"
_LIMITS, _SHARED_LIMITS = "swiglu_limits", "swiglu_limits_shared"

# -- rules ----------------------------------------------------------------------------------------


def _of_sliding(block: Block) -> Block:
    """`block` of a layer with a window, whose heads and groups are other ones."""

    def made(view: View, facts: Facts) -> View:
        sizes = ("heads", "groups", "q_rows", "kv_rows")
        own = {size: facts.dims[f"sliding_{size}"] for size in sizes}
        return block(view, replace(facts, dims={**facts.dims, **own}))

    return made


def _in_both(rule: Rule) -> tuple[Rule, Rule]:
    """`rule` of attention for layers without a window and for those with one."""
    own = ("heads", "q_rows", "kv_rows")
    shape = tuple(f"sliding_{size}" if size in own else size for size in rule.shape)
    block = rule.block if rule.block is whole else _of_sliding(rule.block)
    return replace(rule, layers="full"), replace(rule, layers="sliding", shape=shape, block=block)


_GATE = Rule(
    LAYER + "self_attn.g_proj.weight",
    MLAYER + "self_attention.linear_qkv.weight._gate",
    ("heads", "hidden"),
)
_MOE, _EXPERT = LAYER + "moe.", MLAYER + "mlp.experts.{expert}."
_WIDE, _TALL = ("experts", "moe_ffn", "hidden"), ("experts", "hidden", "moe_ffn")
_EXPERTS = (
    replace(expert_bias("moe.router_bias"), is_buffer=False),
    router("moe.gate.weight"),
    Rule(_MOE + "up_proj.weight", _EXPERT + "linear_fc1.weight", _WIDE, up, "moe"),
    Rule(_MOE + "gate_proj.weight", _EXPERT + "linear_fc1.weight", _WIDE, gate, "moe"),
    Rule(_MOE + "down_proj.weight", _EXPERT + "linear_fc2.weight", _TALL, layers="moe"),
)
_LAYER = (
    *(both for rule in GQA for both in _in_both(rule)),
    *QK_NORM_AT_ZERO,
    *_in_both(_GATE),
    *GATED_MLP,
    *_EXPERTS,
    *shared_experts("share_expert."),
    *at_zero(*LAYER_NORMS),
)

# -- config.json ----------------------------------------------------------------------------------


def _setting(facts: Facts) -> Mapping[str, object]:
    found = facts.arg(_SETTING)
    return found if isinstance(found, dict) else {}


def _is_of_bridge(facts: Facts) -> bool:
    """Whether each layer has settings of its own, some of which are saved nowhere."""
    return bool(facts.arg(_SETTING))


def _of_layers(facts: Facts, name: str) -> list[object] | None:
    """A list with an entry for each layer of the decoder: more are of multi-token prediction."""
    found, layers = facts.arg(name), facts.dims["layers"]
    if not isinstance(found, list | tuple) or len(found) < layers:
        return None
    return list(found[:layers])


def _numbers(facts: Facts, name: str) -> list[float] | None:
    """Likewise, of numbers; None is 0."""
    found = [0.0 if one is None else one for one in _of_layers(facts, name) or ()]
    numbers = [one for one in found if isinstance(one, int | float)]
    return numbers if numbers and len(numbers) == len(found) else None


def _layer_types(facts: Facts) -> list[object] | None:
    if (kinds := _of_layers(facts, "layer_types")) is not None:
        return kinds
    full = facts.args and not _is_of_bridge(facts)
    return ["full_attention"] * facts.dims["layers"] if full else None


def _sliding_heads(facts: Facts) -> object | None:
    if "sliding_heads" not in facts.dims:
        return None
    return {
        "attention_type": "sliding_attention",
        "num_attention_heads": facts.dims["sliding_heads"],
        "num_attention_groups": facts.dims["sliding_groups"],
        "head_dim": facts.dims["head_dim"],
        "true_head_dim": facts.dims["head_dim"],
    }


def _window(facts: Facts) -> Soft | None:
    """As `blocks.keys.window`; Megatron-Bridge writes transformers' number here, which is one more
    token than transformers sees."""
    found = _setting(facts).get("window_size")
    if isinstance(found, list | tuple) and found and type(found[0]) is int and found[0] >= 0:
        return Soft(found[0] + 1)
    return Soft(None) if facts.args and not _is_of_bridge(facts) else None


def _bases(facts: Facts) -> object | None:
    if (bases := _numbers(facts, "rotary_base_per_layer")) is not None:
        return bases
    base = facts.arg("rotary_base")
    return None if base is None else [base] * facts.dims["layers"]


def _scaled_layers(facts: Facts) -> object:
    """Whose rotations rope_scaling is for: of all layers, where it is said alone."""
    scales_all = facts.described.get("rope_scaling") and "yarn_only_types" not in facts.described
    return LEFT_OUT if scales_all else Soft(["full_attention"])


def _shares(facts: Facts) -> object | None:
    if (shares := _numbers(facts, "rotary_percents")) is not None:
        return shares
    share = facts.arg("rotary_percent")
    known = share is not None and not _is_of_bridge(facts)
    return [share] * facts.dims["layers"] if known else None


def _limits(name: str) -> Key:
    def value(facts: Facts) -> object | None:
        if (limits := _numbers(facts, name)) is not None:
            return limits
        unlimited = facts.args and not _is_of_bridge(facts)
        return [0.0] * facts.dims["layers"] if unlimited else None

    return Key(value)


def _router_precision(facts: Facts) -> Soft | None:
    return Soft(facts.arg("moe_router_dtype") in ("fp32", "fp64")) if facts.args else None


# -- what it cannot express -----------------------------------------------------------------------


def _zero_centred(facts: Facts) -> str | None:
    if facts.arg(*NORMS_AT_ZERO) is not None or not facts.args:
        return None
    return (
        f"none of {', '.join(NORMS_AT_ZERO)} is set, so that norms are not around zero as those of "
        "this model are: its output would differ"
    )


def _windows_where_they_are_said(facts: Facts) -> str | None:
    """Check: what skips windows (Megatron-LM:megatron/core/transformer/utils.py
    is_layer_window_attention) skips none of the layers that have one."""
    skipped = facts.arg("window_attn_skip_freq")
    if isinstance(skipped, list | tuple):
        without = {layer for layer, slides in enumerate(skipped) if not slides}
    elif isinstance(skipped, int) and skipped > 0:
        without = {layer for layer in range(facts.dims["layers"]) if (layer + 1) % skipped == 0}
    else:
        without = set()
    if lost := sorted(without & facts.sliding_layers):
        return (
            f"with window_attn_skip_freq={skipped!r} layers {lost} have no window although "
            "layer_types says that they have: its output would differ"
        )
    return None


def _no_mtp(facts: Facts) -> str | None:
    """Check: there are no layers for multi-token prediction. Megatron-Bridge looks for what is
    theirs behind that of the decoder's layers, in a pipeline further behind, where nothing is, and
    megatron-core for their rotary base at the first of the decoder's."""
    if not facts.dims.get("mtp"):
        return None
    return (
        "its layers for multi-token prediction are not supported: Megatron-Bridge gives them the "
        "rotary bases of the decoder's first layers, and in a pipeline no window and other heads, "
        "so that nothing says how they were trained; --no-mtp serves the model without them"
    )


def _known_kinds(facts: Facts) -> str | None:
    """Check: a layer has a window or none."""
    others = set(map(str, _layer_types(facts) or ())) - {"full_attention", "sliding_attention"}
    return f"layer_types has {', '.join(sorted(others))}, which is not known" if others else None


def _limits_in_effect(facts: Facts) -> tuple[list[float], list[float]]:
    """Of experts and of the shared one in each layer, from the arguments, else from config.json."""

    def limits(name: str) -> list[float]:
        if (found := _numbers(facts, name)) is not None:
            return found
        stated = facts.described.get(name)
        listed = stated if isinstance(stated, list) else []
        numbers = [one if _is_number(one) else math.nan for one in listed]
        layers = facts.dims["layers"]
        return [*numbers, *[0.0] * layers][:layers]

    return limits(_LIMITS), limits(_SHARED_LIMITS)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and abs(value) < 1 << 63


def _one_limit(facts: Facts) -> str | None:
    """Check: Megatron limits shared experts as the others where nothing else is said of them, and
    dense layers as experts; the hub's code has the limits of shared experts for both."""
    for layer, (limit, of_shared) in enumerate(zip(*_limits_in_effect(facts), strict=True)):
        is_dense = layer not in facts.moe_layers
        if (limit and not of_shared) or (is_dense and limit != of_shared):
            what = "gates" if is_dense else "those of the shared expert"
            return (
                f"layer {layer} was trained with {what} limited to {limit or 'nothing'}, where "
                f"{_SHARED_LIMITS} says {of_shared or 'nothing'}: its output would differ"
            )
    return None


def _high_limits(facts: Facts) -> str | None:
    """Check: limits before the activation and behind it are the same to bf16."""
    low = [one for limits in _limits_in_effect(facts) for one in limits if one and not _high(one)]
    if not low:
        return None
    return (
        f"{_LIMITS} or {_SHARED_LIMITS} has {low[0]}: megatron-core limits gates before the "
        "activation, this model behind it, where so low a limit means another one: its output "
        "would differ"
    )


def _high(limit: float) -> bool:
    """silu(limit) = limit / (1 + exp(-limit)) rounds to the limit with the eight bits of bf16."""
    return limit > 0 and math.exp(-limit) < 2**-9


def _order_of_limits(facts: Facts) -> str | None:
    """Remark."""
    found = sorted({one for limits in _limits_in_effect(facts) for one in limits if one})
    if not found:
        return None
    return (
        f"limits of gates ({', '.join(map(str, found))}) hold before the activation in "
        "megatron-core and behind it in this model, which bf16 cannot tell apart"
    )


STEP3P5 = Family(
    name="step3p5",
    architecture="Step3p5ForCausalLM",
    rules=(EMBED, *_LAYER, *at_zero(NORM), HEAD),
    config={
        **BASE_KEYS,
        "num_attention_heads": GQA_KEYS["num_attention_heads"],
        "num_attention_groups": GQA_KEYS["num_key_value_heads"],
        "head_dim": GQA_KEYS["head_dim"],
        "attention_other_setting": Key(_sliding_heads, None),
        "layer_types": Key(_layer_types),
        "sliding_window": Key(_window),
        "rope_theta": Key(_bases),
        "rope_scaling": Key(lambda facts: Soft(None)),
        "yarn_only_types": Key(_scaled_layers),
        "partial_rotary_factors": Key(_shares),
        "use_rope_layers": Key(lambda facts: []),
        "max_seq_len": soft_arg("max_position_embeddings", "seq_length", default=32768),
        "query_pre_attn_scalar": dim("head_dim"),
        "attention_bias": Key(lambda facts: False),
        "mlp_bias": Key(lambda facts: False),
        "gating": Key(lambda facts: None, LEFT_OUT, only=(True, "per-head")),
        "use_bidirectional_attention": Key(lambda facts: None, LEFT_OUT, only=(False,)),
        "att_impl_type": Key(lambda facts: "GQA"),
        "use_head_wise_attn_gate": Key(lambda facts: True),
        "use_qk_norm": Key(lambda facts: True),
        "zero_centered": Key(lambda facts: True),
        "sink": Key(lambda facts: False),
        "use_moe": Key(lambda facts: bool(facts.moe_layers)),
        "moe_layers_enum": Key(lambda facts: ",".join(map(str, sorted(facts.moe_layers)))),
        "moe_num_experts": dim("experts"),
        "moe_top_k": arg("moe_router_topk"),
        "moe_intermediate_size": dim("moe_ffn"),
        "share_expert_dim": dim("shared_ffn"),
        "moe_router_activation": Key(lambda facts: "sigmoid"),
        "moe_router_scaling_factor": SIGMOID_KEYS["routed_scaling_factor"],
        "use_moe_router_bias": Key(lambda facts: True),
        "norm_expert_weight": Key(lambda facts: True),
        "need_fp32_gate": Key(_router_precision, False),
        _LIMITS: _limits(_LIMITS),
        _SHARED_LIMITS: _limits(_SHARED_LIMITS),
        "num_nextn_predict_layers": Key(lambda facts: Proven(0)),
    },
    requires={
        **decoder_requires(
            "rotary_percent", "head_wise_attn_gate", _SETTING, "rotary_base_per_layer"
        ),
        **NORMS_AT_ZERO,
        **FREE_SIGMOID_REQUIRES,
        "rotary_interleaved": (False,),
        "head_wise_attn_gate": (True,),
        "use_rope_scaling": (False,),
        "rotary_seq_len_interpolation_factor": (1, 1.0),
    },
    checks=(
        no_sinkhorn,
        several_experts,
        _zero_centred,
        _no_mtp,
        _known_kinds,
        _windows_where_they_are_said,
        _one_limit,
        _high_limits,
    ),
    remarks=(_order_of_limits,),
    has_own_code=True,
)
