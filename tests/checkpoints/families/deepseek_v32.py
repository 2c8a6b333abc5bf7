"""DeepSeek-V3.2: DeepSeek-V3 whose queries see only the keys that an indexer chooses."""

from __future__ import annotations

from ..spec import Spec
from .base import (
    DECODER,
    HF_LAYER,
    LAYER,
    MTP_BEHIND,
    PROJECTIONS,
    SPARSE_ATTENTION,
    Family,
    Values,
    gated_mlp,
    latent_config,
    sparse_arguments,
    sparse_config,
)

_DEEPSEEK_V32 = Spec(
    family="deepseek_v32",
    kv_heads=8,
    head_dim=8,
    kv_lora=24,
    q_lora=32,
    index_topk=7,
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


def _config(spec: Spec) -> Values:
    groups, kept = spec.expert_groups or (1, 1)
    return {
        **latent_config(spec),
        **sparse_config(spec),
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
    return sparse_arguments(spec, interleaved=False)


DEEPSEEK_V32 = Family(
    {
        "deepseek_v32-tp2-mtp": _DEEPSEEK_V32.but(
            tp=2,
            yarn=(40.0, 1.0, 1.0),
            max_positions=163_840,
            mtp=1,
            hf_max_shard_size="100KB",
            vocab_size_in_args=True,
            seed=400,
        ),
        "deepseek_v32-ep2-all-keys": _DEEPSEEK_V32.but(
            dp=2, ep=2, index_topk=64, moe_layer_freq=None, fp32_router=True, seed=401
        ),
        "deepseek_v32-tp2-pp2-ep2-mtp": _DEEPSEEK_V32.but(
            tp=2, pp=2, ep=2, etp=1, mtp=1, moe_layer_freq=(0, 0, 1, 1), seed=402
        ),
        "deepseek_v32-tp2-around-zero": _DEEPSEEK_V32.but(
            tp=2, dtype="fp32", zero_centred=True, expert_groups=None, seed=403
        ),
        "torch-deepseek_v32-tp2-pp2-ep2-mtp": _DEEPSEEK_V32.but(
            format="torch", tp=2, pp=2, ep=2, etp=1, mtp=1, seed=404
        ),
        "torch-deepseek_v32-tp2-ep2": _DEEPSEEK_V32.but(
            format="torch", tp=2, ep=2, etp=1, names="te", yarn=(4.0, 1.0, 0.0), seed=405
        ),
    },
    config=_config,
    arguments=_arguments,
    parameters={
        **DECODER,
        **SPARSE_ATTENTION,
        **MTP_BEHIND,
        **gated_mlp(LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_experts.", PROJECTIONS),
    },
)
