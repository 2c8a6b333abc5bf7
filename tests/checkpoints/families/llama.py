"""Llama 2 and 3."""

from __future__ import annotations

from ..spec import Spec
from .base import Family, Values, decoder_config

_LLAMA = Spec(family="llama", norm_eps=1e-5, rope_theta=500_000)


def _config(spec: Spec) -> Values:
    biased = spec.linear_bias
    return {**decoder_config(spec), "attention_bias": biased, "mlp_bias": biased}


LLAMA = Family(
    {
        "llama-tp2": _LLAMA.but(tp=2, llama3_rope_factor=8.0, hf_max_shard_size="50KB", seed=34),
        "llama-pp2-tied": _LLAMA.but(pp=2, tied=True, llama3_rope_factor=32.0, seed=35),
        "llama-mha-per-layer": _LLAMA.but(kv_heads=8, head_dim=8, per_layer_keys=True, seed=36),
        "llama-tp2-biased": _LLAMA.but(tp=2, linear_bias=True, seed=37),
        "llama-tp2-around-zero": _LLAMA.but(tp=2, zero_centred=True, seed=39),
        "torch-llama-tp2-pp2-around-zero": _LLAMA.but(
            format="torch", tp=2, pp=2, dtype="fp32", names="te", zero_centred=True, seed=40
        ),
        "llama-tp2-neighbours": _LLAMA.but(
            tp=2, rotary_interleaved=True, linear_bias=True, llama3_rope_factor=8.0, seed=41
        ),
        "torch-llama-tp2-biased": _LLAMA.but(format="torch", tp=2, linear_bias=True, seed=38),
        "torch-llama-tp2-pp2": _LLAMA.but(format="torch", names="te", tp=2, pp=2, seed=70),
        "zarr-llama-tp2-pp2": _LLAMA.but(
            format="zarr", tp=2, pp=2, llama3_rope_factor=8.0, common="no_args", seed=102
        ),
    },
    config=_config,
)
