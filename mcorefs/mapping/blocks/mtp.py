"""Layers for multi-token prediction, which Hugging Face has in one of two places.

Behind the decoder's, as DeepSeek-V3 and GLM-4.5 (the hub's model.safetensors.index.json of both):
where a further layer of the decoder would be, there is what such a layer holds, with it enorm,
hnorm and eh_proj, the norm behind it as shared_head.norm, and copies of the embedding and the
output layer, which some engines read and transformers ignores. HY-V3 calls that norm
final_layernorm, and has no copies (Megatron-Bridge:src/megatron/bridge/models/hy_v3/
hy_v3_bridge.py, vLLM:vllm/model_executor/models/hy_v3_mtp.py).

Apart, as Qwen3-Next and Qwen3.5 (Megatron-Bridge:src/megatron/bridge/models/qwen/
qwen3_next_bridge.py, mcore-bridge:src/mcore_bridge/model/gpts/qwen3_next.py _convert_mtp_extra) and
K-EXAONE (exaone/exaone_moe/exaone_moe_bridge.py): `mtp.layers` with what a layer holds, and beside
them, once, what is around it: `mtp.fc`, `mtp.pre_fc_norm_embedding`, `mtp.pre_fc_norm_hidden`,
`mtp.norm`.

eh_proj takes the embedding first, then the hidden state, on both sides (Megatron-LM:megatron/core/
transformer/multi_token_prediction.py _concat_embeddings, transformers modeling_layers.py MtpLayer,
vLLM:vllm/model_executor/models/qwen3_next_mtp.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from mcorefs.mapping.blocks.model import gamma, unpad
from mcorefs.mapping.blocks.names import EMBEDDING, LAYER, MLAYER, OUTPUT
from mcorefs.mapping.family import Block, Facts, Key, Proven, Rule, whole

_AT = "mtp.layers.{mtp}."
_INSIDE = _AT + "transformer_layer."
_HF = "mtp."


def _kinds(when: str) -> str:
    return when.replace("decoder.layers.*.", "mtp.layers.*.transformer_layer.")


def inside(rule: Rule, at: str = LAYER) -> Rule:
    """`rule` for the layer inside one for multi-token prediction, whose Hugging Face tensors are
    `at` some place."""
    sources = tuple(source.replace(MLAYER, _INSIDE) for source in rule.sources)
    hf, sorts_as = (name.replace(LAYER, at) for name in (rule.hf, rule.sorts_as))
    return replace(
        rule, hf=hf, source=sources, stack="mtp", when=_kinds(rule.when), sorts_as=sorts_as
    )


def mtp_without_copies(
    layer: Iterable[Rule], last: str = "final_layernorm.weight"
) -> tuple[Rule, ...]:
    """Rules of the layers for multi-token prediction of a model whose decoder's layers follow the
    rules `layer`; `last`: what the norm behind them is called."""

    def norm(hf: str, source: str) -> Rule:
        return Rule(LAYER + hf, _AT + source, ("hidden",), gamma, stack="mtp")

    return (
        norm("enorm.weight", "enorm.weight"),
        norm("hnorm.weight", "hnorm.weight"),
        Rule(
            LAYER + "eh_proj.weight", _AT + "eh_proj.weight", ("hidden", "mtp_columns"), stack="mtp"
        ),
        *map(inside, layer),
        norm(last, "final_layernorm.weight"),
    )


def mtp_behind(layer: Iterable[Rule]) -> tuple[Rule, ...]:
    """Likewise, as DeepSeek-V3 has them, with copies of the embedding and the output layer."""
    head = (OUTPUT, EMBEDDING)
    vocabulary = ("vocab", "hidden")
    return (
        Rule(LAYER + "embed_tokens.weight", head[1], vocabulary, unpad, stack="mtp"),
        *mtp_without_copies(layer, "shared_head.norm.weight"),
        Rule(LAYER + "shared_head.head.weight", head, vocabulary, unpad, stack="mtp"),
    )


def mtp_apart(layer: Iterable[Rule], weight: Block = whole) -> tuple[Rule, ...]:
    """Likewise of a model that has them apart; with `one_around_all`. `weight` makes the weights of
    norms, which are as stored if they are around zero on both sides."""

    def norm(hf: str, source: str) -> Rule:
        return Rule(_HF + hf, _AT + source, ("hidden",), weight, stack="mtp")

    return (
        Rule(_HF + "fc.weight", _AT + "eh_proj.weight", ("hidden", "mtp_columns"), stack="mtp"),
        *(inside(rule, _HF + "layers.{mtp}.") for rule in layer),
        norm("norm.weight", "final_layernorm.weight"),
        norm("pre_fc_norm_embedding.weight", "enorm.weight"),
        norm("pre_fc_norm_hidden.weight", "hnorm.weight"),
    )


def one_around_all(facts: Facts) -> str | None:
    """Check: there is one layer for multi-token prediction at most, as each of Megatron's has
    projection and norms of its own."""
    count = facts.dims.get("mtp", 0)
    if count < 2:
        return None
    return (
        f"it has {count} layers for multi-token prediction, each with an eh_proj of its own: "
        "the Hugging Face model has one mtp.fc for all"
    )


def _count(facts: Facts) -> Proven:
    """A reference may have more: trainings often leave them out."""
    return Proven(facts.dims.get("mtp", 0))


NEXTN_KEYS: Mapping[str, Key] = {
    "num_nextn_predict_layers": Key(_count, aliases=("num_mtp_layers",))
}
MTP_HIDDEN_KEYS: Mapping[str, Key] = {
    "mtp_num_hidden_layers": Key(_count, aliases=("num_mtp_layers",))
}
"""Qwen3.5's name for the same."""
