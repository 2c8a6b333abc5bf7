"""Qwen3-MoE: experts, and dense layers between them. Its fixtures are those of formats and
layouts."""

from __future__ import annotations

from ..spec import Spec
from .base import Family, Values, decoder_config


def _config(spec: Spec) -> Values:
    return {
        **decoder_config(spec),
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.topk,
        "moe_intermediate_size": spec.moe_ffn,
        "norm_topk_prob": spec.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(spec.layers) if not spec.has_experts(i)],
    }


def _arguments(spec: Spec) -> Values:
    return {"qk_layernorm": True}


QWEN3_MOE = Family({}, config=_config, arguments=_arguments)
