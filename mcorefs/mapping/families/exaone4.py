"""EXAONE 4: norms behind attention and MLP instead of before them, and norms of heads. Of the large
one, most layers have a window, and the others rotate nothing.

Megatron-Bridge:src/megatron/bridge/models/exaone/exaone4/.
"""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA, QK_NORM
from mcorefs.mapping.blocks.exaone import HYBRID_WINDOW_KEYS, full_layers_do_not_rotate
from mcorefs.mapping.blocks.keys import BASE_KEYS, GQA_KEYS, decoder_requires
from mcorefs.mapping.blocks.mlp import GATED_MLP
from mcorefs.mapping.blocks.model import EMBED, HEAD, NORM, norm
from mcorefs.mapping.blocks.names import ATTENTION_OUTPUT_NORM, LAYER, MLP_OUTPUT_NORM
from mcorefs.mapping.family import Family

EXAONE4 = Family(
    name="exaone4",
    architecture="Exaone4ForCausalLM",
    rules=(
        EMBED,
        *GQA,
        *QK_NORM,
        *GATED_MLP,
        norm(LAYER + "post_attention_layernorm.", *ATTENTION_OUTPUT_NORM),
        norm(LAYER + "post_feedforward_layernorm.", *MLP_OUTPUT_NORM),
        NORM,
        HEAD,
    ),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        **HYBRID_WINDOW_KEYS,
    },
    requires=decoder_requires("window_size", "no_rope_freq"),
    checks=(full_layers_do_not_rotate,),
)
