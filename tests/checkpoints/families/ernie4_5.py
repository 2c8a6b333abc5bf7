"""ERNIE 4.5, dense: neighbours rotated together on both sides."""

from __future__ import annotations

from ..spec import Spec
from .base import Family, Values, decoder_config

_ERNIE = Spec(family="ernie4_5", kv_heads=2, norm_eps=1e-5, rope_theta=500_000)


def _config(spec: Spec) -> Values:
    return {**decoder_config(spec), "use_bias": spec.linear_bias}


def _arguments(spec: Spec) -> Values:
    return {"rotary_interleaved": True}


ERNIE4_5 = Family(
    {
        "ernie4_5-tp2": _ERNIE.but(tp=2, tied=True, vocab_size_in_args=True, seed=260),
        "ernie4_5-tp2-biased": _ERNIE.but(tp=2, linear_bias=True, seed=261),
        "ernie4_5-pp2": _ERNIE.but(pp=2, dtype="fp32", per_layer_keys=True, seed=262),
        "torch-ernie4_5-tp2-pp2": _ERNIE.but(format="torch", tp=2, pp=2, names="te", seed=263),
    },
    config=_config,
    arguments=_arguments,
)
