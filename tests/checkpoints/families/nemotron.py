"""Nemotron-4: LayerNorm around zero, squared ReLU, part of each head rotated."""

from __future__ import annotations

from ..spec import Spec
from .base import DECODER, HF_LAYER, LAYER, Family, Rows, Values, Whole, decoder_config, rope

_NEMOTRON = Spec(family="nemotron", norm_eps=1e-5, rope_theta=10_000)
_ROTATED = 0.5


def _config(spec: Spec) -> Values:
    config = {name: value for name, value in decoder_config(spec).items() if name != "rms_norm_eps"}
    return {
        **config,
        "norm_eps": spec.norm_eps,
        "rope_parameters": {**rope(spec), "partial_rotary_factor": _ROTATED},
        "attention_bias": spec.linear_bias,
        "mlp_bias": spec.linear_bias,
        "initializer_range": 0.02,
    }


def _arguments(spec: Spec) -> Values:
    return {
        "normalization": "LayerNorm",
        "apply_layernorm_1p": True,
        "swiglu": False,
        "squared_relu": True,
        "bias_gelu_fusion": False,
        "rotary_percent": _ROTATED,
    }


NEMOTRON = Family(
    {
        "nemotron-tp2": _NEMOTRON.but(tp=2, vocab_size_in_args=True, seed=200),
        "nemotron-tp2-biased": _NEMOTRON.but(tp=2, linear_bias=True, tied=True, seed=201),
        "nemotron-pp2-fp32": _NEMOTRON.but(pp=2, dtype="fp32", per_layer_keys=True, seed=202),
        "nemotron-tp2-neighbours": _NEMOTRON.but(tp=2, rotary_interleaved=True, seed=205),
        "torch-nemotron-tp2": _NEMOTRON.but(format="torch", tp=2, seed=203),
        "torch-nemotron-tp2-pp2": _NEMOTRON.but(format="torch", tp=2, pp=2, names="te", seed=204),
    },
    config=_config,
    arguments=_arguments,
    parameters={
        **DECODER,
        LAYER + "input_layernorm.bias": Whole(HF_LAYER + "input_layernorm.bias"),
        LAYER + "pre_mlp_layernorm.bias": Whole(HF_LAYER + "post_attention_layernorm.bias"),
        "decoder.final_layernorm.bias": Whole("model.norm.bias"),
        LAYER + "mlp.linear_fc1.weight": Rows(HF_LAYER + "mlp.up_proj.weight"),
        LAYER + "mlp.linear_fc1.bias": Rows(HF_LAYER + "mlp.up_proj.bias"),
    },
)
