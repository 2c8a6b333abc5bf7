"""What a model family is: a value, written as one short file in `families/`.

A family says which Hugging Face tensor comes from which canonical Megatron tensor (`rules`), how
config.json follows from the checkpoint (`config`), and which training arguments it cannot express
(`requires`). That is also what gives it away: a checkpoint may be of a family if its rules find all
they need and use all there is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from mcorefs.errors import MappingError
from mcorefs.views import View

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def kind(name: str) -> str:
    """`name` with * for the numbers of layers and experts."""
    return _NUMBER.sub("*", name)


@dataclass(frozen=True)
class Facts:
    """What is known of a model: sizes proven by tensor shapes, and its training arguments."""

    dims: Mapping[str, int]
    """Named sizes: hidden, layers, heads, groups, head_dim, q_rows, kv_rows, qkv_rows, ffn,
    gate_up (two of it), experts, moe_ffn, moe_gate_up (two of it), shared_ffn, positions, vocab
    (rows kept), padded_vocab (rows stored), labels; mtp, the number of layers for multi-token
    prediction; those of latent attention and of indexers (`latent`), of Mamba (`mamba`), of experts
    with a latent and of vision (`vision`). Absent where the model has no such."""
    args: Mapping[str, object]
    """Training arguments that are set; None counts as absent."""
    moe_layers: frozenset[int]
    """Layers that have a router; those for multi-token prediction count on behind the decoder's."""
    tied: bool
    """The checkpoint stores no output layer."""
    dtype: str
    """torch name of the dtype of the stored embedding."""
    kinds: frozenset[str]
    """The `kind` of every canonical tensor."""
    linear_layers: frozenset[int] = frozenset()
    """Layers whose attention is linear: gated delta nets."""
    sliding_layers: frozenset[int] = frozenset()
    """Layers whose attention has a window, where that has another shape than that of the others:
    sliding_heads, sliding_groups and the like in `dims`; numbered as `moe_layers`."""
    modules: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """The layers that have a mixer (Mamba), self_attention or an mlp (experts, too)."""
    indexed_layers: frozenset[int] = frozenset()
    """Layers that have an indexer of their own; numbered as `moe_layers`."""
    stated: Mapping[str, object] = field(default_factory=dict)
    """The config.json that the user gave: what a family may take it at its word for."""
    described: Mapping[str, object] = field(default_factory=dict)
    """The config.json that says what arguments do not, whoever brought it."""

    @property
    def mtp_layers(self) -> range:
        """Numbers of the layers for multi-token prediction, behind those of the decoder."""
        return range(self.dims["layers"], self.dims["layers"] + self.dims.get("mtp", 0))

    @property
    def dense_layers(self) -> list[int]:
        return [layer for layer in range(self.dims["layers"]) if layer not in self.moe_layers]

    @property
    def norms_at_zero(self) -> bool:
        """Megatron adds 1 to the weights of norms; newer versions know it by the first name."""
        names = ("layernorm_zero_centered_gamma", "apply_layernorm_1p")
        return any(self.args.get(name) for name in names)

    def arg(self, *names: str) -> object | None:
        """The first of `names` that is set: argument names drift between Megatron versions.

        Raises MappingError where that is a number that no model can have.
        """
        name = next((name for name in names if name in self.args), None)
        if name is None:
            return None
        if _is_impossible(self.args[name]):
            raise MappingError(
                "the training arguments cannot be those of a model:",
                [f"{name} is {self.args[name]!r:.80}"],
            )
        return self.args[name]


def _is_impossible(value: object) -> bool:
    """Whether it is, or holds, a number that nothing can be computed with, nor JSON state."""
    if isinstance(value, list | tuple):
        return any(map(_is_impossible, value))
    if isinstance(value, dict):
        return any(map(_is_impossible, value.values()))
    return isinstance(value, int | float) and not abs(value) < 1 << 63


def is_in(rule: Rule, layer: int, facts: Facts) -> bool:
    """Whether `rule` speaks of that layer."""
    match rule.layers:
        case "dense" | "moe":
            return (layer in facts.moe_layers) == (rule.layers == "moe")
        case "full":
            return layer not in facts.linear_layers | facts.sliding_layers
        case "linear":
            return layer in facts.linear_layers
        case "sliding":
            return layer in facts.sliding_layers
        case "mixer" | "self_attention":
            return layer in facts.modules.get(rule.layers, frozenset())
        case "mlp":
            return layer in facts.modules.get("mlp", frozenset()) - facts.moe_layers
        case "indexed":
            return layer in facts.indexed_layers
        case _:
            return True


Block = Callable[[View, Facts], View]
"""Hugging Face tensor from one canonical tensor and the facts. Raises ValueError if it cannot."""


def whole(view: View, facts: Facts) -> View:
    """The tensor as it is."""
    return view


@dataclass(frozen=True)
class Rule:
    """One Hugging Face tensor, or one per {layer} and {expert}."""

    hf: str
    """Name, with the placeholders {layer}, {expert} and {mtp}, which are enumerated."""
    source: str | tuple[str, ...]
    """Canonical tensor with the same placeholders; of several, the one that is there. With {expert}
    although `hf` has none: what `block` makes of each expert's, stacked on a first axis."""
    shape: tuple[str | int, ...]
    """Expected shape, in names of `Facts.dims` and numbers."""
    block: Block = whole
    layers: Literal[
        "all",
        "dense",
        "moe",
        "full",
        "linear",
        "sliding",
        "indexed",
        "mixer",
        "self_attention",
        "mlp",
    ] = "all"
    """Those without and with experts; of full, of linear and of sliding attention (`Facts`); with
    an indexer; of hybrids, whose layers are one of these each, with a Mamba mixer, attention, an
    MLP without experts."""
    when: str = ""
    """The tensors exist only in models that hold canonical tensors of this kind (* for numbers)."""
    keeps_dtype: bool = False
    """--dtype leaves it as stored: its precision decides routing."""
    sorts_as: str = ""
    """Name to sort by where transformers holds it as part of a fused parameter, or renamed."""
    is_buffer: bool = False
    """transformers holds it as a buffer, which it does not count among the parameters."""
    stack: Literal["decoder", "mtp", "vision", "deepstack"] = "decoder"
    """Whose layers: those for multi-token prediction are {mtp} by themselves, from 0, and {layer}
    as if they came behind the decoder's. Those of a vision model, and what it has to put the output
    of some of them into the decoder's layers, are {layer}. The rule holds where the model has
    them."""

    @cached_property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else self.source

    @cached_property
    def stacks_experts(self) -> bool:
        return "{expert}" in self.sources[0] and "{expert}" not in self.hf


STACKS: Mapping[str, str] = {"vision": "vision_layers", "deepstack": "vision_deepstack"}
"""Which of `Facts.dims` says how many layers there are in a stack."""


@dataclass(frozen=True)
class Soft:
    """A config value that the user's own reference config may overrule without a conflict."""

    value: object


@dataclass(frozen=True)
class Proven:
    """A config value that follows from the tensors served: it overrules a reference config."""

    value: object


Check = Callable[[Facts], str | None]
"""The problem with a model that the family cannot express, or None."""

REQUIRED = object()
"""No sensible default: the checkpoint or --hf-config must say."""
LEFT_OUT = object()
"""As a value: the key is none of this model's."""


def as_stated(value: object) -> object:
    """What a reference config says, as it says it."""
    return value


@dataclass(frozen=True)
class Key:
    """How one key of config.json is found."""

    value: Callable[[Facts], object | None]
    """From the checkpoint: a value with which a reference must agree, Soft or Proven, or None where
    it does not say."""
    default: object = REQUIRED
    """Used, and named at mount time, where neither the checkpoint nor a reference says. With
    LEFT_OUT, the key is then left out, and what transformers' class has for it holds."""
    aliases: tuple[str, ...] = ()
    """Other names of the key in reference configs."""
    read: Callable[[object], object] = as_stated
    """What a reference says, in the words of `value`, where it may say it in others."""
    only: tuple[object, ...] = ()
    """What alone a reference may say where the checkpoint does not; empty: anything."""


@dataclass(frozen=True)
class Section:
    """A config inside config.json."""

    model_type: str
    keys: Mapping[str, Key]


@dataclass(frozen=True)
class Family:
    """A Hugging Face model family, seen from Megatron."""

    name: str
    architecture: str
    rules: tuple[Rule, ...]
    config: Mapping[str, Key]
    sections: Mapping[str, Section] = field(default_factory=dict)
    """Configs inside config.json, by the key: text_config, vision_config."""
    requires: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Arguments that must be absent or one of these values, else the weights mean another model."""
    checks: tuple[Check, ...] = ()
    """What it cannot express and no single argument tells."""
    remarks: tuple[Check, ...] = ()
    """What it expresses otherwise than it was trained, as the user's own config.json says."""
    given: tuple[str, ...] = ()
    """Arguments that must be set for the family to be chosen by itself: what tells it from another
    with the same tensors."""
    other_names: tuple[str, ...] = ()
    """model_types of what is the same model, with code of its own; served under `name`."""
    named_only: bool = False
    """Its tensors and arguments could be another family's, or nobody's: it is chosen only if the
    user, a reference or the trainer names it."""
    only_words: bool = False
    """transformers has no class of it for other tasks."""
    has_own_code: bool = False
    """transformers has no class of it: code comes with the model. config.json names it, and it is
    served, as a reference has it."""
    natural_order: bool = False
    """Whether save_pretrained writes the tensors sorted by name (models whose parameters it
    converts: transformers/core_model_loading.py revert_weight_conversion) or in module order."""

    def is_called(self, name: object) -> bool:
        """Whether `name` is a model_type or the architecture of the family."""
        return name in (self.name, self.architecture, *self.other_names)

    def but(self, **changes: object) -> Family:
        """This family with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]
