"""Qwen1.5-MoE and Qwen2-MoE: biases on q, k and v, a shared expert with a gate."""

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

_QWEN2_MOE = Spec(
    family="qwen2_moe",
    experts=8,
    shared_ffn=80,
    head_dim=8,
    norm_topk_prob=False,
    vocab_size=301,
)
_SHARED = LAYER + "mlp.shared_experts."


def _config(spec: Spec) -> Values:
    return {
        **decoder_config(spec),
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.topk,
        "moe_intermediate_size": spec.moe_ffn,
        "shared_expert_intermediate_size": spec.shared_ffn,
        "norm_topk_prob": spec.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(spec.layers) if not spec.has_experts(i)],
    }


def _arguments(spec: Spec) -> Values:
    return {"add_qkv_bias": True, "moe_shared_expert_gate": True}


QWEN2_MOE = Family(
    {
        "qwen2_moe-tp2-ep2": _QWEN2_MOE.but(
            tp=2, ep=2, etp=1, hf_max_shard_size="100KB", vocab_size_in_args=True, seed=140
        ),
        "qwen2_moe-tp2-mixed": _QWEN2_MOE.but(
            tp=2, moe_layer_freq=(1, 0, 1, 0), norm_topk_prob=True, tied=True, seed=141
        ),
        "qwen2_moe-pp2-ep2": _QWEN2_MOE.but(pp=2, dp=2, ep=2, seed=142),
        "torch-qwen2_moe-tp2-pp2-ep2": _QWEN2_MOE.but(
            format="torch", tp=2, pp=2, ep=2, etp=1, names="te", seed=143
        ),
        "torch-qwen2_moe-tp2-mixed": _QWEN2_MOE.but(
            format="torch", tp=2, moe_layer_freq=(0, 1, 1, 0), seed=144
        ),
        "fsdp-qwen2_moe-tp2-ep2-dp2": _QWEN2_MOE.but(
            format="fsdp_dtensor", tp=2, dp=2, ep=2, names="te", main_weights=True, seed=145
        ),
    },
    config=_config,
    arguments=_arguments,
    parameters={
        **DECODER,
        **gated_mlp(_SHARED, HF_LAYER + "mlp.shared_expert.", PROJECTIONS),
        _SHARED + "gate_weight": Whole(HF_LAYER + "mlp.shared_expert_gate.weight"),
    },
)
