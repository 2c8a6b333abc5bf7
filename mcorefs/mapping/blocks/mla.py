"""Multi-latent attention: queries, keys and values from small latents.

Both sides keep the rotary part of each head as pairs of neighbours, and part them when they rotate
(Megatron-LM:megatron/core/models/common/embeddings/rope_utils.py `multi_latent_attention`,
transformers apply_rotary_pos_emb_interleave): no row moves.
"""

from __future__ import annotations

from collections.abc import Mapping

from mcorefs.mapping.blocks.keys import BASE_KEYS, decoder_requires, dim, stated_scaling
from mcorefs.mapping.blocks.model import gamma
from mcorefs.mapping.blocks.names import LAYER, MLAYER
from mcorefs.mapping.family import Facts, Key, Proven, Rule, Soft

_AT, _HF = MLAYER + "self_attention.", LAYER + "self_attn."
LATENT_QUERIES = "decoder.layers.*.self_attention.linear_q_down_proj.weight"
DIRECT_QUERIES = "decoder.layers.*.self_attention.linear_q_proj.weight"

MLA = (
    Rule(
        _HF + "q_proj.weight",
        _AT + "linear_q_proj.weight",
        ("q_rows", "hidden"),
        when=DIRECT_QUERIES,
    ),
    Rule(
        _HF + "q_a_proj.weight",
        _AT + "linear_q_down_proj.weight",
        ("q_lora", "hidden"),
        when=LATENT_QUERIES,
    ),
    Rule(
        _HF + "q_a_layernorm.weight",
        (_AT + "linear_q_up_proj.layer_norm_weight", _AT + "q_layernorm.weight"),
        ("q_lora",),
        gamma,
        when=LATENT_QUERIES,
    ),
    Rule(
        _HF + "q_b_proj.weight",
        _AT + "linear_q_up_proj.weight",
        ("q_rows", "q_lora"),
        when=LATENT_QUERIES,
    ),
    Rule(
        _HF + "kv_a_proj_with_mqa.weight",
        _AT + "linear_kv_down_proj.weight",
        ("kv_down_rows", "hidden"),
    ),
    Rule(
        _HF + "kv_a_layernorm.weight",
        (_AT + "linear_kv_up_proj.layer_norm_weight", _AT + "kv_layernorm.weight"),
        ("kv_lora",),
        gamma,
    ),
    Rule(_HF + "kv_b_proj.weight", _AT + "linear_kv_up_proj.weight", ("kv_rows", "kv_lora")),
    Rule(_HF + "o_proj.weight", _AT + "linear_proj.weight", ("hidden", "v_rows")),
)
"""The latent of the queries is left out where the model has none (--q-lora-rank not given)."""

# -- config.json ----------------------------------------------------------------------------------


def _q_lora(facts: Facts) -> object:
    return facts.dims.get("q_lora", Proven(None))


def _number(facts: Facts, name: str, default: float) -> float:
    value = facts.arg(name)
    return value if isinstance(value, int | float) else default


def _factor(facts: Facts) -> float:
    """How far YaRN stretches the rotary embeddings: 1 where it does not, or where nothing says."""
    if facts.arg("rope_type") == "rope":
        return 1.0
    return _number(facts, "rotary_scaling_factor", 1.0)


def _renamed_limit(facts: Facts) -> bool:
    """Up to megatron-core 0.13, whose arguments are without this one, YaRN took
    --max-position-embeddings for the length that it stretches."""
    return "cache_mla_latents" not in facts.args and "rope_type" not in facts.args


def _yarn(facts: Facts) -> object:
    """None in effect where it stretches nothing: a reference may still extend the context.

    What has no argument is a constant (MLATransformerConfig in
    Megatron-LM:megatron/core/transformer/transformer_config.py)."""
    if (stated := stated_scaling(facts)) is not None:
        return stated
    factor = _factor(facts)
    if factor == 1:
        return Soft(None)
    limit = facts.arg("original_max_position_embeddings")
    if limit is None and _renamed_limit(facts):
        limit = facts.arg("max_position_embeddings")
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": limit or 4096,
        "beta_fast": _number(facts, "beta_fast", 32),
        "beta_slow": _number(facts, "beta_slow", 1),
        "mscale": _number(facts, "mscale", 1.0),
        "mscale_all_dim": _number(facts, "mscale_all_dim", 0.0),
    }


MLA_KEYS: Mapping[str, Key] = {
    **BASE_KEYS,
    "num_attention_heads": dim("heads"),
    "num_key_value_heads": dim("heads"),
    "q_lora_rank": Key(_q_lora),
    "kv_lora_rank": dim("kv_lora"),
    "qk_nope_head_dim": dim("qk_nope"),
    "qk_rope_head_dim": dim("qk_rope"),
    "v_head_dim": dim("v_head"),
    "attention_bias": Key(lambda facts: False),
    "rope_scaling": Key(_yarn, None),
}
"""What families with multi-latent attention call the same, the decoder's keys among them."""

# -- what it takes for granted --------------------------------------------------------------------

MLA_REQUIRES: Mapping[str, tuple[object, ...]] = {
    **decoder_requires("softmax_scale"),
    "multi_latent_attention": (True,),
    "rotary_interleaved": (False,),
    "position_embedding_type": ("rope", "none"),
    "experimental_attention_variant": (),
}
"""Its own rotary embeddings are used whatever --position-embedding-type adds to the model's."""


def yarn_expressed(facts: Facts) -> str | None:
    """Check: transformers scales cosines and logits by the same factors.

    Megatron scales the logits by mscale_all_dim even where nothing is stretched, and up to
    megatron-core 0.13 by mscale; transformers takes an mscale of 0 for one that is not given
    (modeling_rope_utils.py _compute_yarn_parameters).
    """
    stretch, factor = _number(facts, "rotary_scaling_factor", 1.0), _factor(facts)
    mscale, all_dim = _number(facts, "mscale", 1.0), _number(facts, "mscale_all_dim", 0.0)
    if stretch <= 1:
        return None
    args = (
        f"with rotary_scaling_factor={stretch}, mscale={mscale} and mscale_all_dim={all_dim} "
        "Megatron scales"
    )
    differs = "its output would differ"
    if _renamed_limit(facts) and mscale != all_dim:
        return f"{args} by mscale up to its core 0.13, transformers by mscale_all_dim: {differs}"
    if factor == 1:
        how = f"{args} attention even without YaRN (rope_type), transformers does not: {differs}"
        return how if all_dim else None
    if not (mscale and all_dim) and (mscale, all_dim) != (1, 0):
        return f"{args} cosines by a ratio that no config.json can state: {differs}"
    return None
