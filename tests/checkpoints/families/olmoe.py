"""OLMoE: norms of all query heads together and of all key heads; none with tensor parallelism."""

from __future__ import annotations

from ..spec import Spec
from .base import DECODER, HF_LAYER, LAYER, Family, Norm, Values, decoder_config

_OLMOE = Spec(
    family="olmoe",
    kv_heads=8,
    head_dim=8,
    experts=8,
    norm_topk_prob=False,
    norm_eps=1e-5,
    rope_theta=10_000,
    vocab_size=301,
)


def _config(spec: Spec) -> Values:
    return {
        **decoder_config(spec),
        "intermediate_size": spec.moe_ffn,
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.topk,
        "norm_topk_prob": spec.norm_topk_prob,
        "router_aux_loss_coef": 0.001,
    }


def _arguments(spec: Spec) -> Values:
    return {"qk_layernorm": True}


OLMOE = Family(
    {
        "olmoe-ep2": _OLMOE.but(
            ep=2, dp=2, hf_max_shard_size="100KB", vocab_size_in_args=True, seed=150
        ),
        "olmoe-normalised": _OLMOE.but(norm_topk_prob=True, topk=3, per_layer_keys=True, seed=151),
        "olmoe-pp2-ep2": _OLMOE.but(pp=2, dp=2, ep=2, seed=152),
        "torch-olmoe-pp2-ep2": _OLMOE.but(format="torch", pp=2, dp=2, ep=2, names="te", seed=153),
    },
    config=_config,
    arguments=_arguments,
    norms_whole_projections=True,
    parameters={
        **DECODER,
        LAYER + "self_attention.q_layernorm.weight": Norm(HF_LAYER + "self_attn.q_norm.weight"),
        LAYER + "self_attention.k_layernorm.weight": Norm(HF_LAYER + "self_attn.k_norm.weight"),
    },
)
