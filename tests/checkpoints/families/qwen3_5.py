"""Qwen3.5's dense model: its language model, and what sees for it."""

from __future__ import annotations

from ..spec import Spec
from .base import AT_MTP_APART, Family, Values
from .qwen3_5_text import APART, QWEN3_5_TEXT
from .qwen3_next import HYBRID, hybrid_arguments
from .qwen3_vl import seeing_config

_QWEN3_5 = HYBRID.but(family="qwen3_5", vision="megatron", common="no_args")
MROPE = [1, 1, 0]
"""Of few elements, since few are rotated."""


def with_mrope(text: Values) -> Values:
    rotary = text["rope_parameters"]
    assert isinstance(rotary, dict)
    rotary = {**rotary, "mrope_section": MROPE, "mrope_interleaved": True}
    return {**text, "rope_parameters": rotary}


def seeing(spec: Spec) -> Values:
    found = seeing_config(spec)
    vision = found["vision_config"]
    assert isinstance(vision, dict)
    without = {name: size for name, size in vision.items() if not name.startswith("deepstack")}
    return {**found, "vision_config": without}


def mrope_arguments(spec: Spec) -> Values:
    return {
        **hybrid_arguments(spec),
        "position_embedding_type": "mrope",
        "mrope_section": MROPE,
    }


def _config(spec: Spec) -> Values:
    return with_mrope(QWEN3_5_TEXT.config(spec))


QWEN3_5 = Family(
    {
        "qwen3_5-tp2": _QWEN3_5.but(tp=2, hf_max_shard_size="60KB", seed=320),
        "qwen3_5-swift-pp2-tied": _QWEN3_5.but(
            vision="ms-swift", pp=2, tied=True, common="common.pt", seed=321
        ),
        "qwen3_5-tp2-mtp-tied": _QWEN3_5.but(tp=2, mtp=1, tied=True, seed=324),
        "torch-qwen3_5-swift-pp2-mtp": _QWEN3_5.but(
            format="torch", vision="ms-swift", pp=2, mtp=1, common="common.pt", seed=325
        ),
        "torch-qwen3_5-bridge-tp2-pp2": _QWEN3_5.but(
            format="torch", vision="megatron-bridge", tp=2, pp=2, names="te", seed=322
        ),
        "torch-qwen3_5-tp2": _QWEN3_5.but(format="torch", tp=2, common="common.pt", seed=323),
    },
    config=_config,
    arguments=mrope_arguments,
    built=lambda spec: {"position_embedding_type": "rope", "mrope_section": None},
    vision=seeing,
    mtp_at=AT_MTP_APART,
    parameters=APART,
)
