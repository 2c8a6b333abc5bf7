"""The families that there are fixtures of: one file each, one line each below."""

from __future__ import annotations

from collections.abc import Mapping

from .. import spec
from ..spec import Spec
from .bailing_moe_v2 import BAILING_MOE_V2
from .base import Family
from .deepseek_v2 import DEEPSEEK_V2
from .deepseek_v3 import DEEPSEEK_V3
from .deepseek_v32 import DEEPSEEK_V32
from .dots1 import DOTS1
from .ernie4_5 import ERNIE4_5
from .ernie4_5_moe import ERNIE4_5_MOE
from .exaone4 import EXAONE4
from .exaone_moe import EXAONE_MOE
from .falcon_h1 import FALCON_H1
from .gemma import GEMMA
from .gemma2 import GEMMA2
from .gemma3_text import GEMMA3_TEXT
from .glm4 import GLM4
from .glm4_moe import GLM4_MOE
from .glm4_moe_lite import GLM4_MOE_LITE
from .glm4v import GLM4V
from .glm4v_moe import GLM4V_MOE
from .glm_moe_dsa import GLM_MOE_DSA
from .gpt2 import GPT2
from .gpt_oss import GPT_OSS
from .hy_v3 import HY_V3
from .llama import LLAMA
from .mimo import MIMO
from .mimo_v2_flash import MIMO_V2_FLASH
from .minimax_m2 import MINIMAX_M2
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .nemotron import NEMOTRON
from .nemotron_h import NEMOTRON_H
from .olmoe import OLMOE
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen2_5_vl import QWEN2_5_VL
from .qwen2_moe import QWEN2_MOE
from .qwen3 import QWEN3
from .qwen3_5 import QWEN3_5
from .qwen3_5_moe import QWEN3_5_MOE
from .qwen3_5_moe_text import QWEN3_5_MOE_TEXT
from .qwen3_5_text import QWEN3_5_TEXT
from .qwen3_moe import QWEN3_MOE
from .qwen3_next import QWEN3_NEXT
from .qwen3_vl import QWEN3_VL
from .qwen3_vl_moe import QWEN3_VL_MOE
from .step3p5 import STEP3P5

FAMILIES: Mapping[str, Family] = {
    "bailing_moe_v2": BAILING_MOE_V2,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v32": DEEPSEEK_V32,
    "dots1": DOTS1,
    "ernie4_5": ERNIE4_5,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "exaone4": EXAONE4,
    "exaone_moe": EXAONE_MOE,
    "falcon_h1": FALCON_H1,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "glm4": GLM4,
    "glm4_moe": GLM4_MOE,
    "glm4_moe_lite": GLM4_MOE_LITE,
    "glm4v": GLM4V,
    "glm4v_moe": GLM4V_MOE,
    "glm_moe_dsa": GLM_MOE_DSA,
    "gpt2": GPT2,
    "gpt_oss": GPT_OSS,
    "hy_v3": HY_V3,
    "llama": LLAMA,
    "mimo": MIMO,
    "mimo_v2_flash": MIMO_V2_FLASH,
    "minimax_m2": MINIMAX_M2,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "nemotron": NEMOTRON,
    "nemotron_h": NEMOTRON_H,
    "olmoe": OLMOE,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5_MOE,
    "qwen3_5_moe_text": QWEN3_5_MOE_TEXT,
    "qwen3_5_text": QWEN3_5_TEXT,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_next": QWEN3_NEXT,
    "qwen3_vl": QWEN3_VL,
    "qwen3_vl_moe": QWEN3_VL_MOE,
    "step3p5": STEP3P5,
}

_MUST_BE_NAMED = (
    "bailing_moe_v2",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "gemma",
    "glm4_moe_lite",
    "hy_v3",
    "mimo",
    "phi3",
)
"""Nothing in a checkpoint says that it is one of these, and nothing else."""


def family_to_name(spec: Spec) -> str | None:
    """The family of `spec`, if the user must name it."""
    return spec.family if spec.family in _MUST_BE_NAMED else None


SPECS: Mapping[str, Spec] = {
    **spec.SPECS,
    **{name: one for family in FAMILIES.values() for name, one in family.specs.items()},
}
