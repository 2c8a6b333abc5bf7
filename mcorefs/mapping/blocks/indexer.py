"""Sparse attention (DSA): latent attention whose queries see the keys that an indexer chooses.

Both sides rotate the first part of the indexer's heads, as wide as the rotary part of the others:
Megatron by halves or by neighbours (dsa_indexer_rope_interleaved), each transformers class in one
of these ways (Megatron-LM:megatron/core/transformer/experimental_attention_variant/dsa.py,
transformers modeling_deepseek_v32.py and modeling_glm_moe_dsa.py): no row moves. The Hadamard
transform that Megatron puts both sides of a product through does not change it.

transformers' norm of indexer keys has an epsilon of 1e-6 whatever rms_norm_eps says. Megatron's has
the model's where dsa_indexer_k_norm_epsilon does not say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mcorefs.mapping.blocks.keys import arg, dim
from mcorefs.mapping.blocks.mla import DIRECT_QUERIES, LATENT_QUERIES, MLA, MLA_REQUIRES
from mcorefs.mapping.blocks.model import gamma
from mcorefs.mapping.blocks.names import LAYER, MLAYER
from mcorefs.mapping.family import Facts, Key, Rule

_AT = MLAYER + "self_attention.core_attention.indexer."
_HF = LAYER + "self_attn.indexer."
_NORMS_OF_LATENTS = "decoder.layers.*.self_attention.linear_q_up_proj.layer_norm_weight"
_INDEXERS = "decoder.layers.*.self_attention.core_attention.indexer.linear_wk.weight"

LATENT_QUERIES_MLA = tuple(
    replace(rule, when="") if rule.when == LATENT_QUERIES else rule
    for rule in MLA
    if rule.when != DIRECT_QUERIES
)
"""The indexer is given the latent of the queries, so there is always one."""
INDEXER = (
    Rule(_HF + "wq_b.weight", _AT + "linear_wq_b.weight", ("index_rows", "q_lora")),
    Rule(_HF + "wk.weight", _AT + "linear_wk.weight", ("index_dim", "hidden")),
    Rule(_HF + "k_norm.weight", _AT + "k_norm.weight", ("index_dim",), gamma),
    Rule(_HF + "k_norm.bias", _AT + "k_norm.bias", ("index_dim",)),
    Rule(
        _HF + "weights_proj.weight",
        _AT + "linear_weights_proj.weight",
        ("index_heads", "hidden"),
        keeps_dtype=True,
    ),
)
"""The precision of the last decides which keys are chosen: transformers keeps it, as a router's."""

INDEX_KEYS: Mapping[str, Key] = {
    "index_n_heads": dim("index_heads"),
    "index_head_dim": dim("index_dim"),
    "index_topk": arg("dsa_indexer_topk"),
}

SPARSE_REQUIRES: Mapping[str, tuple[object, ...]] = {
    **MLA_REQUIRES,
    "experimental_attention_variant": ("dsa",),
    "dsa_indexer_scoring_relu": (True,),
    "dsa_indexer_k_norm_epsilon": (1e-6,),
}
INTERLEAVED = ("dsa_indexer_rope_interleaved", "dsa_indexer_rotary_interleaved")
"""megatron-core's name (0.19) and mcore-bridge's
(mcore-bridge:src/mcore_bridge/config/model_config.py). Before there was the first, core knew halves
only."""


def queries_normed_for_indexer(facts: Facts) -> str | None:
    """Check: the indexer is given queries behind the norm of their latent.

    Up to megatron-core 0.17 that norm was part of linear_q_up_proj, so the indexer saw what is
    before it; it also rotated the last part of its heads (NVIDIA/Megatron-LM pull request 3026).
    """
    if not {_NORMS_OF_LATENTS, _INDEXERS} <= facts.kinds:
        return None
    return (
        "the norm of the queries' latent is part of linear_q_up_proj, so the indexer chose keys by "
        "queries without it (megatron-core up to 0.17; later versions have it as q_layernorm): no "
        "Hugging Face model does, and its output would differ"
    )
