"""EXAONE's windows: layers without one rotate nothing, if any layer has one."""

from __future__ import annotations

from collections.abc import Mapping

from mcorefs.mapping.blocks.keys import attention_kinds, window
from mcorefs.mapping.family import Facts, Key, Proven


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


def full_layers_do_not_rotate(facts: Facts) -> str | None:
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


HYBRID_WINDOW_KEYS: Mapping[str, Key] = {
    "sliding_window": Key(_window, None),
    "sliding_window_pattern": Key(_pattern, None),
    "layer_types": Key(_kinds),
}
