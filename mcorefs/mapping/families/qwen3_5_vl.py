"""Qwen3.5 as the hub has it: its language models, and a vision model before them like Qwen3-VL's,
without deepstack.

Layers for multi-token prediction are where the language model by itself has them, with each expert
by itself as Qwen3.5's on the hub; Qwen3.6's have them fused. Trainers and engines read both
(Megatron-Bridge:src/megatron/bridge/models/qwen_vl/qwen35_vl_bridge.py, mbridge:mbridge/models/
qwen3_5/base_bridge.py, vLLM:vllm/model_executor/models/qwen3_5_mtp.py); transformers' MtpModel
wants them fused (5.23).
"""

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
