"""Qwen3.5's dense language model: Qwen3-Next's attention, its gated delta nets' layers apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..spec import Spec
from .base import AT_MTP_APART, HF_LAYER, LAYER, MTP_APART, Family, Made, Place, Value, Values
from .qwen3_next import (
    HYBRID,
    HYBRID_PARAMETERS,
    KEY_DIM,
    KEY_HEADS,
    VALUE_DIM,
    VALUE_HEADS,
    cut,
    hybrid_arguments,
    hybrid_config,
)

_QWEN3_5 = HYBRID.but(family="qwen3_5_text")
_HF = HF_LAYER + "linear_attn."


def _in_proj(tensors: Sequence[Tensor], place: Place) -> Tensor:
    qkv, *others = tensors
    keys, values = KEY_HEADS * KEY_DIM, VALUE_HEADS * VALUE_DIM
    return cut([*torch.split(qkv, [keys, keys, values]), *others], place)


APART: Mapping[str, Value] = {
    **HYBRID_PARAMETERS,
    **MTP_APART,
    LAYER + "self_attention.in_proj.weight": Made(
        tuple(f"{_HF}in_proj_{name}.weight" for name in ("qkv", "z", "b", "a")), _in_proj
    ),
}


def _config(spec: Spec) -> Values:
    return {**hybrid_config(spec), "mtp_num_hidden_layers": spec.mtp}


QWEN3_5_TEXT = Family(
    {
        "qwen3_5_text-tp2": _QWEN3_5.but(
            tp=2, hf_max_shard_size="60KB", vocab_size_in_args=True, seed=180
        ),
        "qwen3_5_text-fp32": _QWEN3_5.but(dtype="fp32", tied=True, seed=181),
        "qwen3_5_text-tp2-mtp-tied": _QWEN3_5.but(
            tp=2, mtp=1, tied=True, vocab_size_in_args=True, seed=184
        ),
        "qwen3_5_text-pp2-tied": _QWEN3_5.but(pp=2, tied=True, seed=182),
        "torch-qwen3_5_text-tp2-pp2": _QWEN3_5.but(
            format="torch", tp=2, pp=2, names="te", seed=183
        ),
    },
    config=_config,
    arguments=hybrid_arguments,
    mtp_at=AT_MTP_APART,
    parameters=APART,
)
