"""GLM-4 of 2025 (0414): norms of what attention and MLP put out, neighbours rotated together in
half of each head, gate and up in one tensor.

slime:scripts/models/glm4-9B.sh, mcore-bridge:src/mcore_bridge/model/gpts/glm4.py.
"""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA_QKV_OR_NO_BIAS, QKV_BIAS, as_stored
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    GQA_KEYS,
    PARTIAL_ROTARY,
    decoder_requires,
    holds,
)
from mcorefs.mapping.blocks.mlp import FUSED_GATED_MLP
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM, norm
from mcorefs.mapping.blocks.names import ATTENTION_OUTPUT_NORM, LAYER, MLP_OUTPUT_NORM
from mcorefs.mapping.family import Family

GLM4 = Family(
    name="glm4",
    architecture="Glm4ForCausalLM",
    rules=(
        EMBED,
        *as_stored(*GQA_QKV_OR_NO_BIAS),
        *FUSED_GATED_MLP,
        *LAYER_NORMS,
        norm(LAYER + "post_self_attn_layernorm.", *ATTENTION_OUTPUT_NORM),
        norm(LAYER + "post_mlp_layernorm.", *MLP_OUTPUT_NORM),
        NORM,
        HEAD,
    ),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        "partial_rotary_factor": PARTIAL_ROTARY,
        "attention_bias": holds(QKV_BIAS),
    },
    requires={
        **decoder_requires("add_qkv_bias", "rotary_percent"),
        "rotary_interleaved": (True,),
    },
)
