"""Qwen3.5's model of experts: its language model, and what sees for it."""

from __future__ import annotations

from ..spec import Spec
from .base import AT_MTP_APART, Family, Values
from .qwen3_5 import mrope_arguments, seeing, with_mrope
from .qwen3_5_moe_text import QWEN3_5_MOE_TEXT
from .qwen3_next import HYBRID

_QWEN3_5_MOE = HYBRID.but(
    family="qwen3_5_moe",
    vision="megatron-bridge",
    common="no_args",
    experts=8,
    shared_ffn=80,
    vocab_size=301,
)


def _config(spec: Spec) -> Values:
    return with_mrope(QWEN3_5_MOE_TEXT.config(spec))


def _arguments(spec: Spec) -> Values:
    return {**mrope_arguments(spec), "moe_shared_expert_gate": True}


QWEN3_5_MOE = Family(
    {
        "qwen3_5_moe-tp2-ep2": _QWEN3_5_MOE.but(
            tp=2, ep=2, etp=1, hf_max_shard_size="100KB", seed=330
        ),
        "qwen3_5_moe-megatron-pp2-ep2": _QWEN3_5_MOE.but(
            vision="megatron", pp=2, dp=2, ep=2, seed=331
        ),
        "qwen3_5_moe-ep2-mtp": _QWEN3_5_MOE.but(dp=2, ep=2, mtp=1, seed=333),
        "torch-qwen3_5_moe-swift-tp2-pp2-ep2": _QWEN3_5_MOE.but(
            format="torch",
            vision="ms-swift",
            tp=2,
            pp=2,
            ep=2,
            etp=1,
            common="common.pt",
            names="te",
            seed=332,
        ),
    },
    config=_config,
    arguments=_arguments,
    built=QWEN3_5_MOE_TEXT.built,
    vision=seeing,
    mtp_at=AT_MTP_APART,
    parameters=QWEN3_5_MOE_TEXT.parameters,
)
