"""Arguments that are lists with an entry for each layer, held against the layers there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet

_OF_LAYERS = (
    "window_attn_skip_freq",
    "no_rope_freq",
    "moe_layer_freq",
    "linear_attention_freq",
    "layer_types",
    "interleaved_attn_pattern",
    "hybrid_attention_pattern",
    "sliding_windows",
    "swiglu_limits",
    "swiglu_limits_shared",
    "rotary_base_per_layer",
    "rotary_percents",
    "csa_compress_ratios",
)
"""Megatron-LM:megatron/core/transformer/transformer_config.py; and Megatron-Bridge:src/megatron/
bridge/models/ (exaone_moe_provider.py, gemma3_provider.py, mimo_v2_flash_provider.py,
step35_provider.py). Many may be numbers instead."""


def list_problems(
    args: Mapping[str, object], layers: int, kinds: Mapping[str, AbstractSet[int]]
) -> Iterator[str]:
    """What is wrong with lists among `args`, for a model of so many `layers`; those for
    multi-token prediction may have entries behind.

    `kinds`: by the argument that lists them with 1, the layers that hold tensors of a kind, which
    are of no kind at all if the model has none.
    """
    said, more = args.get("num_layers"), args.get("mtp_num_layers")
    layers = said if type(said) is int else layers  # if it is another number, that is told
    most = layers + (more if type(more) is int else 0)
    for name in _OF_LAYERS:
        listed = args.get(name)
        if not isinstance(listed, list | tuple) or _is_pair(name, listed):
            continue
        if len(listed) not in (layers, most):
            expected = f"{layers}" if most == layers else f"{layers} or {most}"
            yield (
                f"{name} in the training arguments has {len(listed)} entries, expected {expected}: "
                "one for each layer"
            )
            continue
        found = kinds.get(name, frozenset())
        wanted = {layer for layer, one in enumerate(listed[:layers]) if one}
        if found and wanted != found:
            yield (
                f"{name} in the training arguments is {list(listed)} but by their tensors these "
                f"layers are of that kind: {sorted(found)}"
            )


def without_mtp(args: Mapping[str, object]) -> dict[str, object]:
    """`args` of the model without its layers for multi-token prediction, with no entries for them
    at the end of lists."""
    layers, more = args.get("num_layers"), args.get("mtp_num_layers")
    kept = {name: value for name, value in args.items() if not name.startswith("mtp_")}
    if type(layers) is int and type(more) is int:
        for name in _OF_LAYERS:
            listed = kept.get(name)
            if isinstance(listed, list | tuple) and len(listed) == layers + more:
                kept[name] = list(listed[:layers])
    return kept


def _is_pair(name: str, listed: list[object] | tuple[object, ...]) -> bool:
    """Gemma 3's may be two numbers of layers that take turns."""
    return name == "interleaved_attn_pattern" and not all(isinstance(one, str) for one in listed)
