"""Qwen3-VL's model of experts, which are fused and transposed in its file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import Spec
from .base import DECODER, EXPERT, HF_LAYER, Family, Made, Place, Values
from .qwen3_vl import arguments, seeing_config, text_config

_QWEN3_VL_MOE = Spec(
    family="qwen3_vl_moe", vision="megatron", common="no_args", experts=8, vocab_size=301
)
_EXPERTS = HF_LAYER + "mlp.experts."


def _one(tensors: Sequence[Tensor], place: Place) -> Tensor:
    """One expert of a tensor that holds all of them, each as [in, out]."""
    assert place.expert is not None
    return tensors[0][place.expert].T.contiguous()


def _gate_up(tensors: Sequence[Tensor], place: Place) -> Tensor:
    """This rank's gate rows, then its up rows."""
    halves = _one(tensors, place).chunk(2)
    return torch.cat([half.chunk(place.size)[place.rank] for half in halves])


def _down(tensors: Sequence[Tensor], place: Place) -> Tensor:
    return _one(tensors, place).chunk(place.size, dim=1)[place.rank]


def _config(spec: Spec) -> Values:
    return {
        **text_config(spec),
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.topk,
        "moe_intermediate_size": spec.moe_ffn,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(spec.layers) if not spec.has_experts(i)],
    }


QWEN3_VL_MOE = Family(
    {
        "qwen3_vl_moe-tp2-ep2": _QWEN3_VL_MOE.but(
            tp=2, ep=2, etp=1, hf_max_shard_size="100KB", seed=310
        ),
        "qwen3_vl_moe-swift-pp2-ep2-tied": _QWEN3_VL_MOE.but(
            vision="ms-swift", pp=2, dp=2, ep=2, tied=True, common="common.pt", seed=311
        ),
        "qwen3_vl_moe-bridge-mixed-fp32-router": _QWEN3_VL_MOE.but(
            vision="megatron-bridge", moe_layer_freq=(0, 1, 1, 1), fp32_router=True, seed=312
        ),
        "torch-qwen3_vl_moe-swift-tp2-pp2-etp2": _QWEN3_VL_MOE.but(
            format="torch", vision="ms-swift", tp=2, pp=2, common="common.pt", names="te", seed=313
        ),
        "torch-qwen3_vl_moe-tp2-ep2": _QWEN3_VL_MOE.but(
            format="torch", tp=2, ep=2, etp=1, common="common.pt", seed=314
        ),
    },
    config=_config,
    arguments=arguments,
    vision=seeing_config,
    turned=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    parameters={
        **DECODER,
        EXPERT + "linear_fc1.weight": Made((_EXPERTS + "gate_up_proj",), _gate_up),
        EXPERT + "linear_fc2.weight": Made((_EXPERTS + "down_proj",), _down),
    },
)
