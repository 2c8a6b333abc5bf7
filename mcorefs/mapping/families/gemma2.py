"""Gemma 2: Gemma with norms of what attention and MLP put out, scores and logits that are capped,
and a window in every other layer, beginning with the first.

Megatron-Bridge:src/megatron/bridge/models/gemma/gemma2_provider.py.
"""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    GEGLU_REQUIRES,
    GQA_KEYS,
    NORMS_AT_ZERO,
    TANH_GELU,
    arg,
    constant,
    decoder_requires,
    window,
)
from mcorefs.mapping.blocks.mlp import GATED_MLP
from mcorefs.mapping.blocks.model import EMBED, HEAD, NORM, SANDWICH_NORMS, at_zero
from mcorefs.mapping.family import Facts, Family, Key, Proven


def _cap(name: str) -> Key:
    """transformers has null for what Megatron-Bridge takes for none: 0."""

    def value(facts: Facts) -> object | None:
        found = facts.arg(name)
        return Proven(None) if found == 0 else found

    return Key(value)


def _layer_types(facts: Facts) -> list[str]:
    return [
        "full_attention" if layer % 2 else "sliding_attention"
        for layer in range(facts.dims["layers"])
    ]


GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    rules=(EMBED, *GQA, *GATED_MLP, *at_zero(*SANDWICH_NORMS, NORM), HEAD),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        "hidden_act": TANH_GELU,
        "hidden_activation": TANH_GELU,
        "attention_bias": constant(False),
        "query_pre_attn_scalar": arg("query_pre_attn_scalar"),
        "attn_logit_softcapping": _cap("attn_logit_softcapping"),
        "final_logit_softcapping": _cap("final_logit_softcapping"),
        "sliding_window": Key(window),
        "layer_types": Key(_layer_types),
    },
    requires={
        **decoder_requires("window_size"),
        **GEGLU_REQUIRES,
        **NORMS_AT_ZERO,
        "window_attn_skip_freq": (2,),
    },
)
