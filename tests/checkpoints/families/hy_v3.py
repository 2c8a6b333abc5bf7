"""HY-V3: dense layers first, sigmoids with a bias for each expert, shared experts; what is behind
the layers for multi-token prediction by a name of its own."""

from __future__ import annotations

from ..spec import Spec
from .base import (
    DECODER,
    HF_LAYER,
    LAYER,
    MTP,
    MTP_BEHIND,
    PROJECTIONS,
    Family,
    Norm,
    Values,
    Whole,
    decoder_config,
    gated_mlp,
)

_HY_V3 = Spec(
    family="hy_v3",
    experts=8,
    topk=3,
    shared_ffn=48,
    moe_layer_freq=(0, 1, 1, 1),
    expert_bias=True,
    routed_scaling=2.826,
    norm_eps=1e-5,
    rope_theta=11_158_840,
    vocab_size=301,
)


def _config(spec: Spec) -> Values:
    kinds = ["sparse" if spec.has_experts(layer) else "dense" for layer in range(spec.layers)]
    return {
        **decoder_config(spec),
        "initializer_range": 0.02,
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.topk,
        "num_shared_experts": spec.shared_ffn // spec.moe_ffn,
        "moe_intermediate_size": spec.moe_ffn,
        "router_scaling_factor": spec.routed_scaling,
        "mlp_layer_types": kinds,
        "num_nextn_predict_layers": spec.mtp,
    }


def _arguments(spec: Spec) -> Values:
    return {"qk_layernorm": True}


HY_V3 = Family(
    {
        "hy_v3-tp2-ep2": _HY_V3.but(
            tp=2, ep=2, etp=1, hf_max_shard_size="100KB", vocab_size_in_args=True, seed=290
        ),
        "hy_v3-tp2-all-experts": _HY_V3.but(
            tp=2,
            moe_layer_freq=None,
            shared_ffn=96,
            routed_scaling=1.0,
            tied=True,
            fp32_router=True,
            seed=291,
        ),
        "hy_v3-tp2-ep2-mtp": _HY_V3.but(
            tp=2, ep=2, etp=1, mtp=2, zero_centred=True, hf_max_shard_size="100KB", seed=294
        ),
        "hy_v3-pp2-ep2": _HY_V3.but(
            pp=2, dp=2, ep=2, moe_layer_freq=(0, 0, 1, 1), dtype="fp32", mtp=1, seed=292
        ),
        "torch-hy_v3-tp2-pp2-ep2": _HY_V3.but(
            format="torch", tp=2, pp=2, ep=2, etp=1, names="te", seed=293
        ),
        "torch-hy_v3-tp2-mtp": _HY_V3.but(format="torch", tp=2, tied=True, mtp=1, seed=295),
        "torch-hy_v3-pp2-ep2-mtp": _HY_V3.but(
            format="torch", pp=2, dp=2, ep=2, names="te", mtp=1, seed=296
        ),
    },
    config=_config,
    arguments=_arguments,
    mtp_norm="final_layernorm",
    parameters={
        **DECODER,
        **MTP_BEHIND,
        MTP + "final_layernorm.weight": Norm(HF_LAYER + "final_layernorm.weight"),
        LAYER + "mlp.router.weight": Whole(HF_LAYER + "mlp.router.gate.weight"),
        LAYER + "mlp.router.expert_bias": Whole(HF_LAYER + "mlp.expert_bias"),
        **gated_mlp(LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_mlp.", PROJECTIONS),
    },
)
