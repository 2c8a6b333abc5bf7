"""Qwen3 dense: GQA with per-head q/k norms, gated MLP; small sizes tie their embeddings."""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA, QK_NORM, QKV_BIAS
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    DECODER_REQUIRES,
    FULL_ATTENTION_KEYS,
    GQA_KEYS,
    holds,
)
from mcorefs.mapping.blocks.mlp import GATED_MLP
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.family import Family

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    rules=(EMBED, *GQA, *QK_NORM, *GATED_MLP, *LAYER_NORMS, NORM, HEAD),
    config={**BASE_KEYS, **GQA_KEYS, **FULL_ATTENTION_KEYS, "attention_bias": holds(QKV_BIAS)},
    requires=DECODER_REQUIRES,
)
