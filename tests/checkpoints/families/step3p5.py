"""Step-3.5-Flash: a gate for each head, layers with a window that have more heads and rotate
otherwise, experts in one tensor, norms around zero.

Megatron's layers: see `step`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import Spec
from .base import (
    DECODER,
    EXPERT,
    HF_LAYER,
    LAYER,
    PROJECTIONS,
    Family,
    Made,
    Place,
    Values,
    Whole,
    decoder_config,
    gated_mlp,
)

_STEP = Spec(
    family="step3p5",
    experts=8,
    topk=3,
    shared_ffn=40,
    moe_layer_freq=(0, 1, 1, 1),
    expert_bias=True,
    routed_scaling=3.0,
    norm_eps=1e-5,
    window=8,
    vocab_size=301,
)
SLIDING_HEADS = 12
_FULL, _SLIDING = (5_000_000.0, 0.5), (10_000.0, 1.0)
"""Rotary base, and how much of each head is rotated."""


def _slides(spec: Spec) -> list[bool]:
    """One in four has no window; where there is a pipeline, the first has one."""
    return [layer % 4 != (3 if spec.pp > 1 else 0) for layer in range(spec.layers)]


def _types(spec: Spec) -> list[str]:
    return ["sliding_attention" if slides else "full_attention" for slides in _slides(spec)]


def _rotations(spec: Spec) -> list[tuple[float, float]]:
    return [_SLIDING if slides else _FULL for slides in _slides(spec)]


def sliding_groups(spec: Spec) -> int:
    """Of layers with a window, as many as of the others or half of them."""
    return 2 if spec.pp > 1 else spec.kv_heads


def _config(spec: Spec) -> Values:
    """In the hub's words."""
    found = dict(decoder_config(spec))
    del found["num_key_value_heads"], found["rope_parameters"]
    sparse = [layer for layer in range(spec.layers) if spec.has_experts(layer)]
    return {
        **found,
        "num_attention_groups": spec.kv_heads,
        "max_seq_len": spec.max_positions,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": SLIDING_HEADS,
            "num_attention_groups": sliding_groups(spec),
            "head_dim": spec.head_dim,
            "true_head_dim": spec.head_dim,
        },
        "layer_types": _types(spec),
        "sliding_window": spec.window,
        "rope_theta": [theta for theta, _ in _rotations(spec)],
        "partial_rotary_factors": [share for _, share in _rotations(spec)],
        "rope_scaling": None,
        "yarn_only_types": ["full_attention"],
        "use_rope_layers": [],
        "att_impl_type": "GQA",
        "use_head_wise_attn_gate": True,
        "use_qk_norm": True,
        "zero_centered": True,
        "sink": False,
        "use_moe": True,
        "moe_layers_enum": ",".join(map(str, sparse)),
        "moe_num_experts": spec.experts,
        "moe_top_k": spec.topk,
        "moe_intermediate_size": spec.moe_ffn,
        "share_expert_dim": spec.shared_ffn,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": spec.routed_scaling,
        "use_moe_router_bias": True,
        "norm_expert_weight": True,
        "need_fp32_gate": spec.fp32_router,
        "swiglu_limits": _limits(spec, 7.0),
        "swiglu_limits_shared": _limits(spec, 16.0),
        "num_nextn_predict_layers": 0,
    }


def _limits(spec: Spec, last: float) -> list[float]:
    return [*[0.0] * (spec.layers - 1), last if spec.has_experts(spec.layers - 1) else 0.0]


def _arguments(spec: Spec) -> Values:
    """Those of a Step35ModelProvider, by its names."""
    return {
        "qk_layernorm": True,
        "apply_layernorm_1p": True,
        "head_wise_attn_gate": True,
        "attention_output_gate": False,
        "layer_types": _types(spec),
        "window_size": None,
        "sliding_attention_setting": {
            "window_size": [(spec.window or 0) - 1, 0],
            "num_attention_heads": SLIDING_HEADS,
            "num_query_groups": sliding_groups(spec),
            "kv_channels": spec.head_dim,
        },
        "rotary_base": _rotations(spec)[0][0],
        "rotary_base_per_layer": [theta for theta, _ in _rotations(spec)],
        "rotary_percents": [share for _, share in _rotations(spec)],
        "swiglu_limits": _limits(spec, 7.0),
        "swiglu_limits_shared": _limits(spec, 16.0),
    }


def _qkv(tensors: Sequence[Tensor], place: Place) -> Tensor:
    """Each rank's query groups, then its gates: one row for each head, which says how many."""
    q, k, v, gates = tensors
    size = q.shape[0] // gates.shape[0]
    groups = k.shape[0] // size
    by_group = [rows.view(groups, -1, rows.shape[1]) for rows in (q, k, v)]
    rows = torch.cat(by_group, dim=1).flatten(0, 1)
    return torch.cat([rows.chunk(place.size)[place.rank], gates.chunk(place.size)[place.rank]])


def _gate_up(tensors: Sequence[Tensor], place: Place) -> Tensor:
    """Of tensors that hold all experts; each rank has its share of the rows of both."""
    assert place.expert is not None
    return torch.cat([t[place.expert].chunk(place.size)[place.rank] for t in tensors])


def _down(tensors: Sequence[Tensor], place: Place) -> Tensor:
    assert place.expert is not None
    return tensors[0][place.expert].chunk(place.size, dim=1)[place.rank]


_MOE = HF_LAYER + "moe."

STEP3P5 = Family(
    {
        "step3p5-tp2-ep2": _STEP.but(
            tp=2, ep=2, etp=1, hf_max_shard_size="100KB", vocab_size_in_args=True, seed=350
        ),
        "step3p5-tp2-etp2": _STEP.but(tp=2, fp32_router=True, seed=351),
        "step3p5-pp2-ep2": _STEP.but(
            pp=2, dp=2, ep=2, dtype="fp32", moe_layer_freq=(0, 0, 1, 1), seed=352
        ),
        "torch-step3p5-tp2-pp2-ep2": _STEP.but(
            format="torch", tp=2, pp=2, ep=2, etp=1, names="te", seed=353
        ),
        "torch-step3p5-tp4": _STEP.but(
            format="torch", tp=4, vocab_divisible_by=32, tied=True, seed=354
        ),
    },
    config=_config,
    arguments=_arguments,
    parameters={
        **DECODER,
        LAYER + "self_attention.linear_qkv.weight": Made(
            tuple(f"{HF_LAYER}self_attn.{x}_proj.weight" for x in "qkvg"), _qkv
        ),
        LAYER + "mlp.router.weight": Whole(_MOE + "gate.weight"),
        LAYER + "mlp.router.expert_bias": Whole(_MOE + "router_bias"),
        EXPERT + "linear_fc1.weight": Made(
            (_MOE + "gate_proj.weight", _MOE + "up_proj.weight"), _gate_up
        ),
        EXPERT + "linear_fc2.weight": Made((_MOE + "down_proj.weight",), _down),
        **gated_mlp(LAYER + "mlp.shared_experts.", HF_LAYER + "share_expert.", PROJECTIONS),
    },
)
