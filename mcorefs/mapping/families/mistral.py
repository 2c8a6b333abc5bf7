"""Mistral 7B and Nemo: Llama with a sliding window (--window-size). Without one it is what Llama
is, and is served as that unless it is named."""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA
from mcorefs.mapping.blocks.keys import BASE_KEYS, GQA_KEYS, SLIDING_WINDOW, decoder_requires
from mcorefs.mapping.blocks.mlp import GATED_MLP
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.family import Family

MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    rules=(EMBED, *GQA, *GATED_MLP, *LAYER_NORMS, NORM, HEAD),
    config={**BASE_KEYS, **GQA_KEYS, "sliding_window": SLIDING_WINDOW},
    requires={**decoder_requires("window_size"), "window_attn_skip_freq": ()},
    given=("window_size",),
)
