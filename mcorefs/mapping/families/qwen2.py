"""Qwen2, Qwen2.5 and QwQ: Llama with biases on q, k and v; small sizes tie their embeddings."""

from __future__ import annotations

from mcorefs.mapping.blocks import (
    BASE_KEYS,
    DECODER_REQUIRES,
    EMBED,
    FULL_ATTENTION_KEYS,
    GATED_MLP,
    GQA_BIASED,
    GQA_KEYS,
    HEAD,
    LAYER_NORMS,
    NORM,
)
from mcorefs.mapping.family import Family

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    rules=(EMBED, *GQA_BIASED, *GATED_MLP, *LAYER_NORMS, NORM, HEAD),
    config={
        **BASE_KEYS,
        **{name: key for name, key in GQA_KEYS.items() if name != "attention_bias"},
        **FULL_ATTENTION_KEYS,
    },
    has=(
        "decoder.layers.*.self_attention.linear_qkv.weight",
        "decoder.layers.*.self_attention.linear_qkv.bias",
        "decoder.layers.*.mlp.linear_fc1.weight",
    ),
    lacks=(
        "decoder.layers.*.mlp.router.",
        "decoder.layers.*.mlp.linear_fc1.bias",
        "decoder.layers.*.self_attention.q_layernorm.",
        "decoder.layers.*.post_self_attn_layernorm.",
        "decoder.layers.*.post_mlp_layernorm.",
        "mtp.",
    ),
    requires={**DECODER_REQUIRES, "add_qkv_bias": (True,)},
)
