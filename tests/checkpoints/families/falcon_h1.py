"""Falcon-H1: a Mamba mixer and attention side by side in each layer, and multipliers everywhere.

Modules of megatron-core, put together as Megatron-Bridge has them (see `falcon`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import Spec
from .base import (
    HF_LAYER,
    LAYER,
    PROJECTIONS,
    Columns,
    Family,
    Made,
    Norm,
    Place,
    Qkv,
    Rows,
    Value,
    Values,
    Vocabulary,
    decoder_config,
    gated_mlp,
)

HEADS, HEAD_DIM, GROUPS, STATE, KERNEL = 8, 12, 4, 10, 4
INNER, READ = HEADS * HEAD_DIM, GROUPS * STATE
MULTIPLIERS: Values = {
    "embedding_multiplier": 5.656854249492381,
    "lm_head_multiplier": 0.6,
    "key_multiplier": 0.39062499999999994,
    "attention_in_multiplier": 1.5,
    "attention_out_multiplier": 0.9375,
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.7,
    "mlp_multipliers": [0.8838834764831844, 1.7],
    "ssm_multipliers": [1.3, 0.85, 1.9, 0.5, 0.35],
}
"""By the same names on both sides."""

_FALCON_H1 = Spec(family="falcon_h1", pattern="PPPP", norm_eps=1e-5)
_WITHOUT_NORM = _FALCON_H1.but(mixer_norm=False, norm_eps=1e-6)


def _config(spec: Spec) -> Values:
    return {
        **decoder_config(spec),
        **MULTIPLIERS,
        "mamba_d_ssm": INNER,
        "mamba_n_heads": HEADS,
        "mamba_d_head": HEAD_DIM,
        "mamba_n_groups": GROUPS,
        "mamba_d_state": STATE,
        "mamba_d_conv": KERNEL,
        "mamba_chunk_size": 128,
        "mamba_rms_norm": spec.mixer_norm,
        "mamba_norm_before_gate": False,
    }


def _arguments(spec: Spec) -> Values:
    """FalconH1ModelProvider's fields, by its names."""
    return {
        **MULTIPLIERS,
        "mamba_num_heads": HEADS,
        "mamba_head_dim": HEAD_DIM,
        "mamba_num_groups": GROUPS,
        "mamba_state_dim": STATE,
        "d_conv": KERNEL,
        "conv_bias": True,
        "expand": 2,
        "chunk_size": 128,
        "rmsnorm": spec.mixer_norm,
        "norm_before_gate": False,
        "falconh1_ratio": 1.0,
        "hybrid_attention_ratio": 0.0,
        "hybrid_mlp_ratio": 0.0,
        "use_mamba_mem_eff_path": False,  # which is a kernel from end to end
    }


def _cut(sections: Sequence[Tensor], place: Place) -> Tensor:
    """A rank has its share of each section."""
    return torch.cat([section.chunk(place.size)[place.rank] for section in sections])


def _in_proj(tensors: Sequence[Tensor], place: Place) -> Tensor:
    """Gates, then what the convolution is given, then steps: FalconH1Mixer."""
    return _cut(torch.split(tensors[0], [INNER, INNER, READ, READ, HEADS]), place)


def _conv(tensors: Sequence[Tensor], place: Place) -> Tensor:
    return _cut(torch.split(tensors[0], [INNER, READ, READ]), place)


_MIXER, _HF_MIXER = LAYER + "mamba_mixer.", HF_LAYER + "mamba."
_PARAMETERS: dict[str, Value] = {
    "embedding.word_embeddings.weight": Vocabulary("model.embed_tokens.weight"),
    "output_layer.weight": Vocabulary("lm_head.weight"),
    "decoder.final_norm.weight": Norm("model.final_layernorm.weight"),
    LAYER + "norm.weight": Norm(HF_LAYER + "input_layernorm.weight"),
    LAYER + "pre_mlp_layernorm.weight": Norm(HF_LAYER + "pre_ff_layernorm.weight"),
    _MIXER + "in_proj.weight": Made((_HF_MIXER + "in_proj.weight",), _in_proj),
    _MIXER + "conv1d.weight": Made((_HF_MIXER + "conv1d.weight",), _conv),
    _MIXER + "conv1d.bias": Made((_HF_MIXER + "conv1d.bias",), _conv),
    **{_MIXER + name: Rows(_HF_MIXER + name) for name in ("A_log", "D", "dt_bias", "norm.weight")},
    _MIXER + "out_proj.weight": Columns(_HF_MIXER + "out_proj.weight"),
    LAYER + "self_attention.linear_qkv.weight": Qkv(HF_LAYER + "self_attn.{}_proj.weight"),
    LAYER + "self_attention.linear_proj.weight": Columns(HF_LAYER + "self_attn.o_proj.weight"),
    **gated_mlp(LAYER + "mlp.", HF_LAYER + "feed_forward.", PROJECTIONS),
}

FALCON_H1 = Family(
    {
        "falcon_h1-tp2": _FALCON_H1.but(
            tp=2, hf_max_shard_size="100KB", vocab_size_in_args=True, seed=320
        ),
        "falcon_h1": _FALCON_H1.but(tied=True, seed=321),
        "falcon_h1-pp2-fp32": _WITHOUT_NORM.but(pp=2, dtype="fp32", seed=322),
        "falcon_h1-without-norm": _WITHOUT_NORM.but(tp=2, common="common_state", seed=323),
        "torch-falcon_h1-tp2-pp2": _FALCON_H1.but(format="torch", tp=2, pp=2, names="te", seed=324),
        "torch-falcon_h1-tp4": _WITHOUT_NORM.but(
            format="torch", tp=4, names="te", vocab_divisible_by=32, seed=325
        ),
        "fsdp-falcon_h1-dp2": _FALCON_H1.but(
            format="fsdp_dtensor", dp=2, main_weights=True, seed=326
        ),
    },
    config=_config,
    arguments=_arguments,
    parameters=_PARAMETERS,
)
