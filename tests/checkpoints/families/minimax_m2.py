"""MiniMax-M2, as Megatron-Bridge has it: norms of all query heads together and of all key heads, of
which each tensor-parallel rank has its share; sigmoids with a bias for each expert."""

from __future__ import annotations

from ..spec import Spec
from .base import (
    DECODER,
    EXPERT,
    HF_LAYER,
    LAYER,
    Family,
    HeadNorm,
    Values,
    Whole,
    decoder_config,
    gated_mlp,
    rope,
)

_MINIMAX = Spec(
    family="minimax_m2", experts=8, topk=3, expert_bias=True, rope_theta=5_000_000, vocab_size=301
)
_HF = HF_LAYER + "block_sparse_moe."
_ROTATED = 0.5


def _config(spec: Spec) -> Values:
    return {
        **decoder_config(spec),
        "intermediate_size": spec.moe_ffn,
        "num_local_experts": spec.experts,
        "num_experts_per_tok": spec.topk,
        "rope_parameters": {**rope(spec), "partial_rotary_factor": _ROTATED},
    }


def _arguments(spec: Spec) -> Values:
    return {"qk_layernorm": True, "rotary_percent": _ROTATED}


MINIMAX_M2 = Family(
    {
        "minimax_m2-tp2-ep2": _MINIMAX.but(
            tp=2, ep=2, etp=1, hf_max_shard_size="100KB", vocab_size_in_args=True, seed=280
        ),
        "minimax_m2-tp2-neighbours": _MINIMAX.but(
            tp=2, rotary_interleaved=True, tied=True, fp32_router=True, seed=281
        ),
        "minimax_m2-pp2-ep2": _MINIMAX.but(
            pp=2, dp=2, ep=2, dtype="fp32", per_layer_keys=True, seed=282
        ),
        "torch-minimax_m2-pp2-ep2": _MINIMAX.but(
            format="torch", pp=2, dp=2, ep=2, names="te", seed=283
        ),
    },
    config=_config,
    arguments=_arguments,
    norms_whole_projections=True,
    parameters={
        **DECODER,
        LAYER + "self_attention.q_layernorm.weight": HeadNorm(
            HF_LAYER + "self_attn.q_norm.weight", cut=True
        ),
        LAYER + "self_attention.k_layernorm.weight": HeadNorm(
            HF_LAYER + "self_attn.k_norm.weight", cut=True
        ),
        LAYER + "mlp.router.weight": Whole(_HF + "gate.weight"),
        LAYER + "mlp.router.expert_bias": Whole(_HF + "e_score_correction_bias"),
        **gated_mlp(EXPERT, _HF + "experts.{expert}.", ("w1", "w3", "w2")),
    },
)
