"""GLM-5: sparse attention whose indexers rotate neighbours, and whose layers may share what one
before them chose (GLM-5.2)."""

from __future__ import annotations

from mcorefs.mapping.blocks.deepseek import (
    DEEPSEEK_CHECKS,
    DEEPSEEK_KEYS,
    DEEPSEEK_MLP,
)
from mcorefs.mapping.blocks.indexer import (
    INTERLEAVED,
    LATENT_QUERIES_MLA,
    SHARED_INDEX_KEYS,
    SHARED_INDEXERS,
    SPARSE_REQUIRES,
    queries_normed_for_indexer,
    rotation_told,
    shared_as_said,
)
from mcorefs.mapping.blocks.mlp import expert_bias
from mcorefs.mapping.blocks.model import EMBED, HEAD, NORM
from mcorefs.mapping.blocks.mtp import NEXTN_KEYS, mtp_behind
from mcorefs.mapping.blocks.routing import MLP_LAYER_TYPES, SIGMOID_REQUIRES, best_two_of_each_group
from mcorefs.mapping.family import Family, Key

_LAYER = (
    *LATENT_QUERIES_MLA,
    *SHARED_INDEXERS,
    *DEEPSEEK_MLP,
    expert_bias("mlp.gate.e_score_correction_bias"),
)

GLM_MOE_DSA = Family(
    name="glm_moe_dsa",
    architecture="GlmMoeDsaForCausalLM",
    rules=(EMBED, *_LAYER, NORM, *mtp_behind(_LAYER), HEAD),
    config={
        **DEEPSEEK_KEYS,
        **SHARED_INDEX_KEYS,
        **NEXTN_KEYS,
        "mlp_layer_types": MLP_LAYER_TYPES,
        "mlp_bias": Key(lambda facts: False),
        "scoring_func": Key(lambda facts: "sigmoid"),
        "topk_method": Key(lambda facts: "noaux_tc"),
    },
    requires={**SPARSE_REQUIRES, **SIGMOID_REQUIRES, **dict.fromkeys(INTERLEAVED, (True,))},
    checks=(
        *DEEPSEEK_CHECKS,
        best_two_of_each_group,
        queries_normed_for_indexer,
        shared_as_said,
        rotation_told,
    ),
    natural_order=True,
)
