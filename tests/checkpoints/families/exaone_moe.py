"""K-EXAONE, as Megatron-Bridge has it: layers with a window, the others rotate nothing; sigmoids
with a bias for each expert."""

from __future__ import annotations

from ..spec import Spec
from .base import (
    DECODER,
    HF_LAYER,
    LAYER,
    PROJECTIONS,
    Family,
    Values,
    Whole,
    decoder_config,
    gated_mlp,
)

_EXAONE_MOE = Spec(
    family="exaone_moe",
    experts=8,
    topk=3,
    shared_ffn=48,
    moe_layer_freq=(0, 1, 1, 1),
    expert_bias=True,
    routed_scaling=2.5,
    norm_eps=1e-5,
    window=8,
    vocab_size=301,
)


def _slides(spec: Spec) -> list[bool]:
    """Three of four have a window."""
    return [layer % 4 != 3 for layer in range(spec.layers)]


def _config(spec: Spec) -> Values:
    groups, kept = spec.expert_groups or (1, 1)
    dense = [not spec.has_experts(layer) for layer in range(spec.layers)]
    return {
        **decoder_config(spec),
        "sliding_window": spec.window,
        "sliding_window_pattern": 0,
        "layer_types": [
            "sliding_attention" if slides else "full_attention" for slides in _slides(spec)
        ],
        "num_experts": spec.experts,
        "num_shared_experts": spec.shared_ffn // spec.moe_ffn,
        "num_experts_per_tok": spec.topk,
        "moe_intermediate_size": spec.moe_ffn,
        "mlp_layer_types": ["dense" if one else "sparse" for one in dense],
        "first_k_dense_replace": sum(dense),
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": spec.topk > 1,
        "routed_scaling_factor": spec.routed_scaling,
        "num_nextn_predict_layers": 0,
    }


def _arguments(spec: Spec) -> Values:
    return {
        "qk_layernorm": True,
        "window_attn_skip_freq": [int(slides) for slides in _slides(spec)],
        "no_rope_freq": [int(not slides) for slides in _slides(spec)],
    }


EXAONE_MOE = Family(
    {
        "exaone_moe-tp2-ep2": _EXAONE_MOE.but(
            tp=2, ep=2, etp=1, hf_max_shard_size="100KB", vocab_size_in_args=True, seed=340
        ),
        "exaone_moe-tp2-groups": _EXAONE_MOE.but(
            tp=2, topk=4, expert_groups=(4, 2), shared_ffn=96, fp32_router=True, seed=341
        ),
        "exaone_moe-pp2-ep2": _EXAONE_MOE.but(
            pp=2, dp=2, ep=2, dtype="fp32", moe_layer_freq=(0, 0, 1, 1), seed=342
        ),
        "torch-exaone_moe-tp2-pp2-ep2": _EXAONE_MOE.but(
            format="torch", tp=2, pp=2, ep=2, etp=1, names="te", seed=343
        ),
    },
    config=_config,
    arguments=_arguments,
    parameters={
        **DECODER,
        LAYER + "mlp.router.expert_bias": Whole(HF_LAYER + "mlp.e_score_correction_bias"),
        **gated_mlp(LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_experts.", PROJECTIONS),
    },
)
