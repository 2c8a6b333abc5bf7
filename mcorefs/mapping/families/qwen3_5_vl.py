"""Qwen3.5 as the hub has it: its language models, and a vision model before them like Qwen3-VL's,
without deepstack. Without multi-token prediction."""

from __future__ import annotations

from mcorefs.mapping.blocks.vision import (
    TOP_KEYS,
    VISION_KEYS,
    VISION_RULES,
    in_language_model,
    only,
)
from mcorefs.mapping.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from mcorefs.mapping.family import Section

_REQUIRES = {"mrope_interleaved": (True,)}

QWEN3_5_VL = QWEN3_5.but(
    name="qwen3_5",
    architecture="Qwen3_5ForConditionalGeneration",
    rules=(*VISION_RULES, *in_language_model(QWEN3_5.rules)),
    config=TOP_KEYS,
    sections={
        "text_config": Section("qwen3_5_text", only(QWEN3_5.config)),
        "vision_config": Section("qwen3_5_vision", VISION_KEYS),
    },
    requires={**QWEN3_5.requires, **_REQUIRES},
)
QWEN3_5_MOE_VL = QWEN3_5_MOE.but(
    name="qwen3_5_moe",
    architecture="Qwen3_5MoeForConditionalGeneration",
    rules=(*VISION_RULES, *in_language_model(QWEN3_5_MOE.rules)),
    config=TOP_KEYS,
    sections={
        "text_config": Section("qwen3_5_moe_text", only(QWEN3_5_MOE.config)),
        "vision_config": Section("qwen3_5_moe_vision", VISION_KEYS),
    },
    requires={**QWEN3_5_MOE.requires, **_REQUIRES},
    given=(),
)
