"""Vision models of the Qwen3-VL kind, before a language model whose first layers are given what
some of theirs put out ("deepstack").

A trainer has either transformers' own module, whose names follow `vision_model.` and whose values
are those of the save, or one of Megatron's layers
(mbridge:mbridge/models/qwen3_vl/vision_model.py, Megatron-Bridge:src/megatron/bridge/models/
qwen_vl/modelling_qwen3_vl), whose linear_qkv has one head after the other: query, key, value.
Whatever the arguments say of the
language model, its norms are not around zero, and it rotates halves
(mbridge:mbridge/models/qwen3_vl/transformer_config.py get_vision_model_config).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

from mcorefs.mapping.blocks.keys import MODEL_KEYS, arg, dim
from mcorefs.mapping.blocks.names import INPUT_NORM, MLAYER, MLP_NORM
from mcorefs.mapping.family import Block, Facts, Key, Proven, Rule, Soft, whole
from mcorefs.names import MEGATRON_VISION, VISION
from mcorefs.views import Flatten, Permute, Unflatten, View

_HF = "model.visual."
_LANGUAGE = "model.language_model."
_NATIVE = MEGATRON_VISION + "layers.*.self_attention.linear_qkv.weight"


def in_language_model(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Rules of a language model by itself, for one inside of a model that sees."""

    def named(name: str) -> str:
        return _LANGUAGE + name.removeprefix("model.") if name.startswith("model.") else name

    return tuple(replace(rule, hf=named(rule.hf), sorts_as=named(rule.sorts_as)) for rule in rules)


def of_module(hf: str, shapes: Mapping[str, tuple[str, ...]]) -> Iterator[Rule]:
    """Rules of a module of transformers', whose tensors `shapes` names in its order."""
    for name, shape in shapes.items():
        stack: Literal["decoder", "vision"] = "vision" if "{layer}" in name else "decoder"
        yield Rule(hf + name, VISION + name, shape, stack=stack)


def _one_by_one(view: View, facts: Facts) -> View:
    """All queries, then all keys, then all values."""
    if _NATIVE not in facts.kinds:
        return view
    heads = facts.dims["vision_heads"]
    of_heads = Unflatten(view, 0, (heads, 3, view.shape[0] // (3 * heads)))
    axes = (1, 0, *range(2, len(of_heads.shape)))
    return Flatten(Permute(of_heads, axes), 0, 3)


def _both(
    hf: str, megatron: Iterable[str], weight: tuple[str | int, ...], block: Block = whole
) -> Iterator[Rule]:
    """Weight and bias of a module of a block; `megatron`: where they may be in Megatron's layers,
    up to the parameter."""
    at = "blocks.{layer}."
    places = tuple(megatron)
    for name, shape in (("weight", weight), ("bias", weight[:1])):
        native = (f"{MEGATRON_VISION}layers.{{layer}}.{place}{name}" for place in places)
        source = (f"{VISION}{at}{hf}.{name}", *native)
        yield Rule(f"{_HF}{at}{hf}.{name}", source, shape, block, stack="vision")


def _at(places: Iterable[str]) -> Iterator[str]:
    """`places` in a layer of the decoder, in any layer."""
    return (place.removeprefix(MLAYER) for place in places)


def _merger(at: str, megatron: str, norm: str) -> Iterator[Rule]:
    """What makes one vector for the language model out of those of neighbouring patches."""
    stack: Literal["decoder", "deepstack"] = "deepstack" if "{layer}" in at else "decoder"
    shapes: Mapping[str, tuple[str, ...]] = {
        "norm": (norm,),
        "linear_fc1": ("vision_merged", "vision_merged"),
        "linear_fc2": ("hidden", "vision_merged"),
    }
    for module, shape in shapes.items():
        native = "patch_norm" if module == "norm" else module
        for name in ("weight", "bias"):
            yield Rule(
                f"{_HF}{at}{module}.{name}",
                (f"{VISION}{at}{module}.{name}", f"{VISION}{megatron}{native}.{name}"),
                shape if name == "weight" else shape[:1],
                stack=stack,
            )


PATCHES = ("vision_hidden", "vision_channels", "vision_frames", "vision_patch", "vision_patch")
"""The shape of what makes a vector of a patch."""
VISION_RULES = (
    Rule(_HF + "patch_embed.proj.weight", VISION + "patch_embed.proj.weight", PATCHES),
    Rule(_HF + "patch_embed.proj.bias", VISION + "patch_embed.proj.bias", ("vision_hidden",)),
    Rule(
        _HF + "pos_embed.weight",
        VISION + "pos_embed.weight",
        ("vision_positions", "vision_hidden"),
    ),
    *_both("norm1", _at(INPUT_NORM), ("vision_hidden",)),
    *_both("norm2", _at(MLP_NORM), ("vision_hidden",)),
    *_both(
        "attn.qkv", ["self_attention.linear_qkv."], ("vision_qkv", "vision_hidden"), _one_by_one
    ),
    *_both("attn.proj", ["self_attention.linear_proj."], ("vision_hidden", "vision_hidden")),
    *_both("mlp.linear_fc1", ["mlp.linear_fc1."], ("vision_ffn", "vision_hidden")),
    *_both("mlp.linear_fc2", ["mlp.linear_fc2."], ("vision_hidden", "vision_ffn")),
    *_merger("merger.", "merger.", "vision_hidden"),
)
DEEPSTACK_RULES = tuple(
    _merger(
        "deepstack_merger_list.{layer}.",
        "decoder.deepstack_merger_list.{layer}.",
        "vision_merged",
    )
)


def fills_hidden(facts: Facts) -> str | None:
    """Check: the heads of the language model are as large as transformers takes them to be, which
    has no key for it."""
    hidden, rows = facts.dims.get("hidden"), facts.dims.get("q_rows", 0)
    if hidden == rows:
        return None
    return f"its heads have {rows} rows, and do not fill the hidden size of {hidden}"


VISION_KEYS: Mapping[str, Key] = {
    "depth": dim("vision_layers"),
    "hidden_size": dim("vision_hidden"),
    "intermediate_size": dim("vision_ffn"),
    "num_heads": dim("vision_heads"),
    "in_channels": dim("vision_channels"),
    "patch_size": dim("vision_patch"),
    "temporal_patch_size": dim("vision_frames"),
    "spatial_merge_size": dim("vision_merge"),
    "out_hidden_size": dim("hidden"),
    "num_position_embeddings": dim("vision_positions"),
    "hidden_act": Key(lambda facts: None, "gelu_pytorch_tanh"),
    "initializer_range": Key(lambda facts: None, 0.02),
}
DEEPSTACK: Mapping[str, Key] = {"deepstack_visual_indexes": arg("deepstack_visual_indexes")}
"""Which layers' output it is: only the order of the mergers shows."""


def _mrope(facts: Facts) -> object | None:
    found = facts.arg("mrope_section")
    return list(found) if isinstance(found, list | tuple) else None


_MROPE_SECTION = Key(_mrope)
"""How many of the rotated elements follow each of the three positions of an image."""
_IN_TURNS = Key(lambda facts: Soft(True))

TOKEN_KEYS: Mapping[str, Key] = {
    name: arg(name)
    for name in (
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
    )
}


TOP_KEYS: Mapping[str, Key] = {
    "tie_word_embeddings": MODEL_KEYS["tie_word_embeddings"],
    **TOKEN_KEYS,
}
"""What is in config.json itself, beside the configs of the parts."""
IN_TEXT_CONFIG = Key(lambda facts: Proven(facts.tied))
"""tie_word_embeddings, where some engines look for it and transformers does not."""


def only(keys: Mapping[str, Key], *without: str, interleaved: bool = True) -> Mapping[str, Key]:
    """`keys` of a language model by itself, but for what its config has not inside another.

    `interleaved`: elements follow the three positions of an image in turns.
    """
    found = {name: key for name, key in keys.items() if name not in without}
    found |= {"mrope_section": _MROPE_SECTION, "tie_word_embeddings": IN_TEXT_CONFIG}
    return {**found, "mrope_interleaved": _IN_TURNS} if interleaved else found
