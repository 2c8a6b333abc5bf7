"""Qwen3 dense: GQA with per-head q/k norms, gated MLP; small sizes tie their embeddings."""

from __future__ import annotations

from mcorefs.mapping.blocks import (
    BASE_KEYS,
    DECODER_REQUIRES,
    EMBED,
    FULL_ATTENTION_KEYS,
    GATED_MLP,
    GQA,
    GQA_KEYS,
    HEAD,
    LAYER_NORMS,
    NORM,
    QK_NORM,
    QKV_BIAS,
    holds,
)
from mcorefs.mapping.family import Family

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    rules=(EMBED, *GQA, *QK_NORM, *GATED_MLP, *LAYER_NORMS, NORM, HEAD),
    config={**BASE_KEYS, **GQA_KEYS, **FULL_ATTENTION_KEYS, "attention_bias": holds(QKV_BIAS)},
    requires=DECODER_REQUIRES,
)
