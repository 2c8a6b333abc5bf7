"""Qwen2.5-VL: Qwen2.5, and what sees for it."""

from __future__ import annotations

from ..spec import Spec
from .base import Family, Values, decoder_config, rope
from .qwen3_vl import MROPE, seeing_config

_QWEN2_5_VL = Spec(
    family="qwen2_5_vl", vision="ms-swift", common="no_args", heads=4, kv_heads=2, head_dim=16
)


def _config(spec: Spec) -> Values:
    found = dict(decoder_config(spec))
    del found["head_dim"]
    return {**found, "rope_parameters": {**rope(spec), "mrope_section": MROPE}}


def _vision(spec: Spec) -> Values:
    return {
        **seeing_config(spec),
        "vision_config": {
            "depth": 3,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_heads": 4,
            "out_hidden_size": spec.hidden,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 3,
        },
    }


def _arguments(spec: Spec) -> Values:
    return {
        "add_qkv_bias": True,
        "position_embedding_type": "mrope",
        "mrope_section": MROPE,
    }


QWEN2_5_VL = Family(
    {
        "qwen2_5_vl-swift-tp2": _QWEN2_5_VL.but(tp=2, hf_max_shard_size="60KB", seed=340),
        "qwen2_5_vl-swift-pp2-tied": _QWEN2_5_VL.but(pp=2, tied=True, common="common.pt", seed=341),
        "torch-qwen2_5_vl-swift-tp2-pp2": _QWEN2_5_VL.but(
            format="torch", tp=2, pp=2, names="te", seed=342
        ),
    },
    config=_config,
    arguments=_arguments,
    vision=_vision,
    hub_names=True,
)
