"""MiMo-V2-Flash: layers with a window have sinks and twice the query groups, values are smaller
than keys, sigmoids with a bias for each expert; dense layers for multi-token prediction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import Spec
from .base import (
    DECODER,
    HF_LAYER,
    LAYER,
    MTP,
    MTP_BEHIND,
    Family,
    Made,
    Norm,
    Place,
    Rows,
    Values,
    decoder_config,
)

_ROTATES, _SCALE, _LOCAL_BASE = 0.5, 0.707, 10_000
_MIMO_V2 = Spec(
    family="mimo_v2_flash",
    kv_heads=2,
    v_head=12,
    experts=8,
    topk=3,
    moe_layer_freq=(0, 1, 1, 1),
    expert_bias=True,
    window=8,
    norm_eps=1e-5,
    rope_theta=5_000_000,
    vocab_size=301,
)


def slides(spec: Spec) -> list[int]:
    """1 for layers with a window, as all for multi-token prediction have, which count on."""
    pattern = [0, 1, 0, 1] if spec.pp > 1 else [0, 1, 1, 0]
    return [*pattern, *[1] * (spec.layers - 4)]


def _config(spec: Spec) -> Values:
    kinds = ("full_attention", "sliding_attention")
    bases = zip(kinds, (spec.rope_theta, _LOCAL_BASE), strict=True)
    groups, kept = spec.expert_groups or (1, 1)
    return {
        **decoder_config(spec),
        "v_head_dim": spec.v_head,
        "sliding_window": spec.window,
        "attention_value_scale": _value_scale(spec) or 1.0,
        "layer_types": [kinds[one] for one in slides(spec)],
        "mlp_layer_types": [
            "sparse" if spec.has_experts(layer) else "dense" for layer in range(spec.layers)
        ],
        "rope_parameters": {
            kind: {
                "rope_type": "default",
                "rope_theta": float(base),
                "partial_rotary_factor": _ROTATES,
            }
            for kind, base in bases
        },
        "n_routed_experts": spec.experts,
        "num_experts_per_tok": spec.topk,
        "moe_intermediate_size": spec.moe_ffn,
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": spec.topk > 1,
        "routed_scaling_factor": spec.routed_scaling,
        "num_nextn_predict_layers": spec.mtp,
    }


def _value_scale(spec: Spec) -> float | None:
    """Megatron-Bridge's default is none."""
    return None if spec.tied else _SCALE


def _arguments(spec: Spec) -> Values:
    return {
        "rotary_base": (_LOCAL_BASE, spec.rope_theta),
        "rotary_percent": _ROTATES,
        "window_size": spec.window,
        "hybrid_attention_pattern": slides(spec),
        "full_attn_num_query_groups": spec.kv_heads,
        "swa_num_query_groups": 2 * spec.kv_heads,
        "v_head_dim": spec.v_head,
        "attention_value_scale": _value_scale(spec),
    }


def _built(spec: Spec) -> Values:
    return {
        "window_size": None,
        "own_window": spec.window,
        "rotary_base": spec.rope_theta,
        "own_bases": (_LOCAL_BASE, spec.rope_theta),
    }


def _qkv(tensors: Sequence[Tensor], place: Place) -> Tensor:
    """Per query group its queries, its key, its value; a key head tells how many there are."""
    queries, keys, values = tensors
    groups = keys.shape[0] // _MIMO_V2.head_dim
    parts = (tensor.view(groups, -1, queries.shape[1]) for tensor in (queries, keys, values))
    return torch.cat(list(parts), dim=1).flatten(0, 1).chunk(place.size)[place.rank]


_HF = HF_LAYER + "self_attn."
MIMO_V2_FLASH = Family(
    {
        "mimo_v2_flash-tp2-ep2": _MIMO_V2.but(
            tp=2, ep=2, etp=1, hf_max_shard_size="100KB", vocab_size_in_args=True, seed=400
        ),
        "mimo_v2_flash-tp2-groups": _MIMO_V2.but(
            tp=2,
            topk=4,
            expert_groups=(4, 2),
            routed_scaling=2.5,
            tied=True,
            zero_centred=True,
            fp32_router=True,
            seed=401,
        ),
        "mimo_v2_flash-pp2-ep2": _MIMO_V2.but(
            pp=2, dp=2, ep=2, dtype="fp32", mtp=1, moe_layer_freq=(0, 0, 1, 1), seed=402
        ),
        "mimo_v2_flash-tp2-ep2-mtp": _MIMO_V2.but(
            tp=2, ep=2, etp=1, mtp=2, zero_centred=True, hf_max_shard_size="100KB", seed=406
        ),
        "mimo_v2_flash-no-args": _MIMO_V2.but(common="no_args", seed=405),
        "torch-mimo_v2_flash-tp2-pp2-ep2": _MIMO_V2.but(
            format="torch", tp=2, pp=2, ep=2, etp=1, names="te", seed=403
        ),
        "torch-mimo_v2_flash-tp2": _MIMO_V2.but(format="torch", tp=2, seed=404),
        "torch-mimo_v2_flash-tp2-mtp": _MIMO_V2.but(format="torch", tp=2, mtp=1, seed=407),
        "torch-mimo_v2_flash-pp2-ep2-mtp": _MIMO_V2.but(
            format="torch", pp=2, dp=2, ep=2, names="te", mtp=1, seed=408
        ),
    },
    config=_config,
    arguments=_arguments,
    built=_built,
    mtp_at="model.mtp.layers.{mtp}.",
    mtp_norm="final_layernorm",
    mtp_is_dense=True,
    mtp_moved=True,
    parameters={
        **DECODER,
        **MTP_BEHIND,
        MTP + "final_layernorm.weight": Norm(HF_LAYER + "final_layernorm.weight"),
        LAYER + "self_attention.linear_qkv.weight": Made(
            tuple(f"{_HF}{x}_proj.weight" for x in "qkv"), _qkv
        ),
        LAYER + "self_attention.core_attention.softmax_offset": Rows(_HF + "attention_sink_bias"),
    },
)
