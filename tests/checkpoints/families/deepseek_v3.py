"""DeepSeek-V3: multi-latent attention, dense layers first, experts with shared ones and a router of
sigmoids, multi-token prediction."""

from __future__ import annotations

from ..spec import Spec
from .base import (
    DECODER,
    HF_LAYER,
    LATENT_ATTENTION,
    LAYER,
    MTP_BEHIND,
    PROJECTIONS,
    Family,
    Values,
    gated_mlp,
    latent_config,
)

_DEEPSEEK_V3 = Spec(
    family="deepseek_v3",
    kv_heads=8,
    head_dim=8,
    kv_lora=24,
    q_lora=32,
    experts=8,
    topk=4,
    shared_ffn=96,
    moe_layer_freq=(0, 1, 1, 1),
    expert_bias=True,
    expert_groups=(4, 2),
    routed_scaling=2.5,
    rope_theta=10_000,
    vocab_size=301,
)
_MOONLIGHT = _DEEPSEEK_V3.but(
    q_lora=None, shared_ffn=48, expert_groups=None, topk=3, rope_theta=50_000
)


def _config(spec: Spec) -> Values:
    groups, kept = spec.expert_groups or (1, 1)
    return {
        **latent_config(spec),
        "n_routed_experts": spec.experts,
        "n_shared_experts": spec.shared_ffn // spec.moe_ffn,
        "num_experts_per_tok": spec.topk,
        "moe_intermediate_size": spec.moe_ffn,
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": True,
        "routed_scaling_factor": spec.routed_scaling,
        "first_k_dense_replace": [spec.has_experts(i) for i in range(spec.layers)].index(True),
        "num_nextn_predict_layers": spec.mtp,
    }


def _arguments(spec: Spec) -> Values:
    return {"qk_layernorm": True}


DEEPSEEK_V3 = Family(
    {
        "deepseek_v3-tp2-mtp": _DEEPSEEK_V3.but(
            tp=2,
            yarn=(40.0, 1.0, 1.0),
            max_positions=163_840,
            mtp=1,
            hf_max_shard_size="100KB",
            vocab_size_in_args=True,
            seed=180,
        ),
        "deepseek_v3-ep2-two-mtp": _DEEPSEEK_V3.but(
            dp=2,
            ep=2,
            yarn=(4.0, 1.0, 0.0),
            max_positions=16_384,
            mtp=2,
            fp32_router=True,
            local_norm_keys=True,
            seed=181,
        ),
        "deepseek_v3-tp2-pp2-ep2-mtp": _DEEPSEEK_V3.but(
            tp=2, pp=2, ep=2, etp=1, mtp=1, moe_layer_freq=(0, 0, 1, 1), seed=182
        ),
        "deepseek_v3-pp2-vpp2-mtp": _DEEPSEEK_V3.but(
            pp=2, vpp=2, mtp=1, vocab_divisible_by=1, seed=190
        ),
        "deepseek_v3-moonlight-tp2": _MOONLIGHT.but(tp=2, dtype="fp32", seed=183),
        "deepseek_v3-moonlight-stacked": _MOONLIGHT.but(moe_layer_freq=None, tied=True, seed=184),
        "torch-deepseek_v3-tp2-pp2-ep2-mtp": _DEEPSEEK_V3.but(
            format="torch", tp=2, pp=2, ep=2, etp=1, mtp=1, seed=185
        ),
        "torch-deepseek_v3-tp2-pp2-vpp2-mtp": _DEEPSEEK_V3.but(
            format="torch", tp=2, pp=2, vpp=2, etp=1, mtp=2, seed=191
        ),
        "torch-deepseek_v3-tp2-mtp": _DEEPSEEK_V3.but(
            format="torch",
            tp=2,
            names="te",
            yarn=(40.0, 0.707, 0.707),
            max_positions=163_840,
            mtp=1,
            seed=186,
        ),
        "fsdp-deepseek_v3-ep2-dp4-mtp": _DEEPSEEK_V3.but(
            format="fsdp_dtensor", main_weights=True, ep=2, dp=4, mtp=1, names="te", seed=188
        ),
        "dcp-deepseek_v3-dp2-mtp": _DEEPSEEK_V3.but(
            format="torch_dcp", dp=2, mtp=1, names="te", seed=189
        ),
        "torch-deepseek_v3-moonlight-tp2-ep2": _MOONLIGHT.but(
            format="torch", tp=2, ep=2, etp=1, seed=187
        ),
    },
    config=_config,
    arguments=_arguments,
    parameters={
        **DECODER,
        **LATENT_ATTENTION,
        **MTP_BEHIND,
        **gated_mlp(LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_experts.", PROJECTIONS),
    },
)
