"""MiMo-V2-Flash: most layers have a window, sinks and twice the query groups of the others, and
rotate with another base; value heads are smaller than key heads; the first layers dense, then
experts and a router of sigmoids with a bias for each; layers for multi-token prediction.

Megatron-Bridge:src/megatron/bridge/models/mimo_v2_flash/, whose modules give sinks to the layers
with a window alone, so that their tensors tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mcorefs.mapping.blocks.attention import SINKS
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    EPSILON,
    GQA_KEYS,
    PARTIAL_ROTARY,
    constant,
    decoder_requires,
    dim,
)
from mcorefs.mapping.blocks.mlp import GATED_MLP, expert_bias, gated_experts, router
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM, gamma
from mcorefs.mapping.blocks.mtp import NEXTN_KEYS, inside
from mcorefs.mapping.blocks.names import LAYER, MLAYER
from mcorefs.mapping.blocks.routing import (
    MLP_LAYER_TYPES,
    SIGMOID_KEYS,
    SIGMOID_REQUIRES,
    best_two_of_each_group,
    no_sinkhorn,
)
from mcorefs.mapping.family import LEFT_OUT, REQUIRED, Block, Facts, Family, Key, Rule, Soft
from mcorefs.views import Flatten, Narrow, Unflatten, View

# -- tensors --------------------------------------------------------------------------------------

_QKV, _PROJ = MLAYER + "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"
_Part = Callable[[int, int, int], tuple[int, int]]
"""(heads of a group, size of a key head, size of a value head) -> (first row, rows) in a group."""


def _of_groups(part: _Part, sliding: bool) -> Block:
    """Rows of every query group: its queries, its key, its value."""

    def block(view: View, facts: Facts) -> View:
        groups = facts.dims["sliding_groups" if sliding else "groups"]
        heads = facts.dims["heads"] // groups
        key, value = facts.dims["head_dim"], facts.dims["v_head"]
        rows = Unflatten(view, 0, (groups, heads * key + key + value))
        return Flatten(Narrow(rows, 1, *part(heads, key, value)), 0, 2)

    return block


def _attention(sliding: bool) -> tuple[Rule, ...]:
    at, layers = ("sliding_", "sliding") if sliding else ("", "full")
    query = _of_groups(lambda heads, key, value: (0, heads * key), sliding)
    key = _of_groups(lambda heads, key, value: (heads * key, key), sliding)
    value = _of_groups(lambda heads, key, value: (heads * key + key, value), sliding)
    found = (
        Rule(LAYER + "self_attn.q_proj.weight", _QKV, ("q_rows", "hidden"), query),
        Rule(LAYER + "self_attn.k_proj.weight", _QKV, (f"{at}k_rows", "hidden"), key),
        Rule(LAYER + "self_attn.v_proj.weight", _QKV, (f"{at}value_rows", "hidden"), value),
        Rule(LAYER + "self_attn.o_proj.weight", MLAYER + _PROJ, ("hidden", "value_columns")),
    )
    return tuple(replace(rule, layers=layers) for rule in found)  # type: ignore[arg-type]


_SINKS = replace(
    SINKS, hf=LAYER + "self_attn.attention_sink_bias", layers="sliding", sorts_as=SINKS.hf
)
_LAYER = (
    *_attention(sliding=False),
    *_attention(sliding=True),
    _SINKS,
    *GATED_MLP,
    *gated_experts("mlp.experts.{expert}."),
    router("mlp.gate.weight"),
    expert_bias("mlp.gate.e_score_correction_bias"),
    *LAYER_NORMS,
)

_MTP, _AT = "model.mtp.layers.{mtp}.", "mtp.layers.{mtp}."
_BEHIND = (
    *_attention(sliding=True),
    _SINKS,
    *GATED_MLP,
    LAYER_NORMS[0],
    replace(LAYER_NORMS[1], hf=LAYER + "pre_mlp_layernorm.weight"),
)
_MTP_LAYER = (
    *(inside(rule, _MTP) for rule in _BEHIND),
    *(
        Rule(f"{_MTP}{name}.weight", f"{_AT}{name}.weight", ("hidden",), gamma, stack="mtp")
        for name in ("enorm", "hnorm", "final_layernorm")
    ),
    Rule(_MTP + "eh_proj.weight", _AT + "eh_proj.weight", ("hidden", "mtp_columns"), stack="mtp"),
)
"""Dense layers with a window, which take the embedding first (vLLM:vllm/model_executor/models/
mimo_v2_mtp.py)."""

# -- which layers have a window -------------------------------------------------------------------


def _slides(facts: Facts) -> list[int]:
    return [int(layer in facts.sliding_layers) for layer in range(facts.dims["layers"])]


def _as_arranged(facts: Facts) -> str | None:
    """Check: the layers that have sinks are those that the arguments give a window."""
    if not facts.args:
        return None
    said, found = facts.arg("hybrid_attention_pattern"), _slides(facts)
    if isinstance(said, list | tuple) and list(said) == found:
        return None
    return f"hybrid_attention_pattern={said!r}, but by their sinks the layers are {found}"


def _twice_the_groups(facts: Facts) -> str | None:
    """Check: as transformers takes for granted."""
    groups, sliding = facts.dims.get("groups"), facts.dims.get("sliding_groups")
    if groups is None:
        return "no layer is without a window: nothing says how many query groups such a one has"
    if sliding is None or sliding == 2 * groups:
        return None
    return (
        f"layers with a window have {sliding} query groups, expected {2 * groups}: transformers' "
        f"have twice the {groups} of the others"
    )


# -- config.json ----------------------------------------------------------------------------------


def _window(before: bool) -> Key:
    """How many tokens each sees, with itself or without. The hub's sliding_window_size is without
    to transformers (configuration_mimo_v2_flash.py) and SGLang, with it to Megatron-Bridge."""

    def value(facts: Facts) -> Soft | None:
        found = facts.arg("window_size")
        return Soft(found - before) if type(found) is int else None

    return Key(value, LEFT_OUT if before else REQUIRED)


def _whole_window(facts: Facts) -> str | None:
    """Check: as Megatron-Bridge's modules take it."""
    found = facts.arg("window_size")
    if not facts.args or (type(found) is int and found > 0):
        return None
    return f"window_size={found!r}, expected a number of tokens, as Megatron-Bridge has it"


def _base(which: int) -> Key:
    """rotary_base is a pair: of the layers with a window, and of the others; or that of the others
    (mimo_v2_flash_provider.py provide)."""

    def value(facts: Facts) -> object | None:
        found = facts.arg("rotary_base")
        is_pair = isinstance(found, list | tuple) and len(found) == 2
        pair: Sequence[object] = found if is_pair else (10_000, found)  # type: ignore[assignment]
        return None if found is None else pair[which]

    return Key(value, aliases=() if which else ("rope_local_base_freq",))


def _value_scale(facts: Facts) -> object | None:
    """By default transformers' is not 1."""
    scale = facts.arg("attention_value_scale")
    return 1.0 if scale is None and facts.args else scale


MIMO_V2_FLASH = Family(
    name="mimo_v2_flash",
    architecture="MiMoV2FlashForCausalLM",
    rules=(EMBED, *_LAYER, NORM, *_MTP_LAYER, HEAD),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        **SIGMOID_KEYS,
        **NEXTN_KEYS,
        "rms_norm_eps": replace(EPSILON, aliases=("layernorm_epsilon",)),
        "v_head_dim": dim("v_head"),
        "attention_value_scale": Key(_value_scale),
        "attention_bias": Key(lambda facts: False),
        "rope_theta": _base(1),
        "swa_rope_theta": _base(0),
        "rope_scaling": Key(lambda facts: None, None, only=(None,)),
        "partial_rotary_factor": PARTIAL_ROTARY,
        "sliding_window": _window(before=False),
        "sliding_window_size": _window(before=True),
        "layer_types": Key(
            lambda facts: [("full", "sliding")[one] + "_attention" for one in _slides(facts)]
        ),
        "n_routed_experts": dim("experts", "num_local_experts"),
        "moe_intermediate_size": dim("moe_ffn"),
        "mlp_layer_types": MLP_LAYER_TYPES,
        "output_router_logits": constant(False),
        # What engines ask for.
        "layernorm_epsilon": Key(EPSILON.value, LEFT_OUT),
        "hybrid_layer_pattern": Key(_slides),
        "moe_layer_freq": Key(
            lambda facts: [int(layer in facts.moe_layers) for layer in range(facts.dims["layers"])]
        ),
        "swa_num_attention_heads": dim("heads"),
        "swa_num_key_value_heads": Key(lambda facts: 2 * facts.dims.get("groups", 0)),
        "swa_head_dim": dim("head_dim"),
        "swa_v_head_dim": dim("v_head"),
        "add_swa_attention_sink_bias": Key(lambda facts: True),
        "add_full_attention_sink_bias": Key(lambda facts: False),
        "scoring_func": Key(lambda facts: "sigmoid"),
        "topk_method": Key(lambda facts: "noaux_tc"),
    },
    requires={
        **decoder_requires("rotary_percent", "window_size"),
        **SIGMOID_REQUIRES,
        "window_attn_skip_freq": (),
        "rotary_interleaved": (False,),
        "use_rope_scaling": (False,),
        "rotary_seq_len_interpolation_factor": (1, 1.0),
        "seq_len_interpolation_factor": (1, 1.0),
    },
    checks=(
        no_sinkhorn,
        best_two_of_each_group,
        _as_arranged,
        _twice_the_groups,
        _whole_window,
    ),
    given=("hybrid_attention_pattern",),
    natural_order=True,
)
