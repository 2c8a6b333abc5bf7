"""Gemma 3's text model, as Megatron-Bridge's provider has it. megatron-core alone has one rotary
base for all layers: it computes those with one (all but `beyond_core`)."""

from __future__ import annotations

from ..spec import Spec
from .base import Family, Values, decoder_config
from .gemma import ARGUMENTS, BUILT
from .gemma2 import OUTPUT_NORMS, SANDWICH

_GEMMA3 = Spec(family="gemma3_text", tied=True, layers=6, window=8, output_norms=OUTPUT_NORMS)
_SCALAR = 24
_LOCAL = 2
"""Layers with a window before each without."""


def _local_base(spec: Spec) -> int:
    return 10_000 if spec.beyond_core else spec.rope_theta


def _config(spec: Spec) -> Values:
    bases = {"full_attention": spec.rope_theta, "sliding_attention": _local_base(spec)}
    kinds = ["sliding_attention"] * _LOCAL + ["full_attention"]
    return {
        **decoder_config(spec),
        "sliding_window": spec.window,
        "query_pre_attn_scalar": _SCALAR,
        "sliding_window_pattern": len(kinds),
        "layer_types": [kinds[layer % len(kinds)] for layer in range(spec.layers)],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": float(base)}
            for kind, base in bases.items()
        },
    }


def _arguments(spec: Spec) -> Values:
    return {
        **ARGUMENTS,
        "qk_layernorm": True,
        "window_size": spec.window,
        "interleaved_attn_pattern": (_LOCAL, 1),
        "rotary_base": (_local_base(spec), spec.rope_theta),
        "rope_scaling_factor": 1.0,
        "softmax_scale": _SCALAR**-0.5,
    }


def _built(spec: Spec) -> Values:
    window = (spec.window or 0) - 1
    return {
        **BUILT,
        "window_size": (window, 0),
        "window_attn_skip_freq": _LOCAL + 1,
        "rotary_base": spec.rope_theta,
    }


GEMMA3_TEXT = Family(
    {
        "gemma3_text-tp2-one-base": _GEMMA3.but(tp=2, vocab_size_in_args=True, seed=230),
        "gemma3_text-tp2-pp2": _GEMMA3.but(tp=2, pp=2, beyond_core=True, seed=231),
        "torch-gemma3_text-tp2": _GEMMA3.but(
            format="torch", tp=2, names="te", beyond_core=True, seed=232
        ),
        "torch-gemma3_text-pp2": _GEMMA3.but(format="torch", pp=2, beyond_core=True, seed=233),
    },
    config=_config,
    arguments=_arguments,
    built=_built,
    parameters=SANDWICH,
)
