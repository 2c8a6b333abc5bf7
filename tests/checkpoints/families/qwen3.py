"""Qwen3: norms of each query and key head. Its fixtures are those of formats and layouts."""

from __future__ import annotations

from ..spec import Spec
from .base import Family, Values


def _arguments(spec: Spec) -> Values:
    return {"qk_layernorm": True}


QWEN3 = Family({}, arguments=_arguments)
