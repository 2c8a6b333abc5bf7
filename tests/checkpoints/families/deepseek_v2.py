"""DeepSeek-V2 and V2-Lite: as V3, with a router of softmaxes and no multi-token prediction."""

from __future__ import annotations

from ..spec import Spec
from .base import (
    DECODER,
    HF_LAYER,
    LATENT_ATTENTION,
    LAYER,
    PROJECTIONS,
    Family,
    Values,
    gated_mlp,
    latent_config,
)

_DEEPSEEK_V2 = Spec(
    family="deepseek_v2",
    kv_heads=8,
    head_dim=8,
    kv_lora=24,
    q_lora=32,
    experts=8,
    shared_ffn=96,
    moe_layer_freq=(0, 1, 1, 1),
    norm_topk_prob=False,
    expert_groups=(4, 2),
    routed_scaling=16.0,
    rope_theta=10_000,
    vocab_size=301,
)
_LITE = _DEEPSEEK_V2.but(q_lora=None, topk=3, expert_groups=None, routed_scaling=1.0)


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
        "topk_method": "greedy" if spec.expert_groups is None else "group_limited_greedy",
        "norm_topk_prob": spec.norm_topk_prob,
        "routed_scaling_factor": spec.routed_scaling,
        "first_k_dense_replace": [spec.has_experts(i) for i in range(spec.layers)].index(True),
    }


def _arguments(spec: Spec) -> Values:
    return {"qk_layernorm": True}


DEEPSEEK_V2 = Family(
    {
        "deepseek_v2-tp2-ep2": _DEEPSEEK_V2.but(
            tp=2,
            ep=2,
            etp=1,
            yarn=(40.0, 0.707, 0.707),
            max_positions=163_840,
            vocab_size_in_args=True,
            hf_max_shard_size="100KB",
            seed=190,
        ),
        "deepseek_v2-lite-tp2": _LITE.but(tp=2, fp32_router=True, seed=191),
        "deepseek_v2-pp2-ep2": _DEEPSEEK_V2.but(
            pp=2, dp=2, ep=2, moe_layer_freq=(0, 0, 1, 1), local_norm_keys=True, seed=192
        ),
        "torch-deepseek_v2-tp2-pp2": _DEEPSEEK_V2.but(
            format="torch", tp=2, pp=2, names="te", seed=193
        ),
        "torch-deepseek_v2-lite-tp2-ep2": _LITE.but(
            format="torch", tp=2, ep=2, etp=1, moe_layer_freq=None, seed=194
        ),
    },
    config=_config,
    arguments=_arguments,
    parameters={
        **DECODER,
        **LATENT_ATTENTION,
        **gated_mlp(LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_experts.", PROJECTIONS),
    },
)
