"""ERNIE 4.5, dense: Llama, with neighbours rotated together on both sides. What Megatron trains so
is served as Llama, in the order of its halves, unless this is named."""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA_ALL_OR_NO_BIAS, QKV_BIAS, as_stored
from mcorefs.mapping.blocks.keys import BASE_KEYS, GQA_KEYS, decoder_requires, holds
from mcorefs.mapping.blocks.mlp import GATED_MLP_ALL_OR_NO_BIAS
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.family import Family

ERNIE4_5 = Family(
    name="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    rules=(
        EMBED,
        *as_stored(*GQA_ALL_OR_NO_BIAS),
        *GATED_MLP_ALL_OR_NO_BIAS,
        *LAYER_NORMS,
        NORM,
        HEAD,
    ),
    config={
        **{name: key for name, key in BASE_KEYS.items() if name != "attention_dropout"},
        **GQA_KEYS,
        "use_bias": holds(QKV_BIAS),
    },
    requires={
        **decoder_requires("add_bias_linear", "add_qkv_bias"),
        "rotary_interleaved": (True,),
    },
    named_only=True,
)
