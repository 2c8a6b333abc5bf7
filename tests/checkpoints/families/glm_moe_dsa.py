"""GLM-5: as DeepSeek-V3.2, with indexers that rotate neighbours, and not one in each layer."""

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

_GLM_MOE_DSA = Spec(
    family="glm_moe_dsa",
    kv_heads=8,
    head_dim=8,
    kv_lora=24,
    q_lora=32,
    v_head=16,
    index_topk=7,
    experts=8,
    topk=4,
    shared_ffn=48,
    moe_layer_freq=(0, 1, 1, 1),
    expert_bias=True,
    routed_scaling=2.5,
    vocab_size=301,
)
_SHARED = _GLM_MOE_DSA.but(index_every=3)


def _config(spec: Spec) -> Values:
    kinds = ["sparse" if spec.has_experts(layer) else "dense" for layer in range(spec.layers)]
    # Those behind the decoder are for multi-token prediction, each with an indexer.
    chosen = [layer % spec.index_every == 0 or layer >= Spec.layers for layer in range(spec.layers)]
    return {
        **latent_config(spec),
        **sparse_config(spec),
        "indexer_types": ["full" if full else "shared" for full in chosen],
        "n_routed_experts": spec.experts,
        "n_shared_experts": spec.shared_ffn // spec.moe_ffn,
        "num_experts_per_tok": spec.topk,
        "moe_intermediate_size": spec.moe_ffn,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": spec.routed_scaling,
        "mlp_layer_types": kinds,
        "first_k_dense_replace": kinds.index("sparse"),
        "num_nextn_predict_layers": spec.mtp,
    }


def _arguments(spec: Spec) -> Values:
    if spec.slime_indexers:
        return {"qk_layernorm": True}
    return sparse_arguments(spec, interleaved=True)


def _built(spec: Spec) -> Values:
    return sparse_arguments(spec, interleaved=True)


GLM_MOE_DSA = Family(
    {
        "glm_moe_dsa-tp2-mtp": _GLM_MOE_DSA.but(tp=2, mtp=1, vocab_size_in_args=True, seed=420),
        "glm_moe_dsa-tp2-ep2-shared": _SHARED.but(tp=2, ep=2, etp=1, mtp=1, seed=421),
        "glm_moe_dsa-ep2-all-keys": _GLM_MOE_DSA.but(dp=2, ep=2, index_topk=64, seed=422),
        "glm_moe_dsa-tp2-pp2-ep2-shared": _SHARED.but(
            tp=2,
            pp=2,
            ep=2,
            etp=1,
            first_stage_layers=3,
            last_stage_layers=1,
            moe_layer_freq=(0, 0, 1, 1),
            seed=423,
        ),
        "glm_moe_dsa-tp2-ep2-slime": _SHARED.but(
            tp=2, ep=2, etp=1, mtp=1, slime_indexers=True, common="no_args", seed=426
        ),
        "torch-glm_moe_dsa-tp2-pp2-ep2-shared": _SHARED.but(
            format="torch",
            tp=2,
            pp=2,
            ep=2,
            etp=1,
            first_stage_layers=3,
            last_stage_layers=1,
            mtp=1,
            seed=424,
        ),
        "torch-glm_moe_dsa-tp2-ep2": _GLM_MOE_DSA.but(
            format="torch", tp=2, ep=2, etp=1, names="te", seed=425
        ),
    },
    config=_config,
    arguments=_arguments,
    built=_built,
    parameters={
        **DECODER,
        **SPARSE_ATTENTION,
        **MTP_BEHIND,
        **gated_mlp(LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_experts.", PROJECTIONS),
    },
)
