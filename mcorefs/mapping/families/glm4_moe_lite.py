"""GLM-4.7-Flash: what DeepSeek-V3 is, and served as that unless this is named."""

from __future__ import annotations

from mcorefs.mapping.blocks.deepseek import (
    DEEPSEEK_CHECKS,
    DEEPSEEK_KEYS,
    DEEPSEEK_LAYER,
)
from mcorefs.mapping.blocks.mla import MLA_REQUIRES
from mcorefs.mapping.blocks.mlp import expert_bias
from mcorefs.mapping.blocks.model import EMBED, HEAD, NORM
from mcorefs.mapping.blocks.mtp import NEXTN_KEYS, mtp_behind
from mcorefs.mapping.blocks.routing import (
    MLP_LAYER_TYPES,
    SIGMOID_REQUIRES,
    best_two_of_each_group,
)
from mcorefs.mapping.family import Family, Key

_LAYER = (*DEEPSEEK_LAYER, expert_bias("mlp.gate.e_score_correction_bias"))


GLM4_MOE_LITE = Family(
    name="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    rules=(EMBED, *_LAYER, NORM, *mtp_behind(_LAYER), HEAD),
    config={
        **DEEPSEEK_KEYS,
        **NEXTN_KEYS,
        "mlp_layer_types": MLP_LAYER_TYPES,
        "rope_interleave": Key(lambda facts: True),
        "scoring_func": Key(lambda facts: "sigmoid"),
        "topk_method": Key(lambda facts: "noaux_tc"),
    },
    requires={**MLA_REQUIRES, **SIGMOID_REQUIRES},
    checks=(*DEEPSEEK_CHECKS, best_two_of_each_group),
    named_only=True,
    natural_order=True,
)
