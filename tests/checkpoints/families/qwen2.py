"""Qwen2 and 2.5: biases on q, k and v."""

from __future__ import annotations

from ..spec import Spec
from .base import Family, Values

_QWEN2 = Spec(family="qwen2", head_dim=8)


def _arguments(spec: Spec) -> Values:
    return {"add_qkv_bias": True}


QWEN2 = Family(
    {
        "qwen2-tp2-pp2": _QWEN2.but(tp=2, pp=2, seed=37),
        "qwen2-tp4-gqa2-tied": _QWEN2.but(
            tp=4, kv_heads=2, tied=True, vocab_divisible_by=32, seed=38
        ),
        "torch-qwen2-tp2-tied": _QWEN2.but(format="torch", tp=2, tied=True, seed=71),
    },
    arguments=_arguments,
)
