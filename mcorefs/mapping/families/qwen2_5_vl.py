"""Qwen2.5-VL: Qwen2.5, and a vision model before it most of whose blocks attend within windows.

Only as transformers' own vision module, which Megatron-Bridge and ms-swift train; mbridge's, of
Megatron's layers, holds other names (mbridge:mbridge/models/qwen2_5_vl). save_pretrained keeps the
names of the hub: no prefix before the language model's.
"""

from __future__ import annotations

from mcorefs.mapping.blocks.keys import arg, decoder_requires
from mcorefs.mapping.blocks.vision import (
    PATCHES,
    TOP_KEYS,
    VISION_KEYS,
    fills_hidden,
    of_module,
    only,
)
from mcorefs.mapping.families.qwen2 import QWEN2
from mcorefs.mapping.family import Key, Section

_BLOCK = "blocks.{layer}."
_SHAPES: dict[str, tuple[str, ...]] = {
    "patch_embed.proj.weight": PATCHES,
    _BLOCK + "norm1.weight": ("vision_hidden",),
    _BLOCK + "norm2.weight": ("vision_hidden",),
    _BLOCK + "attn.qkv.weight": ("vision_qkv", "vision_hidden"),
    _BLOCK + "attn.qkv.bias": ("vision_qkv",),
    _BLOCK + "attn.proj.weight": ("vision_hidden", "vision_hidden"),
    _BLOCK + "attn.proj.bias": ("vision_hidden",),
    _BLOCK + "mlp.gate_proj.weight": ("vision_ffn", "vision_hidden"),
    _BLOCK + "mlp.gate_proj.bias": ("vision_ffn",),
    _BLOCK + "mlp.up_proj.weight": ("vision_ffn", "vision_hidden"),
    _BLOCK + "mlp.up_proj.bias": ("vision_ffn",),
    _BLOCK + "mlp.down_proj.weight": ("vision_hidden", "vision_ffn"),
    _BLOCK + "mlp.down_proj.bias": ("vision_hidden",),
    "merger.ln_q.weight": ("vision_hidden",),
    "merger.mlp.0.weight": ("vision_merged", "vision_merged"),
    "merger.mlp.0.bias": ("vision_merged",),
    "merger.mlp.2.weight": ("hidden", "vision_merged"),
    "merger.mlp.2.bias": ("hidden",),
}


QWEN2_5_VL = QWEN2.but(
    name="qwen2_5_vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    rules=(*of_module("visual.", _SHAPES), *QWEN2.rules),
    config=TOP_KEYS,
    sections={
        "text_config": Section(
            "qwen2_5_vl_text", only(QWEN2.config, "head_dim", interleaved=False)
        ),
        "vision_config": Section(
            "qwen2_5_vl_vision",
            {
                **{n: key for n, key in VISION_KEYS.items() if n != "num_position_embeddings"},
                "hidden_act": Key(lambda facts: None, "silu"),
                "window_size": Key(lambda facts: None),
                "fullatt_block_indexes": arg("fullatt_block_indexes"),
                "tokens_per_second": Key(lambda facts: None),
            },
        ),
    },
    checks=(fills_hidden,),
    requires={
        **decoder_requires("position_embedding_type", "add_qkv_bias"),
        "add_qkv_bias": (True,),
        "position_embedding_type": ("mrope", "rope"),
        "mrope_interleaved": (False,),
        "rotary_interleaved": (False,),
    },
    natural_order=True,
)
