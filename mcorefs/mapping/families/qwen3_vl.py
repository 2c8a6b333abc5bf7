"""Qwen3-VL, dense and of experts: Qwen3's language models, and a vision model before them.

The experts are fused, each as [in, out]: so have them the hub's files, so transformers 4 saves them
and engines want them. transformers 5 turns them when it loads, if their shape tells it to, and
saves them otherwise (transformers:src/transformers/conversion_mapping.py). Their router always
divides by the sum of the chosen.
"""

from __future__ import annotations

from mcorefs.mapping.blocks.keys import decoder_requires
from mcorefs.mapping.blocks.mlp import GATED_MLP, router
from mcorefs.mapping.blocks.model import transposed
from mcorefs.mapping.blocks.names import LAYER, MLAYER
from mcorefs.mapping.blocks.vision import (
    DEEPSTACK,
    DEEPSTACK_RULES,
    TOP_KEYS,
    VISION_KEYS,
    VISION_RULES,
    in_language_model,
    only,
)
from mcorefs.mapping.families.qwen3 import QWEN3
from mcorefs.mapping.families.qwen3_moe import QWEN3_MOE
from mcorefs.mapping.family import Facts, Rule, Section

_SEES = (*VISION_RULES, *DEEPSTACK_RULES)
_VISION_KEYS = {**VISION_KEYS, **DEEPSTACK}
_REQUIRES = {
    **decoder_requires("position_embedding_type"),
    "position_embedding_type": ("mrope", "rope"),
    "mrope_interleaved": (True,),
    "rotary_interleaved": (False,),
}
_WINDOWS = ("use_sliding_window", "sliding_window")

QWEN3_VL = QWEN3.but(
    name="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    rules=(*_SEES, *in_language_model(QWEN3.rules)),
    config=TOP_KEYS,
    sections={
        "text_config": Section("qwen3_vl_text", only(QWEN3.config, *_WINDOWS)),
        "vision_config": Section("qwen3_vl_vision", _VISION_KEYS),
    },
    requires=_REQUIRES,
)

_EXPERTS, _EXPERT = LAYER + "mlp.experts.", MLAYER + "mlp.experts.{expert}.linear_"
_FUSED = (
    Rule(
        _EXPERTS + "gate_up_proj",
        _EXPERT + "fc1.weight",
        ("experts", "hidden", "moe_gate_up"),
        transposed(),
        "moe",
    ),
    Rule(
        _EXPERTS + "down_proj",
        _EXPERT + "fc2.weight",
        ("experts", "moe_ffn", "hidden"),
        transposed(),
        "moe",
    ),
)
_MLPS = (*GATED_MLP, *_FUSED, router("mlp.gate.weight"))


def _told_by_shape(facts: Facts) -> str | None:
    """Check: no expert's weight is square, so that transformers 5 sees which way it lies."""
    hidden, rows = facts.dims.get("hidden"), facts.dims.get("moe_ffn", 0)
    if hidden not in (rows, 2 * rows):
        return None
    return (
        f"its experts' weights are square (hidden size {hidden}, experts of {rows}): of those, "
        "transformers 5 takes rows for columns, and other readers columns for rows"
    )


QWEN3_VL_MOE = QWEN3_MOE.but(
    name="qwen3_vl_moe",
    architecture="Qwen3VLMoeForConditionalGeneration",
    rules=(
        *_SEES,
        *in_language_model(rule for rule in QWEN3_MOE.rules if ".mlp." not in rule.hf),
        *in_language_model(_MLPS),
    ),
    config=TOP_KEYS,
    sections={
        "text_config": Section(
            "qwen3_vl_moe_text", only(QWEN3_MOE.config, *_WINDOWS, "norm_topk_prob")
        ),
        "vision_config": Section("qwen3_vl_moe_vision", _VISION_KEYS),
    },
    checks=(*QWEN3_MOE.checks, _told_by_shape),
    requires={**QWEN3_MOE.requires, **_REQUIRES, "moe_router_pre_softmax": (False,)},
)
