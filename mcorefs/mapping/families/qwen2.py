"""Qwen2, Qwen2.5 and QwQ: Llama with biases on q, k and v; small sizes tie their embeddings."""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA_QKV_BIAS
from mcorefs.mapping.blocks.keys import BASE_KEYS, DECODER_REQUIRES, FULL_ATTENTION_KEYS, GQA_KEYS
from mcorefs.mapping.blocks.mlp import GATED_MLP
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.family import Family

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    rules=(EMBED, *GQA_QKV_BIAS, *GATED_MLP, *LAYER_NORMS, NORM, HEAD),
    config={**BASE_KEYS, **GQA_KEYS, **FULL_ATTENTION_KEYS},
    requires={**DECODER_REQUIRES, "add_qkv_bias": (True,)},
)
