"""Gemma: Megatron-Bridge and NeMo train it, whose TransformerConfig has what it needs."""

from __future__ import annotations

from ..spec import Spec
from .base import Family, Values

_GEMMA = Spec(family="gemma", tied=True, rope_theta=10_000)
ARGUMENTS: Values = {
    "swiglu": False,
    "gated_linear_unit": True,
    "activation_func": "fast_gelu",
    "apply_layernorm_1p": None,
    "layernorm_zero_centered_gamma": True,
}
BUILT: Values = {"scale_embedding": True}

GEMMA = Family(
    {
        "gemma-tp2": _GEMMA.but(tp=2, vocab_size_in_args=True, seed=210),
        "gemma-mqa": _GEMMA.but(kv_heads=1, head_dim=32, dtype="fp32", seed=211),
        "gemma-pp2": _GEMMA.but(pp=2, per_layer_keys=True, seed=212),
        "torch-gemma-tp2": _GEMMA.but(format="torch", tp=2, names="te", seed=213),
    },
    arguments=lambda spec: ARGUMENTS,
    built=lambda spec: BUILT,
)
