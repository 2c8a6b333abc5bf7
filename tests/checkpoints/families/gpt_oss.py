"""gpt-oss: sinks, windows in some layers, biases everywhere, experts fused and transposed, YaRN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import Spec
from .base import (
    DECODER,
    EXPERT,
    HF_LAYER,
    LAYER,
    Family,
    Made,
    Place,
    Rows,
    Values,
    Whole,
    decoder_config,
)

_GPT_OSS = Spec(
    family="gpt_oss",
    experts=8,
    linear_bias=True,
    window=8,
    norm_eps=1e-5,
    rope_theta=150_000,
    etp=1,
    vocab_size=301,
)
_MLP = HF_LAYER + "mlp."
_CLAMP = 0.05
"""Low enough that many of these small values are clamped."""
_YARN = {"factor": 8.0, "original": 16, "beta_fast": 2.0, "beta_slow": 0.05}


def _slides(spec: Spec) -> list[int]:
    """1 for layers with a window: every second, but where there is a pipeline."""
    return [1, 1, 0, 1] if spec.pp > 1 else [1, 0, 1, 0]


def _one(tensors: Sequence[Tensor], place: Place) -> Tensor:
    """One expert of a tensor that holds all of them, each transposed: [expert, in, out]; or of
    their biases. megatron-core has no biased experts that are cut over ranks."""
    if place.size > 1 or place.expert is None:
        raise ValueError(f"biased experts at {place}")
    return tensors[0][place.expert].T.contiguous()


def _gate_up(tensors: Sequence[Tensor], place: Place) -> Tensor:
    """Likewise, gate and up in turns: Megatron has all gate rows, then all up rows."""
    one = _one(tensors, place)
    return torch.cat([one[0::2], one[1::2]])


def _config(spec: Spec) -> Values:
    types = {1: "sliding_attention", 0: "full_attention"}
    return {
        **decoder_config(spec),
        "intermediate_size": spec.moe_ffn,
        "num_local_experts": spec.experts,
        "num_experts_per_tok": spec.topk,
        "swiglu_limit": _CLAMP,
        "sliding_window": spec.window,
        "layer_types": [types[one] for one in _slides(spec)],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": float(spec.rope_theta),
            "factor": _YARN["factor"],
            "original_max_position_embeddings": _YARN["original"],
            "beta_fast": _YARN["beta_fast"],
            "beta_slow": _YARN["beta_slow"],
            "truncate": False,
        },
    }


def _arguments(spec: Spec) -> Values:
    return {
        "swiglu": False,
        "quick_geglu": True,
        "bias_gelu_fusion": False,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": _CLAMP,
        "softmax_type": "learnable",
        "window_attn_skip_freq": _slides(spec) if spec.pp > 1 else 2,
        "position_embedding_type": "yarn",
        "rotary_scaling_factor": _YARN["factor"],
        "yarn_original_max_position_embeddings": _YARN["original"],
        "yarn_beta_fast": _YARN["beta_fast"],
        "yarn_beta_slow": _YARN["beta_slow"],
        "yarn_correction_range_round_to_int": False,
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
    }


GPT_OSS = Family(
    {
        "gpt_oss-tp2-ep2": _GPT_OSS.but(
            tp=2, ep=2, hf_max_shard_size="200KB", vocab_size_in_args=True, seed=150
        ),
        "gpt_oss-tp2-square": _GPT_OSS.but(tp=2, moe_ffn=64, topk=4, per_layer_keys=True, seed=151),
        "gpt_oss-pp2-ep2": _GPT_OSS.but(pp=2, dp=2, ep=2, tied=True, seed=152),
        "torch-gpt_oss-tp2-pp2-ep2": _GPT_OSS.but(
            format="torch", tp=2, pp=2, ep=2, names="te", seed=153
        ),
        "torch-gpt_oss-tp2": _GPT_OSS.but(format="torch", tp=2, moe_ffn=32, seed=154),
    },
    config=_config,
    arguments=_arguments,
    parameters={
        **DECODER,
        LAYER + "self_attention.core_attention.softmax_offset": Rows(HF_LAYER + "self_attn.sinks"),
        LAYER + "mlp.router.weight": Whole(_MLP + "router.weight"),
        LAYER + "mlp.router.bias": Whole(_MLP + "router.bias"),
        EXPERT + "linear_fc1.weight": Made((_MLP + "experts.gate_up_proj",), _gate_up),
        EXPERT + "linear_fc1.bias": Made((_MLP + "experts.gate_up_proj_bias",), _gate_up),
        EXPERT + "linear_fc2.weight": Made((_MLP + "experts.down_proj",), _one),
        EXPERT + "linear_fc2.bias": Made((_MLP + "experts.down_proj_bias",), _one),
    },
)
