"""Llama 2 and 3: what a decoder of RMSNorm, SwiGLU and RoPE is without anything special."""

from __future__ import annotations

from mcorefs.mapping.blocks import (
    BASE_KEYS,
    DECODER_REQUIRES,
    EMBED,
    GATED_MLP,
    GQA,
    GQA_KEYS,
    HEAD,
    LAYER_NORMS,
    NORM,
    constant,
)
from mcorefs.mapping.family import Family

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    rules=(EMBED, *GQA, *GATED_MLP, *LAYER_NORMS, NORM, HEAD),
    config={**BASE_KEYS, **GQA_KEYS, "mlp_bias": constant(False)},
    has=(
        "decoder.layers.*.self_attention.linear_qkv.weight",
        "decoder.layers.*.mlp.linear_fc1.weight",
    ),
    lacks=(
        "decoder.layers.*.mlp.router.",
        "decoder.layers.*.mlp.linear_fc1.bias",
        "decoder.layers.*.self_attention.linear_qkv.bias",
        "decoder.layers.*.self_attention.q_layernorm.",
        "decoder.layers.*.post_self_attn_layernorm.",
        "decoder.layers.*.post_mlp_layernorm.",
        "embedding.position_embeddings.",
        "mtp.",
    ),
    requires=DECODER_REQUIRES,
)
