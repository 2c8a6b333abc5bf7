"""The families that there are fixtures of: one file each, one line each below."""

from __future__ import annotations

from collections.abc import Mapping

from .. import spec
from ..spec import Spec
from .base import Family
from .deepseek_v2 import DEEPSEEK_V2
from .deepseek_v3 import DEEPSEEK_V3
from .glm4_moe import GLM4_MOE
from .gpt2 import GPT2
from .llama import LLAMA
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .olmoe import OLMOE
from .qwen2 import QWEN2
from .qwen2_moe import QWEN2_MOE
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE

FAMILIES: Mapping[str, Family] = {
    "glm4_moe": GLM4_MOE,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen2": QWEN2,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
}

SPECS: Mapping[str, Spec] = {
    **spec.SPECS,
    **{name: one for family in FAMILIES.values() for name, one in family.specs.items()},
}
