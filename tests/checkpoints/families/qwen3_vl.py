"""Qwen3-VL's dense model: Qwen3, and what sees for it."""

from __future__ import annotations

from ..spec import Spec
from .base import Family, Values, decoder_config, rope

_QWEN3_VL = Spec(family="qwen3_vl", vision="megatron-bridge", common="no_args")
MROPE = [4, 2, 2]
IMAGE, VIDEO, START, END = 290, 291, 292, 293
"""Token ids."""


def text_config(spec: Spec) -> Values:
    rotary = {**rope(spec), "mrope_section": MROPE, "mrope_interleaved": True}
    return {**decoder_config(spec), "rope_parameters": rotary}


def seeing_config(spec: Spec) -> Values:
    return {
        "vision_config": {
            "depth": 3,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_heads": 4,
            "out_hidden_size": spec.hidden,
            "num_position_embeddings": 36,
            "patch_size": 4,
            "deepstack_visual_indexes": [0, 2],
        },
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    }


def arguments(spec: Spec) -> Values:
    return {
        "qk_layernorm": True,
        "position_embedding_type": "mrope",
        "mrope_section": MROPE,
    }


QWEN3_VL = Family(
    {
        "qwen3_vl-bridge-tp2": _QWEN3_VL.but(tp=2, hf_max_shard_size="60KB", seed=300),
        "qwen3_vl-swift-pp2-tied": _QWEN3_VL.but(
            vision="ms-swift", pp=2, tied=True, common="common.pt", seed=301
        ),
        "qwen3_vl-megatron-tp2-pp2": _QWEN3_VL.but(vision="megatron", tp=2, pp=2, seed=302),
        "qwen3_vl-megatron-per-layer-fp32": _QWEN3_VL.but(
            vision="megatron", per_layer_keys=True, dtype="fp32", seed=303
        ),
        "torch-qwen3_vl-swift-tp2-pp2": _QWEN3_VL.but(
            format="torch", vision="ms-swift", tp=2, pp=2, common="common.pt", seed=304
        ),
        "torch-qwen3_vl-megatron-tp2": _QWEN3_VL.but(
            format="torch", vision="megatron", tp=2, names="te", seed=305
        ),
    },
    config=text_config,
    arguments=arguments,
    vision=seeing_config,
)
