"""The model families: one file each, one line each below."""

from __future__ import annotations

from mcorefs.mapping.families.bailing_moe_v2 import BAILING_MOE_V2
from mcorefs.mapping.families.deepseek_v2 import DEEPSEEK_V2
from mcorefs.mapping.families.deepseek_v3 import DEEPSEEK_V3
from mcorefs.mapping.families.deepseek_v32 import DEEPSEEK_V32
from mcorefs.mapping.families.dots1 import DOTS1
from mcorefs.mapping.families.ernie4_5 import ERNIE4_5
from mcorefs.mapping.families.ernie4_5_moe import ERNIE4_5_MOE
from mcorefs.mapping.families.exaone4 import EXAONE4
from mcorefs.mapping.families.exaone_moe import EXAONE_MOE
from mcorefs.mapping.families.falcon_h1 import FALCON_H1
from mcorefs.mapping.families.gemma import GEMMA
from mcorefs.mapping.families.gemma2 import GEMMA2
from mcorefs.mapping.families.gemma3_text import GEMMA3_TEXT
from mcorefs.mapping.families.glm4 import GLM4
from mcorefs.mapping.families.glm4_moe import GLM4_MOE
from mcorefs.mapping.families.glm4_moe_lite import GLM4_MOE_LITE
from mcorefs.mapping.families.glm4v import GLM4V, GLM4V_MOE
from mcorefs.mapping.families.glm_moe_dsa import GLM_MOE_DSA
from mcorefs.mapping.families.gpt2 import GPT2
from mcorefs.mapping.families.gpt_oss import GPT_OSS
from mcorefs.mapping.families.hy_v3 import HY_V3
from mcorefs.mapping.families.llama import LLAMA
from mcorefs.mapping.families.mimo import MIMO
from mcorefs.mapping.families.mimo_v2_flash import MIMO_V2_FLASH
from mcorefs.mapping.families.minimax_m2 import MINIMAX_M2
from mcorefs.mapping.families.mistral import MISTRAL
from mcorefs.mapping.families.mixtral import MIXTRAL
from mcorefs.mapping.families.nemotron import NEMOTRON
from mcorefs.mapping.families.nemotron_h import NEMOTRON_H
from mcorefs.mapping.families.olmoe import OLMOE
from mcorefs.mapping.families.phi3 import PHI3
from mcorefs.mapping.families.qwen2 import QWEN2
from mcorefs.mapping.families.qwen2_5_vl import QWEN2_5_VL
from mcorefs.mapping.families.qwen2_moe import QWEN2_MOE
from mcorefs.mapping.families.qwen3 import QWEN3
from mcorefs.mapping.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from mcorefs.mapping.families.qwen3_5_vl import QWEN3_5_MOE_VL, QWEN3_5_VL
from mcorefs.mapping.families.qwen3_moe import QWEN3_MOE
from mcorefs.mapping.families.qwen3_next import QWEN3_NEXT
from mcorefs.mapping.families.qwen3_vl import QWEN3_VL, QWEN3_VL_MOE
from mcorefs.mapping.families.step3p5 import STEP3P5
from mcorefs.mapping.family import Family

FAMILIES: tuple[Family, ...] = (
    BAILING_MOE_V2,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V32,
    DOTS1,
    ERNIE4_5,
    ERNIE4_5_MOE,
    EXAONE4,
    EXAONE_MOE,
    FALCON_H1,
    GEMMA,
    GEMMA2,
    GEMMA3_TEXT,
    GLM4,
    GLM4_MOE,
    GLM4_MOE_LITE,
    GLM4V,
    GLM4V_MOE,
    GLM_MOE_DSA,
    GPT2,
    GPT_OSS,
    HY_V3,
    LLAMA,
    MIMO,
    MIMO_V2_FLASH,
    MINIMAX_M2,
    MISTRAL,
    MIXTRAL,
    NEMOTRON,
    NEMOTRON_H,
    OLMOE,
    PHI3,
    QWEN2,
    QWEN2_5_VL,
    QWEN2_MOE,
    QWEN3,
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_5_MOE_VL,
    QWEN3_5_VL,
    QWEN3_MOE,
    QWEN3_NEXT,
    QWEN3_VL,
    QWEN3_VL_MOE,
    STEP3P5,
)
