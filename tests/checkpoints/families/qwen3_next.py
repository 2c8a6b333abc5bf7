"""Qwen3-Next: gated delta nets and gated attention, norms around zero, a shared expert.

megatron-core's own gated delta net is saved and computed (see `delta_net` for its kernels).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..spec import Spec
from .base import (
    AT_MTP_APART,
    DECODER,
    HF_LAYER,
    LAYER,
    MTP_APART,
    PROJECTIONS,
    Columns,
    Family,
    Made,
    Place,
    Rows,
    Value,
    Values,
    Whole,
    decoder_config,
    gated_mlp,
    rope,
)

HYBRID = Spec(family="qwen3_next", heads=8, kv_heads=4, head_dim=16, hidden=64)
KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM = 2, 4, 8, 12
ROTATES = 0.25
_QWEN3_NEXT = HYBRID.but(experts=8, shared_ffn=80, vocab_size=301)
_AT, _HF = LAYER + "self_attention.", HF_LAYER + "linear_attn."


def linear_pattern(spec: Spec) -> list[int]:
    """1 for a gated delta net: every second layer, but where there is a pipeline without layers for
    multi-token prediction, which are as the last one, and have full attention."""
    behind = spec.mtp or spec.layers - 4
    pattern = [1, 1, 0, 1] if spec.pp > 1 and not behind else [1, 0, 1, 0]
    return [*pattern, *[0] * (spec.layers - 4)]


def hybrid_config(spec: Spec) -> Values:
    types = {1: "linear_attention", 0: "full_attention"}
    return {
        **decoder_config(spec),
        "rope_parameters": {**rope(spec), "partial_rotary_factor": ROTATES},
        "layer_types": [types[one] for one in linear_pattern(spec)],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": KEY_DIM,
        "linear_value_head_dim": VALUE_DIM,
        "linear_num_key_heads": KEY_HEADS,
        "linear_num_value_heads": VALUE_HEADS,
    }


def hybrid_arguments(spec: Spec) -> Values:
    return {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": linear_pattern(spec) if spec.pp > 1 else 2,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": KEY_DIM,
        "linear_value_head_dim": VALUE_DIM,
        "linear_num_key_heads": KEY_HEADS,
        "linear_num_value_heads": VALUE_HEADS,
        "attention_output_gate": True,
        "qk_layernorm": True,
        "rotary_percent": ROTATES,
        "apply_layernorm_1p": True,
    }


def cut(sections: Sequence[Tensor], place: Place) -> Tensor:
    """A rank has its share of each section."""
    return torch.cat([section.chunk(place.size)[place.rank] for section in sections])


def _in_proj(tensors: Sequence[Tensor], place: Place) -> Tensor:
    """From the order that fix_query_key_value_ordering of transformers undoes."""
    qkvz, ba = tensors
    ratio = VALUE_HEADS // KEY_HEADS
    values = ratio * VALUE_DIM
    by_head = qkvz.view(KEY_HEADS, -1, qkvz.shape[1])
    mixed = torch.split(by_head, [KEY_DIM, KEY_DIM, values, values], dim=1)
    gates = torch.split(ba.view(KEY_HEADS, 2 * ratio, -1), [ratio, ratio], dim=1)
    return cut([part.flatten(0, 1) for part in (*mixed, *gates)], place)


def _conv(tensors: Sequence[Tensor], place: Place) -> Tensor:
    keys, values = KEY_HEADS * KEY_DIM, VALUE_HEADS * VALUE_DIM
    return cut(torch.split(tensors[0], [keys, keys, values]), place)


def _around_zero(tensors: Sequence[Tensor], place: Place) -> Tensor:
    """Between 0.5 and 1.5, where this loses no bit."""
    return (tensors[0].float() - 1).to(tensors[0].dtype)


def _gated_qkv(tensors: Sequence[Tensor], place: Place) -> Tensor:
    """Per query group its queries, their gates, key, value; transformers has each query's gate
    behind it."""
    hidden = tensors[0].shape[1]
    q, k, v = (tensor.view(HYBRID.kv_heads, -1, hidden) for tensor in tensors)
    both = q.view(HYBRID.kv_heads, -1, 2, HYBRID.head_dim, hidden)
    query, gate = both[:, :, 0].flatten(1, 2), both[:, :, 1].flatten(1, 2)
    return torch.cat([query, gate, k, v], dim=1).flatten(0, 1).chunk(place.size)[place.rank]


_QKV = tuple(f"{HF_LAYER}self_attn.{x}_proj.weight" for x in "qkv")
HYBRID_PARAMETERS: Mapping[str, Value] = {
    **DECODER,
    _AT + "linear_qkv.weight": Made(_QKV, _gated_qkv),
    _AT + "conv1d.weight": Made((_HF + "conv1d.weight",), _conv),
    _AT + "A_log": Rows(_HF + "A_log"),
    _AT + "dt_bias": Rows(_HF + "dt_bias"),
    _AT + "out_norm.weight": Made((_HF + "norm.weight",), _around_zero),
    _AT + "out_proj.weight": Columns(_HF + "out_proj.weight"),
}
_SHARED = LAYER + "mlp.shared_experts."
SHARED_EXPERT: Mapping[str, Value] = {
    **gated_mlp(_SHARED, HF_LAYER + "mlp.shared_expert.", PROJECTIONS),
    _SHARED + "gate_weight": Whole(HF_LAYER + "mlp.shared_expert_gate.weight"),
}


def _config(spec: Spec) -> Values:
    return {
        **hybrid_config(spec),
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.topk,
        "moe_intermediate_size": spec.moe_ffn,
        "shared_expert_intermediate_size": spec.shared_ffn,
        "norm_topk_prob": spec.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(spec.layers) if not spec.has_experts(i)],
        "num_nextn_predict_layers": spec.mtp,
    }


def _arguments(spec: Spec) -> Values:
    return {**hybrid_arguments(spec), "moe_shared_expert_gate": True}


QWEN3_NEXT = Family(
    {
        "qwen3_next-tp2-ep2": _QWEN3_NEXT.but(
            tp=2, ep=2, etp=1, hf_max_shard_size="100KB", vocab_size_in_args=True, seed=170
        ),
        "qwen3_next-mixed": _QWEN3_NEXT.but(
            moe_layer_freq=(1, 1, 0, 1), norm_topk_prob=False, tied=True, dtype="fp32", seed=171
        ),
        "qwen3_next-tp2-ep2-mtp": _QWEN3_NEXT.but(tp=2, ep=2, etp=1, mtp=1, seed=175),
        "qwen3_next-pp2-ep2": _QWEN3_NEXT.but(pp=2, dp=2, ep=2, seed=172),
        "torch-qwen3_next-tp2-pp2-ep2": _QWEN3_NEXT.but(
            format="torch", tp=2, pp=2, ep=2, etp=1, names="te", seed=173
        ),
        "torch-qwen3_next-tp2-pp2-ep2-mtp": _QWEN3_NEXT.but(
            format="torch", tp=2, pp=2, ep=2, etp=1, mtp=1, names="te", seed=176
        ),
        "torch-qwen3_next": _QWEN3_NEXT.but(format="torch", seed=174),
    },
    config=_config,
    arguments=_arguments,
    mtp_at=AT_MTP_APART,
    parameters={
        **HYBRID_PARAMETERS,
        **MTP_APART,
        **SHARED_EXPERT,
        _AT + "in_proj.weight": Made(
            (_HF + "in_proj_qkvz.weight", _HF + "in_proj_ba.weight"), _in_proj
        ),
    },
)
