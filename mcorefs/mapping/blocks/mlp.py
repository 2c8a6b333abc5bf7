"""MLPs, gated or not: of a layer, of an expert, of shared experts; routers.

Formulas: Megatron-LM:megatron/core/transformer/mlp.py (gate and up), moe/router.py.
"""

from __future__ import annotations

from mcorefs.mapping.blocks.names import LAYER, MLAYER
from mcorefs.mapping.family import Block, Facts, Rule, whole
from mcorefs.views import Narrow, View

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MLP_BIAS = "decoder.layers.*.mlp.linear_fc1.bias"
"""The kind of tensor that models with biases in their MLPs hold."""


def gate(view: View, facts: Facts) -> View:
    """gate_proj: the first half of the rows of a gated linear_fc1."""
    return Narrow(view, 0, 0, view.shape[0] // 2)


def up(view: View, facts: Facts) -> View:
    """up_proj: the second half of the rows of a gated linear_fc1."""
    return Narrow(view, 0, view.shape[0] // 2, view.shape[0] // 2)


_FC1, _FC2 = MLAYER + "mlp.linear_fc1.", MLAYER + "mlp.linear_fc2."
GATED_MLP = (
    Rule(LAYER + "mlp.gate_proj.weight", _FC1 + "weight", ("ffn", "hidden"), gate, "dense"),
    Rule(LAYER + "mlp.up_proj.weight", _FC1 + "weight", ("ffn", "hidden"), up, "dense"),
    Rule(LAYER + "mlp.down_proj.weight", _FC2 + "weight", ("hidden", "ffn"), layers="dense"),
)
_BIASES = (
    Rule(LAYER + "mlp.gate_proj.bias", _FC1 + "bias", ("ffn",), gate, "dense", MLP_BIAS),
    Rule(LAYER + "mlp.up_proj.bias", _FC1 + "bias", ("ffn",), up, "dense", MLP_BIAS),
    Rule(LAYER + "mlp.down_proj.bias", _FC2 + "bias", ("hidden",), layers="dense", when=MLP_BIAS),
)
GATED_MLP_ALL_OR_NO_BIAS = tuple(
    rule for pair in zip(GATED_MLP, _BIASES, strict=True) for rule in pair
)
"""With biases (--add-bias-linear), or with none."""


FUSED_GATED_MLP = (
    Rule(LAYER + "mlp.gate_up_proj.weight", _FC1 + "weight", ("gate_up", "hidden")),
    Rule(LAYER + "mlp.down_proj.weight", _FC2 + "weight", ("hidden", "ffn")),
)
"""With gate above up in one tensor, as Megatron has them."""

MLP_ALL_OR_NO_BIAS = (
    Rule(LAYER + "mlp.up_proj.weight", _FC1 + "weight", ("ffn", "hidden")),
    Rule(LAYER + "mlp.up_proj.bias", _FC1 + "bias", ("ffn",), when=MLP_BIAS),
    Rule(LAYER + "mlp.down_proj.weight", _FC2 + "weight", ("hidden", "ffn")),
    Rule(LAYER + "mlp.down_proj.bias", _FC2 + "bias", ("hidden",), when=MLP_BIAS),
)
"""Not gated, with biases or with none."""


def router(hf: str, sorts_as: str = "") -> Rule:
    """The router's weight, one row per expert, under the name `hf` in its layer.

    `sorts_as`: its name in transformers' memory, where that is another.
    """
    source = MLAYER + "mlp.router.weight"
    return Rule(
        LAYER + hf,
        source,
        ("experts", "hidden"),
        layers="moe",
        keeps_dtype=True,
        sorts_as=LAYER + sorts_as if sorts_as else "",
    )


def expert_bias(hf: str, sorts_as: str = "") -> Rule:
    """What a router of sigmoids adds to choose experts, but not to weigh them: fp32 on both sides,
    on both sides a buffer. `sorts_as`: as of `router`."""
    return Rule(
        LAYER + hf,
        MLAYER + "mlp.router.expert_bias",
        ("experts",),
        layers="moe",
        keeps_dtype=True,
        is_buffer=True,
        sorts_as=LAYER + sorts_as if sorts_as else "",
    )


def gated_experts(
    hf: str, names: tuple[str, str, str] = PROJECTIONS, fused: str = ""
) -> tuple[Rule, ...]:
    """The projections `names` (gate, up, down) of each expert under `hf`, which holds {expert}.

    transformers 5 holds them fused in memory, as gate_up_proj and down_proj in `fused` (if not
    given: where `hf` has them), and sorts by that name.
    """
    at = MLAYER + "mlp.experts.{expert}."
    fc1, fc2 = at + "linear_fc1.weight", at + "linear_fc2.weight"
    memory = LAYER + (fused or hf.split("{expert}", maxsplit=1)[0])
    wide, tall = ("moe_ffn", "hidden"), ("hidden", "moe_ffn")
    gate_up, down = memory + "gate_up_proj", memory + "down_proj"
    first, second, third = (f"{LAYER}{hf}{name}.weight" for name in names)
    return (
        Rule(first, fc1, wide, gate, "moe", sorts_as=gate_up),
        Rule(second, fc1, wide, up, "moe", sorts_as=gate_up),
        Rule(third, fc2, tall, layers="moe", sorts_as=down),
    )


def shared_experts(hf: str, sorts_as: str = "") -> tuple[Rule, ...]:
    """The expert that every token goes to, or the several that Megatron holds as one, under `hf`
    (Megatron-LM:megatron/core/transformer/moe/shared_experts.py). `sorts_as`: as of `router`."""
    at, wide, tall = (
        MLAYER + "mlp.shared_experts.",
        ("shared_ffn", "hidden"),
        ("hidden", "shared_ffn"),
    )

    def rule(name: str, source: str, shape: tuple[str, str], block: Block = whole) -> Rule:
        memory = f"{LAYER}{sorts_as}{name}.weight" if sorts_as else ""
        return Rule(f"{LAYER}{hf}{name}.weight", at + source, shape, block, "moe", sorts_as=memory)

    return (
        rule("gate_proj", "linear_fc1.weight", wide, gate),
        rule("up_proj", "linear_fc1.weight", wide, up),
        rule("down_proj", "linear_fc2.weight", tall),
    )


def shared_expert_gate(hf: str) -> Rule:
    """How much of the shared expert's output each token gets (--moe-shared-expert-gate)."""
    source = MLAYER + "mlp.shared_experts.gate_weight"
    return Rule(LAYER + hf, source, (1, "hidden"), layers="moe")
