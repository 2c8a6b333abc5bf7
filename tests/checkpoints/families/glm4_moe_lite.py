"""GLM-4.7-Flash: as DeepSeek-V3, with heads whose values are the wider part."""

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

_GLM4_MOE_LITE = Spec(
    family="glm4_moe_lite",
    kv_heads=8,
    head_dim=8,
    kv_lora=24,
    q_lora=32,
    v_head=16,
    experts=8,
    topk=4,
    shared_ffn=48,
    moe_layer_freq=(0, 1, 1, 1),
    expert_bias=True,
    routed_scaling=1.8,
    mtp=1,
    vocab_size=301,
)


def _config(spec: Spec) -> Values:
    kinds = ["sparse" if spec.has_experts(layer) else "dense" for layer in range(spec.layers)]
    return {
        **latent_config(spec),
        "n_routed_experts": spec.experts,
        "n_shared_experts": spec.shared_ffn // spec.moe_ffn,
        "num_experts_per_tok": spec.topk,
        "moe_intermediate_size": spec.moe_ffn,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": spec.routed_scaling,
        "mlp_layer_types": kinds,
        "num_nextn_predict_layers": spec.mtp,
    }


def _arguments(spec: Spec) -> Values:
    return {"qk_layernorm": True}


GLM4_MOE_LITE = Family(
    {
        "glm4_moe_lite-tp2": _GLM4_MOE_LITE.but(tp=2, vocab_size_in_args=True, seed=200),
        "glm4_moe_lite-pp2-ep2": _GLM4_MOE_LITE.but(
            pp=2, dp=2, ep=2, moe_layer_freq=(0, 0, 1, 1), seed=201
        ),
        "torch-glm4_moe_lite-tp2-ep2": _GLM4_MOE_LITE.but(
            format="torch", tp=2, ep=2, etp=1, names="te", seed=202
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
