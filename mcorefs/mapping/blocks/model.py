"""The two ends of a decoder, and the norms of its layers."""

from __future__ import annotations

from mcorefs.mapping.blocks.names import LAYER, MLAYER
from mcorefs.mapping.family import Facts, Rule
from mcorefs.views import Narrow, View


def unpad(view: View, facts: Facts) -> View:
    """Vocabulary rows without the padding that makes them divisible by TP."""
    return Narrow(view, 0, 0, facts.dims["vocab"])


EMBED = Rule(
    "model.embed_tokens.weight", "embedding.word_embeddings.weight", ("vocab", "hidden"), unpad
)
NORM = Rule("model.norm.weight", "decoder.final_layernorm.weight", ("hidden",))
HEAD = Rule(
    "lm_head.weight",
    "output_layer.weight",
    ("vocab", "hidden"),
    unpad,
    when="output_layer.weight",
)

LAYER_NORMS = (
    Rule(
        LAYER + "input_layernorm.weight",
        (
            MLAYER + "self_attention.linear_qkv.layer_norm_weight",
            MLAYER + "input_layernorm.weight",
        ),
        ("hidden",),
    ),
    Rule(
        LAYER + "post_attention_layernorm.weight",
        (MLAYER + "mlp.linear_fc1.layer_norm_weight", MLAYER + "pre_mlp_layernorm.weight"),
        ("hidden",),
    ),
)
