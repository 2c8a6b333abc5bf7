"""The families that there are fixtures of: one file each, one line each below."""

from __future__ import annotations

from collections.abc import Mapping

from .. import spec
from ..spec import Spec
from .base import Family
from .ernie4_5 import ERNIE4_5
from .gemma import GEMMA
from .gemma2 import GEMMA2
from .gemma3_text import GEMMA3_TEXT
from .glm4 import GLM4
from .gpt2 import GPT2
from .llama import LLAMA
from .mistral import MISTRAL
from .nemotron import NEMOTRON
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .qwen3_moe import QWEN3_MOE

FAMILIES: Mapping[str, Family] = {
    "ernie4_5": ERNIE4_5,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "glm4": GLM4,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "nemotron": NEMOTRON,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
}

_MUST_BE_NAMED = ("ernie4_5", "gemma", "phi3")
"""Nothing in a checkpoint says that it is one of these, and nothing else."""


def family_to_name(spec: Spec) -> str | None:
    """The family of `spec`, if the user must name it."""
    return spec.family if spec.family in _MUST_BE_NAMED else None


SPECS: Mapping[str, Spec] = {
    **spec.SPECS,
    **{name: one for family in FAMILIES.values() for name, one in family.specs.items()},
}
