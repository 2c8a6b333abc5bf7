"""YaRN of models with query groups: --position-embedding-type yarn.

Megatron-LM:megatron/core/models/common/embeddings/yarn_rotary_pos_embedding.py. Its arguments
(megatron/training/argument_utils.py _apply_yarn_config_from_args) and the attributes of
Megatron-Bridge's providers have different names for some.
"""

from __future__ import annotations

import math

from mcorefs.mapping.blocks.keys import BASE_KEYS, stated_scaling
from mcorefs.mapping.family import Facts, Key, Soft

MODELOPT_ORIGINAL = 131072
"""What --enable-gpt-oss sets, whatever other arguments say (Megatron-LM:megatron/post_training/
model_builder.py)."""


def _number(facts: Facts, *names: str, default: float) -> float:
    found = facts.arg(*names)
    return found if isinstance(found, int | float) else default


def _scaling(facts: Facts) -> object | None:
    if facts.arg("enable_gpt_oss"):
        return Soft(_described(32.0, MODELOPT_ORIGINAL, 32.0, 1.0, truncates=False))
    if (stated := stated_scaling(facts)) is not None:
        return stated
    if facts.arg("position_embedding_type") != "yarn":
        return BASE_KEYS["rope_scaling"].value(facts)
    factor = _number(facts, "yarn_rotary_scaling_factor", "rotary_scaling_factor", default=1.0)
    truncates = facts.arg("yarn_correction_range_round_to_int")
    described = _described(
        factor,
        _number(facts, "yarn_original_max_position_embeddings", default=4096),
        _number(facts, "yarn_beta_fast", default=32.0),
        _number(facts, "yarn_beta_slow", default=1.0),
        truncates=True if truncates is None else bool(truncates),
    )
    attention = _attention_factor(facts, factor)
    if not math.isclose(attention, _mscale(factor, 1.0)):
        described["attention_factor"] = attention
    return described


def _described(
    factor: float, original: float, fast: float, slow: float, *, truncates: bool
) -> dict[str, object]:
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": truncates,
    }


def _attention_factor(facts: Facts, factor: float) -> float:
    """What sines and cosines are multiplied by; transformers takes `_mscale(factor, 1)` unless it
    is told."""
    mscale = facts.arg("yarn_mscale", "mscale")
    of_all = facts.arg("yarn_mscale_all_dim", "mscale_all_dim")
    if not (isinstance(mscale, int | float) and isinstance(of_all, int | float)):
        return _mscale(factor, 1.0)
    return _mscale(factor, mscale) / _mscale(factor, of_all)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


YARN = Key(_scaling, None)
"""rope_scaling of families that are trained with YaRN, or without."""
