"""GLM-4.5: dense layers first, sigmoids with a bias for each expert, shared experts."""

from __future__ import annotations

from ..spec import Spec
from .base import (
    DECODER,
    HF_LAYER,
    LAYER,
    MTP_BEHIND,
    PROJECTIONS,
    Family,
    Values,
    decoder_config,
    gated_mlp,
    rope,
)

_ROTATES = 0.5
_GLM4_MOE = Spec(
    family="glm4_moe",
    experts=8,
    shared_ffn=48,
    moe_layer_freq=(0, 1, 1, 1),
    expert_bias=True,
    routed_scaling=2.5,
    norm_eps=1e-5,
    vocab_size=301,
)


def _config(spec: Spec) -> Values:
    groups, kept = spec.expert_groups or (1, 1)
    return {
        **decoder_config(spec),
        "rope_parameters": {**rope(spec), "partial_rotary_factor": _ROTATES},
        "attention_bias": True,
        "use_qk_norm": spec.qk_norm,
        "n_routed_experts": spec.experts,
        "n_shared_experts": spec.shared_ffn // spec.moe_ffn,
        "num_experts_per_tok": spec.topk,
        "moe_intermediate_size": spec.moe_ffn,
        "first_k_dense_replace": sum(not spec.has_experts(i) for i in range(spec.layers)),
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": spec.topk > 1,
        "routed_scaling_factor": spec.routed_scaling,
        "num_mtp_layers": spec.mtp,
    }


def _arguments(spec: Spec) -> Values:
    return {
        "add_qkv_bias": True,
        "qk_layernorm": spec.qk_norm,
        "rotary_percent": _ROTATES,
    }


GLM4_MOE = Family(
    {
        "glm4_moe-tp2-ep2": _GLM4_MOE.but(
            tp=2, ep=2, etp=1, hf_max_shard_size="100KB", vocab_size_in_args=True, seed=160
        ),
        "glm4_moe-tp2-groups": _GLM4_MOE.but(
            tp=2,
            qk_norm=False,
            topk=4,
            expert_groups=(4, 2),
            shared_ffn=96,
            moe_layer_freq=None,
            fp32_router=True,
            mtp=1,
            seed=161,
        ),
        "glm4_moe-one-expert": _GLM4_MOE.but(
            topk=1, routed_scaling=1.0, moe_layer_freq=(0, 0, 0, 1), dtype="fp32", seed=162
        ),
        "glm4_moe-pp2-ep2": _GLM4_MOE.but(pp=2, dp=2, ep=2, mtp=1, seed=163),
        "glm4_moe-tp2-ep2-mtp": _GLM4_MOE.but(
            tp=2, ep=2, etp=1, mtp=1, hf_max_shard_size="100KB", seed=168
        ),
        "torch-glm4_moe-tp2-pp2-ep2": _GLM4_MOE.but(
            format="torch", tp=2, pp=2, ep=2, etp=1, names="te", mtp=1, seed=164
        ),
        "fsdp-glm4_moe-ep2-dp4": _GLM4_MOE.but(
            format="fsdp_dtensor", ep=2, dp=4, names="te", main_weights=True, seed=166
        ),
        "dcp-glm4_moe-dp2": _GLM4_MOE.but(format="torch_dcp", dp=2, seed=167),
        "torch-glm4_moe-pp2-vpp2-ep2-mtp-tied": _GLM4_MOE.but(
            format="torch", pp=2, vpp=2, dp=2, ep=2, mtp=1, names="te", tied=True, seed=168
        ),
        "torch-glm4_moe-tp2": _GLM4_MOE.but(format="torch", tp=2, qk_norm=False, seed=165),
    },
    config=_config,
    arguments=_arguments,
    parameters={
        **DECODER,
        **MTP_BEHIND,
        **gated_mlp(LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_experts.", PROJECTIONS),
    },
)
