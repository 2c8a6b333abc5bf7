"""Ling 2.0: q, k and v in one tensor, sigmoids with a bias for each expert, layers for multi-token
prediction behind the decoder's."""

from __future__ import annotations

from ..spec import Spec
from .base import (
    DECODER,
    HF_LAYER,
    LAYER,
    MTP_BEHIND,
    PROJECTIONS,
    Columns,
    Family,
    HeadNorm,
    Norm,
    Qkv,
    Values,
    Vocabulary,
    Whole,
    decoder_config,
    gated_mlp,
    rope,
)

_BAILING = Spec(
    family="bailing_moe_v2",
    kv_heads=2,
    experts=8,
    topk=3,
    shared_ffn=48,
    moe_layer_freq=(0, 1, 1, 1),
    expert_bias=True,
    routed_scaling=2.5,
    rope_theta=600_000,
    vocab_size=301,
    mtp=1,
)
_ROTATED = 0.5
_AT = HF_LAYER + "attention."


def _has_bias(spec: Spec) -> bool:
    return spec.expert_groups is not None


def _config(spec: Spec) -> Values:
    groups, kept = spec.expert_groups or (1, 1)
    return {
        **decoder_config(spec),
        "rope_parameters": {**rope(spec), "partial_rotary_factor": _ROTATED},
        "use_qkv_bias": _has_bias(spec),
        "use_bias": False,
        "use_qk_norm": True,
        "num_experts": spec.experts,
        "num_shared_experts": spec.shared_ffn // spec.moe_ffn,
        "num_experts_per_tok": spec.topk,
        "moe_intermediate_size": spec.moe_ffn,
        "first_k_dense_replace": sum(not spec.has_experts(i) for i in range(spec.layers)),
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": spec.topk > 1,
        "routed_scaling_factor": spec.routed_scaling,
        "num_nextn_predict_layers": spec.mtp,
        "moe_router_enable_expert_bias": True,
        "score_function": "sigmoid",
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
        "output_router_logits": False,
    }


def _arguments(spec: Spec) -> Values:
    return {"qk_layernorm": True, "rotary_percent": _ROTATED, "add_qkv_bias": _has_bias(spec)}


BAILING_MOE_V2 = Family(
    {
        "bailing_moe_v2-tp2-ep2": _BAILING.but(
            tp=2, ep=2, etp=1, hf_max_shard_size="100KB", vocab_size_in_args=True, seed=330
        ),
        "bailing_moe_v2-tp2-groups": _BAILING.but(
            tp=2, topk=4, expert_groups=(4, 2), shared_ffn=96, mtp=2, fp32_router=True, seed=331
        ),
        "bailing_moe_v2-pp2-ep2": _BAILING.but(pp=2, dp=2, ep=2, dtype="fp32", mtp=0, seed=332),
        "torch-bailing_moe_v2-tp2-pp2-ep2": _BAILING.but(
            format="torch", tp=2, pp=2, ep=2, etp=1, names="te", seed=333
        ),
    },
    config=_config,
    arguments=_arguments,
    mtp_at=HF_LAYER,
    parameters={
        **DECODER,
        **MTP_BEHIND,
        "mtp.layers.{layer}.final_layernorm.weight": Norm(HF_LAYER + "final_layernorm.weight"),
        "embedding.word_embeddings.weight": Vocabulary("model.word_embeddings.weight"),
        LAYER + "self_attention.linear_qkv.weight": Qkv(_AT + "query_key_value.weight"),
        LAYER + "self_attention.linear_qkv.bias": Qkv(_AT + "query_key_value.bias"),
        LAYER + "self_attention.linear_proj.weight": Columns(_AT + "dense.weight"),
        LAYER + "self_attention.q_layernorm.weight": HeadNorm(_AT + "query_layernorm.weight"),
        LAYER + "self_attention.k_layernorm.weight": HeadNorm(_AT + "key_layernorm.weight"),
        LAYER + "mlp.router.expert_bias": Whole(HF_LAYER + "mlp.gate.expert_bias"),
        **gated_mlp(LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_experts.", PROJECTIONS),
    },
)
