"""K-EXAONE, as Megatron-Bridge has it: layers with a window, the others rotate nothing; sigmoids
with a bias for each expert; a dense layer for multi-token prediction, whose attention is told."""

from __future__ import annotations

from collections.abc import Mapping

from ..spec import Spec
from .base import (
    AT_MTP_APART,
    DECODER,
    HF_LAYER,
    LAYER,
    MTP_APART,
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


def _mtp_slides(spec: Spec) -> bool:
    """The layer for multi-token prediction has a window too, in what is saved as a whole."""
    return spec.format == "torch"


def _of_mtp(spec: Spec) -> Values:
    slides = _mtp_slides(spec)
    return {
        "mtp_layer_types": ["sliding_attention" if slides else "full_attention"],
        "mtp_sliding_windows": [spec.window if slides else 0],
        "mtp_num_speculative_steps": spec.mtp,
    }


def _mtp_lists(spec: Spec) -> Mapping[str, list[int]]:
    """Megatron-Bridge's exaone_moe_provider.py _layer_specific_config."""
    slides = int(_mtp_slides(spec))
    lists = {"window_attn_skip_freq": [slides], "no_rope_freq": [1 - slides]}
    return lists if spec.mtp else {}


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
        "num_nextn_predict_layers": spec.mtp,
        **(_of_mtp(spec) if spec.mtp else {}),
    }


def _arguments(spec: Spec) -> Values:
    return {
        "qk_layernorm": True,
        "window_attn_skip_freq": [int(slides) for slides in _slides(spec)],
        "no_rope_freq": [int(not slides) for slides in _slides(spec)],
        **(_of_mtp(spec) if spec.mtp else {}),
    }


EXAONE_MOE = Family(
    {
        "exaone_moe-tp2-ep2": _EXAONE_MOE.but(
            tp=2, ep=2, etp=1, hf_max_shard_size="100KB", vocab_size_in_args=True, seed=340
        ),
        "exaone_moe-tp2-groups": _EXAONE_MOE.but(
            tp=2, topk=4, expert_groups=(4, 2), shared_ffn=96, fp32_router=True, seed=341
        ),
        "exaone_moe-tp2-ep2-mtp": _EXAONE_MOE.but(
            tp=2, ep=2, etp=1, mtp=1, zero_centred=True, hf_max_shard_size="100KB", seed=344
        ),
        "exaone_moe-pp2-ep2": _EXAONE_MOE.but(
            pp=2, dp=2, ep=2, dtype="fp32", moe_layer_freq=(0, 0, 1, 1), mtp=1, seed=342
        ),
        "torch-exaone_moe-tp2-pp2-ep2": _EXAONE_MOE.but(
            format="torch", tp=2, pp=2, ep=2, etp=1, names="te", seed=343
        ),
        "torch-exaone_moe-tp2-mtp": _EXAONE_MOE.but(format="torch", tp=2, mtp=1, seed=345),
        "torch-exaone_moe-pp2-ep2-mtp": _EXAONE_MOE.but(
            format="torch", pp=2, dp=2, ep=2, names="te", tied=True, mtp=1, seed=346
        ),
    },
    config=_config,
    arguments=_arguments,
    mtp_at=AT_MTP_APART,
    mtp_is_dense=True,
    mtp_lists=_mtp_lists,
    parameters={
        **DECODER,
        **MTP_APART,
        LAYER + "mlp.router.expert_bias": Whole(HF_LAYER + "mlp.e_score_correction_bias"),
        **gated_mlp(LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_experts.", PROJECTIONS),
    },
)
