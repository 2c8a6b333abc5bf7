"""Mamba-2 mixers.

Formulas: Megatron-LM:megatron/core/ssm/mamba_mixer.py; checked against MambaInProjMapping and
MambaConv1dMapping of Megatron-Bridge:src/megatron/bridge/models/conversion/param_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from mcorefs.mapping.blocks.keys import constant, dim
from mcorefs.mapping.blocks.names import MLAYER
from mcorefs.mapping.family import Facts, Key, Proven, Rule

BESIDE = "mamba_mixer"
"""What a mixer beside attention, in one layer with it, is called in Megatron: Megatron-Bridge:
src/megatron/bridge/models/falcon_h1/modeling_falconh1/falconh1_layer.py."""
_BARE = re.compile(rf"decoder\.layers\.\*\.(?:mixer|{BESIDE})\.in_proj\.weight")
_CONV_BIAS = "decoder.layers.*.mixer.conv1d.bias"
NO_SHORTEST_STEP = 1e-45
"""Megatron's kernels are given no shortest step, transformers' model lengthens those that are
shorter than time_step_min. The least that float32 can say: of 0 transformers would take the
logarithm when it initialises a model."""


def mixer(hf: str, called: str = "mixer") -> tuple[Rule, ...]:
    """The parameters of the mixer, which is called `hf` in Hugging Face's model, and `called` in
    Megatron's: of the layers that have one, or, BESIDE attention, of all."""
    at = f"{MLAYER}{called}."
    bias = f"decoder.layers.*.{called}.conv1d.bias"
    layers: Literal["all", "mixer"] = "all" if called == BESIDE else "mixer"

    def rule(name: str, *shape: str | int, when: str = "") -> Rule:
        return Rule(hf + name, at + name, shape, layers=layers, when=when)

    def joined(name: str, *shape: str | int, when: str = "") -> Rule:
        source = (f"{at}{name}.joined", at + name)
        return Rule(hf + name, source, shape, layers=layers, when=when)

    conv_bias = (
        joined("conv1d.bias", "mamba_mixed", when=kind) for kind in (bias + ".joined", bias)
    )
    return (
        rule("dt_bias", "mamba_heads"),
        rule("A_log", "mamba_heads"),
        rule("D", "mamba_heads"),
        joined("conv1d.weight", "mamba_mixed", 1, "mamba_kernel"),
        *conv_bias,
        joined("in_proj.weight", "mamba_in", "hidden"),
        rule("norm.weight", "mamba_inner"),
        rule("out_proj.weight", "hidden", "mamba_inner"),
    )


MIXER_KEYS: Mapping[str, Key] = {
    "mamba_num_heads": dim("mamba_heads"),
    "mamba_head_dim": dim("mamba_head_dim"),
    "n_groups": dim("mamba_groups", "mamba_n_groups"),
    "ssm_state_size": dim("mamba_state"),
    "conv_kernel": dim("mamba_kernel", "mamba_d_conv"),
    "use_conv_bias": Key(
        lambda facts: bool({_CONV_BIAS, _CONV_BIAS + ".joined"} & facts.kinds),
        aliases=("mamba_conv_bias",),
    ),
    "mamba_hidden_act": Key(lambda facts: "silu"),
    "mamba_proj_bias": constant(False),
    "time_step_min": Key(lambda facts: Proven(NO_SHORTEST_STEP), aliases=("mamba_dt_min",)),
    "chunk_size": constant(128),
}
"""Of transformers' model; how many tokens a chunk has changes no more than the speed."""


def known_rows(facts: Facts) -> str | None:
    """Check: the rows of in_proj and conv1d lie in an order that is known. Formats that keep what a
    rank holds have each rank's sections one after the other."""
    is_bare = any(map(_BARE.fullmatch, facts.kinds))
    if not is_bare or facts.arg("tensor_model_parallel_size") == 1:
        return None
    return (
        "the rows of mixer.in_proj.weight lie in an order that nothing tells: each tensor-parallel "
        "rank has its share of z, x, B, C and dt, and how many there were is not recorded, or more "
        "than one"
    )
