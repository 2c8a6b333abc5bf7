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
from mcorefs.mapping.family import Block, Facts, Key, Rule, Soft, whole
from mcorefs.views import Cat, Flatten, Narrow, Unflatten, View

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


def is_slimes(facts: Facts) -> bool:
    """Whether indexers are those of slime:slime_plugins/models/glm5/glm5.py: beside the parameters
    of the attention, given normed queries whatever that norm is part of, always rotating
    neighbours, and those in the last part of each head."""
    return "decoder.layers.*.self_attention.wk.weight" in facts.kinds


def _rotated_first(block: Block) -> Block:
    """What `block` makes, with the part of each head that is rotated before the rest."""

    def made(view: View, facts: Facts) -> View:
        rows = block(view, facts)
        if not is_slimes(facts):
            return rows
        size, rotated = facts.dims["index_dim"], facts.dims["qk_rope"]
        heads = Unflatten(rows, 0, (rows.shape[0] // size, size))
        rest = size - rotated
        return Flatten(Cat((Narrow(heads, 1, rest, rotated), Narrow(heads, 1, 0, rest)), 1), 0, 2)

    return made


index_rows, index_gamma = _rotated_first(whole), _rotated_first(gamma)
"""Blocks: what there is of each element of a head, and of them the weight of the norm."""


def _wherever(rule: Rule) -> Rule:
    """`rule` for the layers with an indexer, also where that is slime's."""
    source = rule.sources[0]
    apart = source.replace("core_attention.indexer.", "").replace(".linear_", ".")
    block = index_gamma if rule.block is gamma else index_rows
    if "index_heads" in rule.shape:
        block = rule.block
    return replace(rule, source=(source, apart), block=block, layers="indexed")


SHARED_INDEXERS = tuple(map(_wherever, INDEXER))
"""Of a model whose layers may share the keys that the indexer of one before them chose."""

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
(mcore-bridge:src/mcore_bridge/config/model_config.py)."""


def queries_normed_for_indexer(facts: Facts) -> str | None:
    """Check: the indexer is given queries behind the norm of their latent.

    Up to megatron-core 0.18 that norm was part of linear_q_up_proj, so the indexer saw what is
    before it; it also rotated the last part of its heads (NVIDIA/Megatron-LM pull request 3026).
    """
    if not {_NORMS_OF_LATENTS, _INDEXERS} <= facts.kinds:
        return None
    return (
        "the norm of the queries' latent is part of linear_q_up_proj, so the indexer chose keys by "
        "queries without it (megatron-core up to 0.18; later versions have it as q_layernorm): no "
        "Hugging Face model does, and its output would differ"
    )


def _shared_after(freq: int, offset: int, layer: int) -> bool:
    """Megatron-LM:megatron/core/transformer/experimental_attention_variant/dsa.py
    is_dsa_skip_topk_layer, whose layers count from 1."""
    return max(layer + 1 - max(offset, 1), 0) % freq != 0


def shared_as_said(facts: Facts) -> str | None:
    """Check: those layers have no indexer of their own of which the arguments say so, and not the
    first."""
    layers = range(facts.dims["layers"])
    shared = [layer for layer in layers if layer not in facts.indexed_layers]
    if 0 in shared:
        return "layer 0 has no indexer, and there is none before it whose choice it could share"
    freq, offset = facts.arg("dsa_indexer_topk_freq"), facts.arg("dsa_indexer_skip_topk_offset")
    if not isinstance(freq, int) or freq < 1:
        return None
    wanted = [n for n in layers if _shared_after(freq, offset if isinstance(offset, int) else 0, n)]
    if shared == wanted:
        return None
    return (
        f"layers {shared or 'none'} hold no indexer, but with dsa_indexer_topk_freq={freq} and "
        f"dsa_indexer_skip_topk_offset={offset} it would be layers {wanted or 'none'}"
    )


def rotation_told(facts: Facts) -> str | None:
    """Check: what records the arguments of indexers says how they rotate, too (ms-swift records
    neither)."""
    told = facts.arg(*INTERLEAVED) is not None or is_slimes(facts)
    if told or facts.arg("dsa_indexer_topk") is None:
        return None
    return (
        "no argument says how indexers rotate their heads (dsa_indexer_rope_interleaved, since "
        "megatron-core 0.19): before there was one it rotated the last part of each, which no "
        "Hugging Face model does, and its output would differ"
    )


def _schedule(facts: Facts) -> tuple[int, int | None]:
    """(index_topk_freq, index_skip_topk_offset) by which just these layers have an indexer: the
    first so many, then one in so many. No offset where all have one; 0 if it is otherwise."""
    layers = range(facts.dims["layers"])
    shared = [layer for layer in layers if layer not in facts.indexed_layers]
    if not shared:
        return 1, None
    offset = shared[0]
    further = (layer for layer in layers[offset:] if layer in facts.indexed_layers)
    freq = next(further, len(layers)) - offset + 1
    regular = shared == [layer for layer in layers if _shared_after(freq, offset, layer)]
    return (freq, offset) if regular else (0, None)


def _freq(facts: Facts) -> int | None:
    return _schedule(facts)[0] or None


def _offset(facts: Facts) -> object:
    offset = _schedule(facts)[1]
    return Soft(0) if offset is None else offset


def _types(facts: Facts) -> list[str]:
    layers = range(facts.dims["layers"])
    return ["full" if layer in facts.indexed_layers else "shared" for layer in layers]


def _interleaved(facts: Facts) -> bool | None:
    """mcore-bridge follows a reference, of which ms-swift's arguments say nothing."""
    return True if is_slimes(facts) or facts.arg(*INTERLEAVED) else None


SHARED_INDEX_KEYS: Mapping[str, Key] = {
    **INDEX_KEYS,
    "indexer_types": Key(_types),
    "index_topk_freq": Key(_freq),
    "index_skip_topk_offset": Key(_offset),
    "indexer_rope_interleave": Key(_interleaved, only=(True,)),
}
"""Which layers have an indexer is said to transformers by indexer_types, to engines by the next two
(vLLM, SGLang; so does Megatron-Bridge:src/megatron/bridge/models/glm_moe_dsa/glm5_bridge.py)."""
