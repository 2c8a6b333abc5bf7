"""GLM-4.1V and GLM-4.5V (4.6V): the language models of GLM-4 and GLM-4.5, and a vision model before
them, which joins neighbouring patches by a convolution.

That is always transformers' own module, which ms-swift, Megatron-Bridge and mbridge train
(mcore-bridge:src/mcore_bridge/model/mm_gpts/glm.py, Megatron-Bridge:src/megatron/bridge/models/
glm_vl, mbridge:mbridge/models/glm4_vl). GLM-4.1V rotates neighbours, GLM-4.5V halves: mbridge lets
both rotate halves, which is another model than the first.
"""

from __future__ import annotations

import math
from dataclasses import replace

from mcorefs.mapping.blocks.attention import QK_NORM_WEIGHT, QKV_BIAS
from mcorefs.mapping.blocks.keys import MODEL_KEYS, arg, dim, holds
from mcorefs.mapping.blocks.vision import (
    PATCHES,
    VISION_KEYS,
    fills_hidden,
    in_language_model,
    of_module,
    only,
)
from mcorefs.mapping.families.glm4 import GLM4
from mcorefs.mapping.families.glm4_moe import GLM4_MOE
from mcorefs.mapping.family import Facts, Key, Rule, Section
from mcorefs.names import VISION

_BLOCK = "blocks.{layer}."
_QKV_BIAS = VISION + "blocks.*.attn.qkv.bias"
_SHAPES: dict[str, tuple[str, ...]] = {
    "embeddings.position_embedding.weight": ("vision_positions", "vision_hidden"),
    "patch_embed.proj.weight": PATCHES,
    "patch_embed.proj.bias": ("vision_hidden",),
    _BLOCK + "norm1.weight": ("vision_hidden",),
    _BLOCK + "norm2.weight": ("vision_hidden",),
    _BLOCK + "attn.qkv.weight": ("vision_qkv", "vision_hidden"),
    _BLOCK + "attn.qkv.bias": ("vision_qkv",),
    _BLOCK + "attn.proj.weight": ("vision_hidden", "vision_hidden"),
    _BLOCK + "mlp.gate_proj.weight": ("hidden", "vision_hidden"),
    _BLOCK + "mlp.up_proj.weight": ("hidden", "vision_hidden"),
    _BLOCK + "mlp.down_proj.weight": ("vision_hidden", "hidden"),
    "merger.proj.weight": ("hidden", "hidden"),
    "merger.post_projection_norm.weight": ("hidden",),
    "merger.post_projection_norm.bias": ("hidden",),
    "merger.gate_proj.weight": ("vision_merger_ffn", "hidden"),
    "merger.up_proj.weight": ("vision_merger_ffn", "hidden"),
    "merger.down_proj.weight": ("hidden", "vision_merger_ffn"),
    "post_conv_layernorm.weight": ("vision_hidden",),
    "downsample.weight": ("hidden", "vision_hidden", "vision_merge", "vision_merge"),
    "downsample.bias": ("hidden",),
    "post_layernorm.weight": ("vision_hidden",),
}
"""Its MLPs are as wide as the language model, and intermediate_size is the width of the merger."""
_SEES = tuple(
    replace(rule, when=_QKV_BIAS if rule.hf.endswith("qkv.bias") else "")
    for rule in of_module("model.visual.", _SHAPES)
)


def _image_size(facts: Facts) -> int | None:
    """Of the square image that has an embedding for the position of each of its patches."""
    positions, patch = (facts.dims.get(f"vision_{name}", 0) for name in ("positions", "patch"))
    side = math.isqrt(positions)
    return side * patch if side * side == positions else None


_VISION_KEYS = {
    **{name: key for name, key in VISION_KEYS.items() if name != "num_position_embeddings"},
    "intermediate_size": dim("vision_merger_ffn"),
    "image_size": Key(_image_size),
    "attention_bias": holds(_QKV_BIAS),
    "hidden_act": Key(lambda facts: None, "silu"),
    "rms_norm_eps": Key(lambda facts: None, 1e-5),
}
_TOKENS = ("image", "video", "image_start", "image_end", "video_start", "video_end")
_TOP_KEYS = {
    "tie_word_embeddings": MODEL_KEYS["tie_word_embeddings"],
    **{f"{what}_token_id": arg(f"{what}_token_id") for what in _TOKENS},
}
_REQUIRES = {"position_embedding_type": ("mrope", "rope"), "mrope_interleaved": (False,)}


def _with_biases(rule: Rule) -> Rule:
    """`rule` of a model that always has biases on q, k and v."""
    return replace(rule, when="") if rule.when == QKV_BIAS else rule


GLM4V = GLM4.but(
    name="glm4v",
    architecture="Glm4vForConditionalGeneration",
    rules=(*_SEES, *in_language_model(map(_with_biases, GLM4.rules))),
    config=_TOP_KEYS,
    sections={
        "text_config": Section("glm4v_text", only(GLM4.config, "head_dim", interleaved=False)),
        "vision_config": Section("glm4v_vision", _VISION_KEYS),
    },
    checks=(fills_hidden,),
    requires={**GLM4.requires, **_REQUIRES, "add_qkv_bias": (True,)},
)
GLM4V_MOE = GLM4_MOE.but(
    name="glm4v_moe",
    architecture="Glm4vMoeForConditionalGeneration",
    rules=(
        *_SEES,
        *in_language_model(
            rule for rule in GLM4_MOE.rules if rule.stack != "mtp" and rule.when != QK_NORM_WEIGHT
        ),
    ),
    config=_TOP_KEYS,
    sections={
        "text_config": Section(
            "glm4v_moe_text", only(GLM4_MOE.config, "num_nextn_predict_layers", interleaved=False)
        ),
        "vision_config": Section("glm4v_moe_vision", _VISION_KEYS),
    },
    requires={**GLM4_MOE.requires, **_REQUIRES, "rotary_interleaved": (False,)},
)
"""Engines look for use_qk_norm: it is always false."""
