"""Falcon-H1: a Mamba mixer and attention side by side in each layer, then an MLP; what goes into
and comes out of them is multiplied by numbers of the config, which no weight holds.

Megatron-Bridge:src/megatron/bridge/models/falcon_h1/: its provider records the multipliers under
transformers' names, and modeling_falconh1/falconh1_layer.py uses each where transformers does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mcorefs.mapping.blocks.attention import GQA
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    GQA_KEYS,
    arg,
    constant,
    decoder_requires,
    dim,
)
from mcorefs.mapping.blocks.mamba import BESIDE, known_rows, mixer
from mcorefs.mapping.blocks.mlp import GATED_MLP
from mcorefs.mapping.blocks.model import EMBED, HEAD, norm
from mcorefs.mapping.blocks.names import LAYER, MLAYER, MLP_NORM
from mcorefs.mapping.family import LEFT_OUT, Facts, Family, Key, Rule, Soft

_AT = f"decoder.layers.*.{BESIDE}."
_MIXER_NORM = _AT + "norm.weight"
_CONV_BIAS = (_AT + "conv1d.bias", _AT + "conv1d.bias.joined")
_OWN_NORM = _AT + "in_proj.layer_norm_weight"
_MIXER_EPSILON = 1e-5
"""Of the norm in a mixer, whatever the arguments say (Megatron-LM:megatron/core/ssm/
mamba_mixer.py)."""

# -- tensors --------------------------------------------------------------------------------------


def _optional_norm(rule: Rule) -> Rule:
    return replace(rule, when=_MIXER_NORM) if rule.hf.endswith(".norm.weight") else rule


_RULES = (
    EMBED,
    *(replace(rule, hf=rule.hf.replace(".mlp.", ".feed_forward.")) for rule in GATED_MLP),
    *map(_optional_norm, mixer(LAYER + "mamba.", BESIDE)),
    *GQA,
    norm(LAYER + "input_layernorm.", MLAYER + "norm."),
    norm(LAYER + "pre_ff_layernorm.", *MLP_NORM),
    norm("model.final_layernorm.", "decoder.final_norm."),
    HEAD,
)

# -- what it cannot express -----------------------------------------------------------------------


def one_input_norm(facts: Facts) -> str | None:
    """Check: mixer and attention share their norm."""
    if _OWN_NORM not in facts.kinds:
        return None
    return (
        "mixer and attention each have a norm of their own for what they take in, as they had in "
        "Megatron-Bridge before 0.6, where ssm_in_multiplier and attention_in_multiplier came "
        "before it and had no effect: transformers' model has one for both, and then multiplies"
    )


def norm_of_mixers(facts: Facts) -> str | None:
    """Check: the norm of mixers is there as the arguments say, and transformers', whose epsilon is
    that of all others, is the same."""
    has_norm, said = _MIXER_NORM in facts.kinds, facts.arg("rmsnorm")
    if isinstance(said, bool) and said != has_norm:
        held = "holds" if has_norm else "does not hold"
        return f"rmsnorm is {said} in the training arguments but the checkpoint {held} mixer norms"
    epsilon = facts.arg("layernorm_epsilon", "norm_epsilon")
    if not has_norm or epsilon is None or epsilon == _MIXER_EPSILON:
        return None
    return (
        f"the model was trained with layernorm_epsilon={epsilon!r}, but with {_MIXER_EPSILON} in "
        "the norms of its mixers: transformers' model has one epsilon for both"
    )


_NUMBERS = (
    "embedding_multiplier",
    "lm_head_multiplier",
    "key_multiplier",
    "attention_in_multiplier",
    "attention_out_multiplier",
    "ssm_in_multiplier",
    "ssm_out_multiplier",
)
_LISTS: Mapping[str, int] = {"mlp_multipliers": 2, "ssm_multipliers": 5}
"""Of gate and down; of z, x, B, C and dt."""


def known_multipliers(facts: Facts) -> str | None:
    """Check: they are numbers, as many as there have to be."""
    for name in (*_NUMBERS, *_LISTS):
        value, count = facts.arg(name), _LISTS.get(name)
        if value is None:
            continue
        numbers = value if count and isinstance(value, list | tuple) else [value]
        if len(numbers) != (count or 1) or any(type(one) not in (int, float) for one in numbers):
            wanted = f"{count} numbers" if count else "a number"
            return f"{name} is {value!r} in the training arguments, which is not {wanted}"
    return None


# -- config.json ----------------------------------------------------------------------------------


def _list(name: str) -> Key:
    def value(facts: Facts) -> object | None:
        found = facts.arg(name)
        return list(found) if isinstance(found, list | tuple) else found

    return Key(value)


def _unimportant(name: str, default: int) -> Key:
    """An argument that changes nothing here."""
    return Key(lambda facts: Soft(facts.arg(name) or default))


def _epsilon(facts: Facts) -> object | None:
    default = _MIXER_EPSILON if _MIXER_NORM in facts.kinds else None
    return facts.arg("layernorm_epsilon", "norm_epsilon") or default


def _norm_before_gate(facts: Facts) -> object:
    """Megatron norms what is gated; where there is no norm, it means nothing."""
    return False if _MIXER_NORM in facts.kinds else Soft(False)


_NO_BIAS = Key(lambda facts: False)

FALCON_H1 = Family(
    name="falcon_h1",
    architecture="FalconH1ForCausalLM",
    rules=_RULES,
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        **{name: arg(name) for name in _NUMBERS},
        **{name: _list(name) for name in _LISTS},
        "hidden_act": Key(lambda facts: "silu"),
        "rms_norm_eps": Key(_epsilon),
        "mamba_d_ssm": dim("mamba_inner"),
        "mamba_n_heads": dim("mamba_heads"),
        "mamba_d_head": Key(
            lambda facts: facts.dims.get("mamba_head_dim"),
            read=lambda stated: None if stated == "auto" else stated,
        ),
        "mamba_n_groups": dim("mamba_groups"),
        "mamba_d_state": dim("mamba_state"),
        "mamba_d_conv": dim("mamba_kernel"),
        "mamba_expand": _unimportant("expand", 2),
        "mamba_chunk_size": _unimportant("chunk_size", 128),
        "mamba_conv_bias": Key(lambda facts: bool(facts.kinds.intersection(_CONV_BIAS))),
        "mamba_rms_norm": Key(lambda facts: _MIXER_NORM in facts.kinds),
        "mamba_norm_before_gate": Key(_norm_before_gate),
        "time_step_limit": Key(
            lambda facts: None,
            LEFT_OUT,
            only=([0.0, float("inf")], [0.0, {"__float__": "Infinity"}]),
        ),
        "attention_bias": _NO_BIAS,
        "mlp_bias": _NO_BIAS,
        "projectors_bias": _NO_BIAS,
        "mamba_proj_bias": _NO_BIAS,
        "num_logits_to_keep": constant(1),
    },
    requires={**decoder_requires(), "norm_before_gate": (False,)},
    checks=(one_input_norm, norm_of_mixers, known_multipliers, known_rows),
    only_words=True,
)
"""How many tokens a chunk has changes no more than the speed, and mamba_expand is of use only where
mamba_d_ssm is not stated. Steps have no limit in Megatron, nor in transformers unless the config
states one (infinity is none: transformers 5 writes it as an object)."""
