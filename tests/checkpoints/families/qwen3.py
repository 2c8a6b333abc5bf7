"""Qwen3: norms of each query and key head. More fixtures of it are those of formats and layouts."""

from __future__ import annotations

from ..spec import Spec
from .base import Family, Values


def _arguments(spec: Spec) -> Values:
    return {"qk_layernorm": True}


QWEN3 = Family(
    {
        "qwen3-tp2-around-zero": Spec(tp=2, zero_centred=True, per_layer_keys=True, seed=53),
        "qwen3-tp2-neighbours": Spec(tp=2, zero_centred=True, rotary_interleaved=True, seed=54),
    },
    arguments=_arguments,
)
