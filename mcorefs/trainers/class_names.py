"""Which Hugging Face family a class was written for that configures models of one family only:
Qwen3ModelProvider600M (Megatron-Bridge, up to 0.2 for most families), Llama31Config8B (NeMo).

Names: Megatron-Bridge@v0.2.2:src/megatron/bridge/models/*/*_provider.py,
NeMo:nemo/collections/llm/gpt/model/*.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_CLASS = re.compile(r"(\w+?)(?:ModelProvider|Provider|Config)(\w*)")
_EXPERTS = re.compile(r"\w*B_A\d+B")
"""A size with two numbers: Qwen3Config30B_A3B has no MoE in its name."""
_FAMILIES: Mapping[str, str] = {
    "CodeGemma": "gemma",
    "CodeLlama": "llama",
    "DeepSeekV2": "deepseek_v2",
    "DeepSeekV2Lite": "deepseek_v2",
    "DeepSeekV3": "deepseek_v3",
    "ExaoneMoe": "exaone_moe",
    "FalconH1": "falcon_h1",
    "GLM45": "glm4_moe",
    "GLM45Air": "glm4_moe",
    "GLM45V": "glm4v_moe",
    "GPTOSS": "gpt_oss",
    "Gemma": "gemma",
    "Gemma2": "gemma2",
    "Gemma3": "gemma3_text",
    "Llama": "llama",
    "Llama2": "llama",
    "Llama3": "llama",
    "Llama31": "llama",
    "Llama32": "llama",
    "MiMoV2Flash": "mimo_v2_flash",
    "Mistral": "mistral",
    "MistralNeMo": "mistral",
    "MistralSmall3": "mistral",
    "Mixtral": "mixtral",
    "Moonlight": "deepseek_v3",
    "Nemotron": "nemotron",
    "Nemotron3": "nemotron",
    "Nemotron4": "nemotron",
    "NemotronH": "nemotron_h",
    "OlMoE": "olmoe",
    "Phi3": "phi3",
    "Qwen2": "qwen2",
    "Qwen25": "qwen2",
    "Qwen25VL": "qwen2_5_vl",
    "Qwen3": "qwen3",
    "Qwen3MoE": "qwen3_moe",
    "Qwen3Next": "qwen3_next",
    "Qwen35VL": "qwen3_5",
    "Qwen35VLMoE": "qwen3_5_moe",
    "Qwen3VL": "qwen3_vl",
    "Qwen3VLMoE": "qwen3_vl_moe",
    "Step35": "step3p5",
    "Step37": "step3p7",
}


def model_type(target: object) -> str | None:
    """The `model_type` that the class with the dotted name `target` is for; None where it is for
    several (GPTModelProvider) or is not known."""
    if not isinstance(target, str) or len(target) > 1000:
        return None
    match = _CLASS.fullmatch(target.rpartition(".")[2])
    if match is None:
        return None
    family, size = match.groups()
    of_experts = _FAMILIES.get(f"{family}MoE") if _EXPERTS.fullmatch(size) else None
    return of_experts or _FAMILIES.get(family)
