"""The model families: one file each, one line each below."""

from __future__ import annotations

from mcorefs.mapping.families.deepseek_v2 import DEEPSEEK_V2
from mcorefs.mapping.families.deepseek_v3 import DEEPSEEK_V3
from mcorefs.mapping.families.glm4_moe import GLM4_MOE
from mcorefs.mapping.families.gpt2 import GPT2
from mcorefs.mapping.families.llama import LLAMA
from mcorefs.mapping.families.mistral import MISTRAL
from mcorefs.mapping.families.mixtral import MIXTRAL
from mcorefs.mapping.families.olmoe import OLMOE
from mcorefs.mapping.families.qwen2 import QWEN2
from mcorefs.mapping.families.qwen2_moe import QWEN2_MOE
from mcorefs.mapping.families.qwen3 import QWEN3
from mcorefs.mapping.families.qwen3_moe import QWEN3_MOE
from mcorefs.mapping.family import Family

FAMILIES: tuple[Family, ...] = (
    GLM4_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GPT2,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    OLMOE,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
)
