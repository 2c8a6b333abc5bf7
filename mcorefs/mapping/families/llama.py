"""Llama 2 and 3: what a decoder of RMSNorm, SwiGLU and RoPE is without anything special; with
biases in all of its linear layers (--add-bias-linear), or in none."""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA_ALL_OR_NO_BIAS, QKV_BIAS
from mcorefs.mapping.blocks.keys import BASE_KEYS, GQA_KEYS, decoder_requires, holds
from mcorefs.mapping.blocks.mlp import GATED_MLP_ALL_OR_NO_BIAS, MLP_BIAS
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.family import Family

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    rules=(EMBED, *GQA_ALL_OR_NO_BIAS, *GATED_MLP_ALL_OR_NO_BIAS, *LAYER_NORMS, NORM, HEAD),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        "attention_bias": holds(QKV_BIAS),
        "mlp_bias": holds(MLP_BIAS),
    },
    requires=decoder_requires("add_bias_linear", "add_qkv_bias"),
)
