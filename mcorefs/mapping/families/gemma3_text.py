"""Gemma 3, its text model: Gemma 2 with norms of each query and key head in place of caps, and two
rotary bases: one of the layers with a window, one of those without, by default every sixth.

Megatron-Bridge:src/megatron/bridge/models/gemma/gemma3_provider.py.
"""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA, QK_NORM_AT_ZERO
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    GEGLU_REQUIRES,
    GQA_KEYS,
    NORMS_AT_ZERO,
    TANH_GELU,
    constant,
    decoder_requires,
)
from mcorefs.mapping.blocks.mlp import GATED_MLP
from mcorefs.mapping.blocks.model import EMBED, HEAD, NORM, SANDWICH_NORMS, at_zero
from mcorefs.mapping.family import Facts, Family, Key, Soft


def _base(which: int) -> Key:
    """rotary_base is a pair: of the layers with a window, and of the others."""

    def value(facts: Facts) -> object | None:
        found = facts.arg("rotary_base")
        return found[which] if isinstance(found, list | tuple) and len(found) == 2 else None

    return Key(value)


def _rope_scaling(facts: Facts) -> object:
    """Of the layers without a window."""
    factor = facts.arg("rope_scaling_factor")
    if isinstance(factor, int | float) and factor != 1:
        return {"rope_type": "linear", "factor": float(factor)}
    return Soft(None)


def _query_scalar(facts: Facts) -> float | None:
    """Queries are divided by its root. Megatron has the quotient, rounded."""
    scale = facts.arg("softmax_scale")
    if not isinstance(scale, int | float) or scale <= 0:
        return None
    exact = 1 / scale**2
    return round(exact) if abs(exact - round(exact)) < 1e-6 else exact


def _pattern(facts: Facts) -> tuple[int, int] | None:
    """(layers with a window, layers without behind them)."""
    found = facts.arg("interleaved_attn_pattern")
    if isinstance(found, list | tuple) and len(found) == 2:
        local, others = found
        if type(local) is int and type(others) is int and local >= 0 < local + others:
            return local, others
    return None


def _layer_types(facts: Facts) -> list[object] | None:
    found = facts.arg("interleaved_attn_pattern")
    if isinstance(found, list | tuple) and all(isinstance(kind, str) for kind in found):
        return list(found) if len(found) == facts.dims["layers"] else None
    if (pattern := _pattern(facts)) is None:
        return None
    local, others = pattern
    return [
        "sliding_attention" if layer % (local + others) < local else "full_attention"
        for layer in range(facts.dims["layers"])
    ]


def _window(facts: Facts) -> int | None:
    """Megatron-Bridge has transformers' number here, not the pair of TransformerConfig."""
    found = facts.arg("window_size")
    return found if type(found) is int else None


def _every(facts: Facts) -> Soft | None:
    """transformers 4 asks which layers have no window."""
    pattern = _pattern(facts)
    return Soft(pattern[0] + 1) if pattern is not None and pattern[1] == 1 else None


GEMMA3_TEXT = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    rules=(EMBED, *GQA, *QK_NORM_AT_ZERO, *GATED_MLP, *at_zero(*SANDWICH_NORMS, NORM), HEAD),
    config={
        **{name: key for name, key in BASE_KEYS.items() if name != "hidden_act"},
        **GQA_KEYS,
        "hidden_activation": TANH_GELU,
        "attention_bias": constant(False),
        "query_pre_attn_scalar": Key(_query_scalar),
        "attn_logit_softcapping": constant(None),
        "final_logit_softcapping": constant(None),
        "sliding_window": Key(_window),
        "sliding_window_pattern": Key(_every, None),
        "layer_types": Key(_layer_types),
        "rope_theta": _base(1),
        "rope_local_base_freq": _base(0),
        "rope_scaling": Key(_rope_scaling, None),
    },
    requires={
        **decoder_requires("window_size", "softmax_scale"),
        **GEGLU_REQUIRES,
        **NORMS_AT_ZERO,
        "use_rope_scaling": (False,),
    },
)
