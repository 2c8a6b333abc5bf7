"""The two ends of a decoder, and the norms of its layers."""

from __future__ import annotations

from dataclasses import replace

from mcorefs.arithmetic import Add
from mcorefs.mapping.blocks.names import (
    ATTENTION_OUTPUT_NORM,
    EMBEDDING,
    INPUT_NORM,
    LAYER,
    MLP_NORM,
    MLP_OUTPUT_NORM,
    OUTPUT,
)
from mcorefs.mapping.family import Block, Facts, Rule, whole
from mcorefs.views import Narrow, Permute, View


def unpad(view: View, facts: Facts) -> View:
    """Vocabulary rows without the padding that makes them divisible by TP."""
    return Narrow(view, 0, 0, facts.dims["vocab"])


def transposed(block: Block = whole) -> Block:
    """What `block` makes, as transformers' Conv1D holds a weight: [in, out]."""
    return lambda view, facts: Permute(block(view, facts), (1, 0))


EMBED = Rule("model.embed_tokens.weight", EMBEDDING, ("vocab", "hidden"), unpad)
HEAD = Rule(
    "lm_head.weight",
    OUTPUT,
    ("vocab", "hidden"),
    unpad,
    when=OUTPUT,
)


def gamma(view: View, facts: Facts) -> View:
    """The weight of a norm as it multiplies, which Megatron may hold around zero."""
    return Add(view, 1.0) if facts.norms_at_zero else view


def norm(hf: str, *at: str) -> Rule:
    """The weight of a norm of hidden states; `at`: where it may be, up to the parameter."""
    return Rule(hf + "weight", tuple(f"{place}weight" for place in at), ("hidden",), gamma)


def at_zero(*rules: Rule) -> tuple[Rule, ...]:
    """Rules of norms whose weights transformers adds 1 to as well: as they are stored."""
    return tuple(replace(rule, block=whole) for rule in rules)


def layer_norm(hf: str, *at: str) -> tuple[Rule, Rule]:
    """`norm`, and its bias."""
    bias = Rule(hf + "bias", tuple(f"{place}bias" for place in at), ("hidden",))
    return norm(hf, *at), bias


NORM = norm("model.norm.", "decoder.final_layernorm.")
LAYER_NORMS = (
    norm(LAYER + "input_layernorm.", *INPUT_NORM),
    norm(LAYER + "post_attention_layernorm.", *MLP_NORM),
)
SANDWICH_NORMS = (
    norm(LAYER + "input_layernorm.", *INPUT_NORM),
    norm(LAYER + "post_attention_layernorm.", *ATTENTION_OUTPUT_NORM),
    norm(LAYER + "pre_feedforward_layernorm.", *MLP_NORM),
    norm(LAYER + "post_feedforward_layernorm.", *MLP_OUTPUT_NORM),
)
"""Before and behind attention and MLP, as Gemma calls them."""
