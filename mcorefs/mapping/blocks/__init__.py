"""The vocabulary that families are written in: blocks, rules and config keys that many share."""

from mcorefs.mapping.blocks.attention import (
    GQA,
    GQA_ALL_OR_NO_BIAS,
    GQA_QKV_BIAS,
    QK_NORM,
    QKV_BIAS,
)
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    DECODER_REQUIRES,
    FULL_ATTENTION_KEYS,
    GQA_KEYS,
    SLIDING_WINDOW,
    arg,
    constant,
    decoder_requires,
    dim,
    holds,
    soft_arg,
)
from mcorefs.mapping.blocks.mlp import (
    GATED_MLP,
    GATED_MLP_ALL_OR_NO_BIAS,
    MLP_BIAS,
    gated_experts,
    router,
)
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.blocks.names import LAYER, MLAYER

__all__ = [
    "BASE_KEYS",
    "DECODER_REQUIRES",
    "EMBED",
    "FULL_ATTENTION_KEYS",
    "GATED_MLP",
    "GATED_MLP_ALL_OR_NO_BIAS",
    "GQA",
    "GQA_ALL_OR_NO_BIAS",
    "GQA_KEYS",
    "GQA_QKV_BIAS",
    "HEAD",
    "LAYER",
    "LAYER_NORMS",
    "MLAYER",
    "MLP_BIAS",
    "NORM",
    "QKV_BIAS",
    "QK_NORM",
    "SLIDING_WINDOW",
    "arg",
    "constant",
    "decoder_requires",
    "dim",
    "gated_experts",
    "holds",
    "router",
    "soft_arg",
]
