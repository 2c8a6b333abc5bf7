"""EXAONE 4: norms behind attention and MLP instead of before them, and norms of heads. Of the large
one, most layers have a window, and the others rotate nothing.

Megatron-Bridge:src/megatron/bridge/models/exaone/exaone4/.
"""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA, QK_NORM
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    GQA_KEYS,
    attention_kinds,
    decoder_requires,
    window,
)
from mcorefs.mapping.blocks.mlp import GATED_MLP
from mcorefs.mapping.blocks.model import EMBED, HEAD, NORM, norm
from mcorefs.mapping.blocks.names import ATTENTION_OUTPUT_NORM, LAYER, MLP_OUTPUT_NORM
from mcorefs.mapping.family import Facts, Family, Key, Proven


def _window(facts: Facts) -> object | None:
    """Whether there is one decides which layers rotate: without one, all do."""
    return window(facts) or (Proven(None) if facts.args else None)


def _kinds(facts: Facts) -> object | None:
    return attention_kinds(facts) if facts.args else None


def _pattern(facts: Facts) -> object | None:
    """transformers asks layer_types instead, but for a model without a window it says 0."""
    if not facts.args:
        return None
    skipped = facts.arg("window_attn_skip_freq")
    return Proven(skipped if facts.arg("window_size") and isinstance(skipped, int) else 0)


def _unrotated(facts: Facts) -> list[int]:
    """Megatron-LM:megatron/core/transformer/transformer_config.py no_rope_freq."""
    found = facts.arg("no_rope_freq")
    layers = range(facts.dims["layers"])
    if isinstance(found, int) and found:
        return [layer for layer in layers if (layer + 1) % found == 0]
    skipped = found if isinstance(found, list | tuple) else ()
    return [layer for layer, one in zip(layers, skipped, strict=False) if one]


def _full_layers_do_not_rotate(facts: Facts) -> str | None:
    """Check: transformers' layers without a window rotate nothing, if any has one."""
    if not facts.args:
        return None
    kinds = attention_kinds(facts)
    full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    still, wanted = _unrotated(facts), full if facts.arg("window_size") else []
    if still == wanted:
        return None
    return (
        f"with no_rope_freq={facts.arg('no_rope_freq')!r} layers {still} rotate nothing, where in "
        f"transformers these would not: {wanted} (those without a window, if any has one)"
    )


EXAONE4 = Family(
    name="exaone4",
    architecture="Exaone4ForCausalLM",
    rules=(
        EMBED,
        *GQA,
        *QK_NORM,
        *GATED_MLP,
        norm(LAYER + "post_attention_layernorm.", *ATTENTION_OUTPUT_NORM),
        norm(LAYER + "post_feedforward_layernorm.", *MLP_OUTPUT_NORM),
        NORM,
        HEAD,
    ),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        "sliding_window": Key(_window, None),
        "sliding_window_pattern": Key(_pattern, None),
        "layer_types": Key(_kinds),
    },
    requires=decoder_requires("window_size", "no_rope_freq"),
    checks=(_full_layers_do_not_rotate,),
)
