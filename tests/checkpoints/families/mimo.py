"""MiMo-7B: Qwen2, with layers for multi-token prediction that take the hidden state first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import Spec
from .base import DECODER, HF_LAYER, MTP, Family, Made, Norm, Place, Values, decoder_config

_MIMO = Spec(family="mimo", kv_heads=2, norm_eps=1e-5, rope_theta=640_000, mtp=1)


def _config(spec: Spec) -> Values:
    return {**decoder_config(spec), "num_nextn_predict_layers": spec.mtp}


def _arguments(spec: Spec) -> Values:
    return {"add_qkv_bias": True}


def _embedding_first(found: Sequence[Tensor], place: Place) -> Tensor:
    """megatron/core/transformer/multi_token_prediction.py _concat_embeddings; column parallel."""
    hidden, embedding = found[0].chunk(2, dim=1)
    return torch.cat([embedding, hidden], dim=1).chunk(place.size)[place.rank]


MIMO = Family(
    {
        "mimo-tp2": _MIMO.but(tp=2, vocab_size_in_args=True, hf_max_shard_size="60KB", seed=320),
        "mimo-two-mtp": _MIMO.but(mtp=2, tied=True, local_norm_keys=True, seed=321),
        "mimo-tp2-pp2": _MIMO.but(tp=2, pp=2, dtype="fp32", seed=322),
        "torch-mimo-tp2": _MIMO.but(format="torch", tp=2, names="te", seed=323),
        "torch-mimo-pp2-no-mtp": _MIMO.but(format="torch", pp=2, mtp=0, seed=324),
    },
    config=_config,
    arguments=_arguments,
    mtp_at="model.mtp_layers.{mtp}.",
    parameters={
        **DECODER,
        MTP + "enorm.weight": Norm(HF_LAYER + "token_layernorm.weight"),
        MTP + "hnorm.weight": Norm(HF_LAYER + "hidden_layernorm.weight"),
        MTP + "eh_proj.weight": Made((HF_LAYER + "input_proj.weight",), _embedding_first),
        MTP + "final_layernorm.weight": Norm(HF_LAYER + "final_layernorm.weight"),
    },
)
