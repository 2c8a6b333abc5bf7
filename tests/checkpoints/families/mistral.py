"""Mistral 7B and Nemo: a sliding window, heads that do not fill the hidden size."""

from __future__ import annotations

from ..spec import Spec
from .base import Family, Values, decoder_config

_MISTRAL = Spec(family="mistral", window=8, kv_heads=2, norm_eps=1e-5, rope_theta=10_000)


def _config(spec: Spec) -> Values:
    return {**decoder_config(spec), "sliding_window": spec.window}


MISTRAL = Family(
    {
        "mistral-tp2": _MISTRAL.but(tp=2, vocab_size_in_args=True, seed=110),
        "mistral-pp2-fp32": _MISTRAL.but(pp=2, dtype="fp32", tied=True, seed=111),
        "torch-mistral-tp2-pp2": _MISTRAL.but(format="torch", tp=2, pp=2, names="te", seed=112),
    },
    config=_config,
)
