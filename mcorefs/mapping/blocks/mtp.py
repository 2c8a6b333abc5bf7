"""Layers for multi-token prediction, where Hugging Face counts them on behind the decoder's.

DeepSeek-V3's way, and GLM-4.5's (the hub's model.safetensors.index.json of both): where a further
layer of the decoder would be, there is what such a layer holds, with it enorm, hnorm and eh_proj,
the norm behind it as shared_head.norm, and copies of the embedding and the output layer, which some
engines read and transformers ignores. eh_proj takes the embedding first, then the hidden state, on
both sides (Megatron-LM:megatron/core/transformer/multi_token_prediction.py
_concat_embeddings, transformers modeling_layers.py MtpLayer).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from mcorefs.mapping.blocks.model import gamma, unpad
from mcorefs.mapping.blocks.names import EMBEDDING, LAYER, MLAYER, OUTPUT
from mcorefs.mapping.family import Facts, Key, Proven, Rule

_AT = "mtp.layers.{mtp}."
_INSIDE = _AT + "transformer_layer."


def _kinds(when: str) -> str:
    return when.replace("decoder.layers.*.", "mtp.layers.*.transformer_layer.")


def _inside(rule: Rule) -> Rule:
    """`rule` for the layer inside."""
    sources = tuple(source.replace(MLAYER, _INSIDE) for source in rule.sources)
    return replace(rule, source=sources, stack="mtp", when=_kinds(rule.when))


def mtp_behind(layer: Iterable[Rule]) -> tuple[Rule, ...]:
    """Rules of the layers for multi-token prediction of a model whose decoder's layers follow the
    rules `layer`."""

    def norm(hf: str, source: str) -> Rule:
        return Rule(LAYER + hf, _AT + source, ("hidden",), gamma, stack="mtp")

    head = (OUTPUT, EMBEDDING)
    vocabulary = ("vocab", "hidden")
    return (
        Rule(LAYER + "embed_tokens.weight", head[1], vocabulary, unpad, stack="mtp"),
        norm("enorm.weight", "enorm.weight"),
        norm("hnorm.weight", "hnorm.weight"),
        Rule(
            LAYER + "eh_proj.weight", _AT + "eh_proj.weight", ("hidden", "mtp_columns"), stack="mtp"
        ),
        *map(_inside, layer),
        norm("shared_head.norm.weight", "final_layernorm.weight"),
        Rule(LAYER + "shared_head.head.weight", head, vocabulary, unpad, stack="mtp"),
    )


def _count(facts: Facts) -> Proven:
    """A reference may have more: trainings often leave them out."""
    return Proven(facts.dims.get("mtp", 0))


NEXTN_KEYS: Mapping[str, Key] = {
    "num_nextn_predict_layers": Key(_count, aliases=("num_mtp_layers",))
}
