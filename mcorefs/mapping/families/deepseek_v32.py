"""DeepSeek-V3.2: DeepSeek-V3 whose queries see only the keys that an indexer chooses."""

from __future__ import annotations

from mcorefs.mapping.blocks.deepseek import (
    DEEPSEEK_CHECKS,
    DEEPSEEK_KEYS,
    DEEPSEEK_MLP,
)
from mcorefs.mapping.blocks.indexer import (
    INDEX_KEYS,
    INDEXER,
    INTERLEAVED,
    LATENT_QUERIES_MLA,
    SPARSE_REQUIRES,
    queries_normed_for_indexer,
    rotation_told,
)
from mcorefs.mapping.blocks.mlp import expert_bias
from mcorefs.mapping.blocks.model import EMBED, HEAD, NORM
from mcorefs.mapping.blocks.mtp import NEXTN_KEYS, mtp_behind
from mcorefs.mapping.blocks.routing import MLP_LAYER_TYPES, SIGMOID_REQUIRES, best_two_of_each_group
from mcorefs.mapping.family import Family, Key

_LAYER = (
    *LATENT_QUERIES_MLA,
    *INDEXER,
    *DEEPSEEK_MLP,
    expert_bias("mlp.gate.e_score_correction_bias"),
)

DEEPSEEK_V32 = Family(
    name="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    rules=(EMBED, *_LAYER, NORM, *mtp_behind(_LAYER), HEAD),
    config={
        **DEEPSEEK_KEYS,
        **INDEX_KEYS,
        **NEXTN_KEYS,
        "indexer_rope_interleave": Key(lambda facts: False),
        "mlp_layer_types": MLP_LAYER_TYPES,
        "mlp_bias": Key(lambda facts: False),
        "scoring_func": Key(lambda facts: "sigmoid"),
        "topk_method": Key(lambda facts: "noaux_tc"),
    },
    requires={
        **SPARSE_REQUIRES,
        **SIGMOID_REQUIRES,
        **dict.fromkeys(INTERLEAVED, (False,)),
        "dsa_indexer_topk_freq": (1,),
    },
    checks=(*DEEPSEEK_CHECKS, best_two_of_each_group, queries_normed_for_indexer, rotation_told),
    natural_order=True,
)
