"""dots.llm1: norms of heads, dense layers first, sigmoids with a bias for each expert, shared
experts."""

from __future__ import annotations

from ..spec import Spec
from .base import DECODER, HF_LAYER, LAYER, PROJECTIONS, Family, Values, decoder_config, gated_mlp

_DOTS1 = Spec(
    family="dots1",
    kv_heads=8,
    head_dim=8,
    experts=8,
    topk=3,
    shared_ffn=96,
    moe_layer_freq=(0, 1, 1, 1),
    expert_bias=True,
    routed_scaling=2.5,
    norm_eps=1e-5,
    rope_theta=10_000_000,
    vocab_size=301,
)


def _config(spec: Spec) -> Values:
    groups, kept = spec.expert_groups or (1, 1)
    return {
        **decoder_config(spec),
        "n_routed_experts": spec.experts,
        "n_shared_experts": spec.shared_ffn // spec.moe_ffn,
        "num_experts_per_tok": spec.topk,
        "moe_intermediate_size": spec.moe_ffn,
        "first_k_dense_replace": sum(not spec.has_experts(i) for i in range(spec.layers)),
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": spec.topk > 1,
        "routed_scaling_factor": spec.routed_scaling,
        "sliding_window": None,
        "max_window_layers": spec.layers,
    }


def _arguments(spec: Spec) -> Values:
    return {"qk_layernorm": True}


DOTS1 = Family(
    {
        "dots1-tp2-ep2": _DOTS1.but(
            tp=2, ep=2, etp=1, hf_max_shard_size="100KB", vocab_size_in_args=True, seed=310
        ),
        "dots1-tp2-groups": _DOTS1.but(
            tp=2,
            topk=4,
            expert_groups=(4, 2),
            kv_heads=2,
            head_dim=16,
            moe_layer_freq=None,
            fp32_router=True,
            seed=311,
        ),
        "dots1-pp2-ep2": _DOTS1.but(pp=2, dp=2, ep=2, dtype="fp32", seed=312),
        "torch-dots1-tp2-pp2-ep2": _DOTS1.but(
            format="torch", tp=2, pp=2, ep=2, etp=1, names="te", seed=313
        ),
    },
    config=_config,
    arguments=_arguments,
    parameters={
        **DECODER,
        **gated_mlp(LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_experts.", PROJECTIONS),
    },
)
