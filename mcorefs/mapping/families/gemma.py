"""Gemma: norms around zero on both sides, a gate of GELU, an embedding that is scaled when it is
used. The last is not recorded, so that it must be named: Megatron-Bridge and NeMo do by the class
of its config."""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    DECODER_REQUIRES,
    GEGLU_REQUIRES,
    GQA_KEYS,
    NORMS_AT_ZERO,
    TANH_GELU,
    constant,
)
from mcorefs.mapping.blocks.mlp import GATED_MLP
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM, at_zero
from mcorefs.mapping.family import Family

GEMMA = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    rules=(EMBED, *GQA, *GATED_MLP, *at_zero(*LAYER_NORMS, NORM), HEAD),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        "hidden_act": TANH_GELU,  # the hub's config says gelu, which transformers takes as this
        "attention_bias": constant(False),
    },
    requires={**DECODER_REQUIRES, **GEGLU_REQUIRES, **NORMS_AT_ZERO},
    named_only=True,
)
