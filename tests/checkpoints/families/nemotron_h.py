"""Nemotron-H: Mamba layers, attention without positions, MLPs and experts of squared ReLU, each a
layer of its own.

megatron-core's own hybrid model is saved and computed (see `mamba` for its kernels).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import Spec
from .base import (
    EXPERT,
    LAYER,
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
    Whole,
)

HEADS, HEAD_DIM, GROUPS, STATE, KERNEL = 8, 12, 4, 10, 4
INNER, READ = HEADS * HEAD_DIM, GROUPS * STATE
NEVER = 1e-45
"""The shortest step that float32 has: transformers lengthens those that are shorter than
time_step_min, megatron-core none."""

_NEMOTRON_H = Spec(
    family="nemotron_h",
    pattern="M-M*-M*-",
    layers=8,
    hidden=64,
    heads=8,
    kv_heads=4,
    head_dim=16,
    norm_eps=1e-5,
)
_MOE = _NEMOTRON_H.but(
    pattern="MEM*EM-E",
    experts=8,
    shared_ffn=80,
    expert_bias=True,
    routed_scaling=2.5,
    vocab_size=301,
)


def _config(spec: Spec) -> Values:
    types = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
    groups, kept = spec.expert_groups or (1, 1)
    experts = {
        "n_routed_experts": spec.experts,
        "num_experts_per_tok": spec.topk,
        "moe_intermediate_size": spec.moe_ffn,
        "moe_shared_expert_intermediate_size": spec.shared_ffn,
        "moe_latent_size": spec.moe_latent,
        "routed_scaling_factor": spec.routed_scaling,
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": spec.topk > 1,
    }
    return {
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "layers_block_type": [types[letter] for letter in spec.pattern or ""],
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_positions,
        "layer_norm_epsilon": spec.norm_eps,
        "mamba_num_heads": HEADS,
        "mamba_head_dim": HEAD_DIM,
        "n_groups": GROUPS,
        "ssm_state_size": STATE,
        "conv_kernel": KERNEL,
        "time_step_min": NEVER,
        **(experts if spec.is_moe else {}),
    }


def _arguments(spec: Spec) -> Values:
    return {
        "position_embedding_type": "none",
        "swiglu": False,
        "squared_relu": True,
        "bias_gelu_fusion": False,
        "mamba_num_heads": HEADS,
        "mamba_head_dim": HEAD_DIM,
        "mamba_num_groups": GROUPS,
        "mamba_state_dim": STATE,
        "hybrid_attention_ratio": 0.0,
        "hybrid_mlp_ratio": 0.0,
        "fp32_residual_connection": False,
        "use_mamba_mem_eff_path": False,  # which is a kernel from end to end
    }


def _cut(sections: Sequence[Tensor], place: Place) -> Tensor:
    """A rank has its share of each section."""
    return torch.cat([section.chunk(place.size)[place.rank] for section in sections])


def _in_proj(tensors: Sequence[Tensor], place: Place) -> Tensor:
    """Gates, then what the convolution is given, then steps: NemotronHMamba2Mixer."""
    return _cut(torch.split(tensors[0], [INNER, INNER, READ, READ, HEADS]), place)


def _conv(tensors: Sequence[Tensor], place: Place) -> Tensor:
    return _cut(torch.split(tensors[0], [INNER, READ, READ]), place)


_HF = "backbone.layers.{layer}."
_MIXER, _HF_MIXER = LAYER + "mixer.", _HF + "mixer."
_PARAMETERS: dict[str, Value] = {
    "embedding.word_embeddings.weight": Vocabulary("backbone.embeddings.weight"),
    "output_layer.weight": Vocabulary("lm_head.weight"),
    "decoder.final_norm.weight": Norm("backbone.norm_f.weight"),
    **dict.fromkeys(
        (f"{LAYER}{x}norm.weight" for x in ("", "input_layer", "pre_mlp_layer")),
        Norm(_HF + "norm.weight"),
    ),
    _MIXER + "in_proj.weight": Made((_HF_MIXER + "in_proj.weight",), _in_proj),
    _MIXER + "conv1d.weight": Made((_HF_MIXER + "conv1d.weight",), _conv),
    _MIXER + "conv1d.bias": Made((_HF_MIXER + "conv1d.bias",), _conv),
    **{_MIXER + name: Rows(_HF_MIXER + name) for name in ("A_log", "D", "dt_bias", "norm.weight")},
    _MIXER + "out_proj.weight": Columns(_HF_MIXER + "out_proj.weight"),
    LAYER + "self_attention.linear_qkv.weight": Qkv(_HF_MIXER + "{}_proj.weight"),
    LAYER + "self_attention.linear_proj.weight": Columns(_HF_MIXER + "o_proj.weight"),
    LAYER + "mlp.router.weight": Whole(_HF_MIXER + "gate.weight"),
    LAYER + "mlp.router.expert_bias": Whole(_HF_MIXER + "gate.e_score_correction_bias"),
}
for _at, _to in (
    (LAYER + "mlp.", _HF_MIXER),
    (LAYER + "mlp.shared_experts.", _HF_MIXER + "shared_experts."),
    (EXPERT, _HF_MIXER + "experts.{expert}."),
):
    _PARAMETERS[_at + "linear_fc1.weight"] = Rows(_to + "up_proj.weight")
    _PARAMETERS[_at + "linear_fc2.weight"] = Columns(_to + "down_proj.weight")
for _name in ("fc1_latent_proj.weight", "fc2_latent_proj.weight"):
    _PARAMETERS[LAYER + "mlp." + _name] = Whole(_HF_MIXER + _name)

NEMOTRON_H = Family(
    {
        "nemotron_h-tp2": _NEMOTRON_H.but(
            tp=2, hf_max_shard_size="100KB", vocab_size_in_args=True, seed=300
        ),
        "nemotron_h-moe-tp2-ep2": _MOE.but(
            tp=2, ep=2, etp=1, hf_max_shard_size="100KB", vocab_size_in_args=True, seed=301
        ),
        "nemotron_h-pp2-fp32": _NEMOTRON_H.but(pp=2, dtype="fp32", seed=302),
        "nemotron_h-moe-pp2-ep2": _MOE.but(pp=2, dp=2, ep=2, seed=303),
        "nemotron_h-zero-centred": _NEMOTRON_H.but(
            pattern="*-MM", layers=4, zero_centred=True, common="common_state", seed=304
        ),
        "nemotron_h-latent-tp2": _MOE.but(
            tp=2, moe_latent=24, topk=4, expert_groups=(4, 2), fp32_router=True, seed=305
        ),
        "torch-nemotron_h-tp2-pp2": _NEMOTRON_H.but(
            format="torch", tp=2, pp=2, names="te", seed=306
        ),
        "torch-nemotron_h-moe-tp2-pp2-ep2": _MOE.but(
            format="torch", tp=2, pp=2, ep=2, etp=1, names="te", moe_latent=24, seed=307
        ),
        "torch-nemotron_h-tp4": _NEMOTRON_H.but(
            format="torch", tp=4, vocab_divisible_by=32, seed=308
        ),
        "torch-nemotron_h-moe": _MOE.but(format="torch", seed=309),
        "fsdp-nemotron_h-moe-dp2-ep2": _MOE.but(
            format="fsdp_dtensor", dp=2, ep=2, main_weights=True, seed=310
        ),
        "dcp-nemotron_h-dp2": _NEMOTRON_H.but(format="torch_dcp", dp=2, names="te", seed=311),
    },
    config=_config,
    arguments=_arguments,
    parameters=_PARAMETERS,
)
