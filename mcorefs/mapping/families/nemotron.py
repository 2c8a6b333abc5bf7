"""Nemotron-3, Nemotron-4 and Minitron: LayerNorm with biases, its weights centred at zero, squared
ReLU that gates nothing, part of each head rotated."""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA_ALL_OR_NO_BIAS, QKV_BIAS
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    EPSILON,
    GQA_KEYS,
    NORMS_AT_ZERO,
    PARTIAL_ROTARY,
    decoder_requires,
    holds,
)
from mcorefs.mapping.blocks.mlp import MLP_ALL_OR_NO_BIAS, MLP_BIAS
from mcorefs.mapping.blocks.model import EMBED, HEAD, at_zero, layer_norm
from mcorefs.mapping.blocks.names import INPUT_NORM, LAYER, MLP_NORM
from mcorefs.mapping.family import Family, Key

NEMOTRON = Family(
    name="nemotron",
    architecture="NemotronForCausalLM",
    rules=(
        EMBED,
        *GQA_ALL_OR_NO_BIAS,
        *MLP_ALL_OR_NO_BIAS,
        *at_zero(
            *layer_norm(LAYER + "input_layernorm.", *INPUT_NORM),
            *layer_norm(LAYER + "post_attention_layernorm.", *MLP_NORM),
            *layer_norm("model.norm.", "decoder.final_layernorm."),
        ),
        HEAD,
    ),
    config={
        **{name: key for name, key in BASE_KEYS.items() if name != "rms_norm_eps"},
        **GQA_KEYS,
        "norm_eps": EPSILON,
        "hidden_act": Key(lambda facts: "relu2"),
        "partial_rotary_factor": PARTIAL_ROTARY,
        "attention_bias": holds(QKV_BIAS),
        "mlp_bias": holds(MLP_BIAS),
    },
    requires={
        **decoder_requires("add_bias_linear", "add_qkv_bias", "rotary_percent"),
        **NORMS_AT_ZERO,
        "normalization": ("LayerNorm",),
        "swiglu": (False,),
        "squared_relu": (True,),
    },
)
