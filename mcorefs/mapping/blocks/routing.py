"""config.json of mixtures of experts: which layers have them, and how tokens are routed.

Megatron's side: Megatron-LM:megatron/core/transformer/moe/moe_utils.py
topk_routing_with_score_function. Without a score function named, it is the softmax.
"""

from __future__ import annotations

from collections.abc import Mapping

from mcorefs.mapping.blocks.keys import arg
from mcorefs.mapping.family import Facts, Key, Soft

# -- which layers ---------------------------------------------------------------------------------

SPARSE_LAYER_KEYS: Mapping[str, Key] = {
    "decoder_sparse_step": Key(lambda facts: 1),
    "mlp_only_layers": Key(lambda facts: facts.dense_layers),
}
"""Qwen's: any layer may be dense."""

MLP_LAYER_TYPES = Key(
    lambda facts: [
        "sparse" if layer in facts.moe_layers else "dense" for layer in range(facts.dims["layers"])
    ]
)
"""mlp_layer_types."""

FIRST_K_DENSE = Key(lambda facts: len(facts.dense_layers))
"""first_k_dense_replace, where `leading_dense` holds."""


def leading_dense(facts: Facts) -> str | None:
    """Check: dense layers come before all layers of experts."""
    dense, first = facts.dense_layers, min(facts.moe_layers, default=0)
    if late := [layer for layer in dense if layer > first]:
        return f"layers {late} are dense although layer {first} has experts: only the first may be"
    return None


# -- how a router of softmaxes routes -------------------------------------------------------------


def _softmax_normalised(facts: Facts) -> bool | None:
    """Softmax after top-k gives weights that sum to one; softmax before it does not."""
    before = facts.arg("moe_router_pre_softmax")
    return None if before is None else not before


SOFTMAX_NORM_TOPK_PROB = Key(_softmax_normalised, True)
"""norm_topk_prob of families that have it both ways."""

ROUTER_REQUIRES: Mapping[str, tuple[object, ...]] = {
    "moe_apply_probs_on_input": (False,),
    "moe_router_topk_limited_devices": (),
}
"""What every router takes for granted."""

SOFTMAX_REQUIRES: Mapping[str, tuple[object, ...]] = {
    **ROUTER_REQUIRES,
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (1, 1.0),
    "moe_router_num_groups": (),
    "moe_router_group_topk": (),
}
"""What a router of softmaxes, unscaled and free to choose among all experts, takes for granted."""


def softmax_after_top_k(facts: Facts) -> str | None:
    """Check: the weights of the chosen experts sum to one. A softmax before top-k gives the same
    times their sum, which is less than one and differs from token to token; which experts are
    chosen, and their ratios, are the same."""
    if not facts.arg("moe_router_pre_softmax"):
        return None
    return (
        "the model was trained with moe_router_pre_softmax=True: the weights of a token's experts "
        "are then not divided by their sum, as this Hugging Face model divides them and no key of "
        "its config.json can keep it from doing: its output would differ by a factor for each token"
    )


def no_sinkhorn(facts: Facts) -> str | None:
    """Check: experts are chosen by score alone, not by what balances their load (as a loss does
    not). The argument may be a list of losses."""
    kind = facts.arg("moe_router_load_balancing_type")
    if kind not in ("sinkhorn", "quantile_balancing"):
        return None
    return (
        f"the model was trained with moe_router_load_balancing_type={kind!r}, a routing that no "
        "Hugging Face model has: its output would differ"
    )


def _aux_loss(facts: Facts) -> Soft | None:
    """Of several losses that of the first: transformers has one."""
    said = facts.arg("moe_aux_loss_coeff")
    first = said[0] if isinstance(said, list | tuple) and said else said
    return Soft(first) if isinstance(first, int | float) else None


AUX_LOSS_COEF = Key(_aux_loss, 0.001)
"""router_aux_loss_coef, and what else it is called."""

# -- how a router of sigmoids routes --------------------------------------------------------------


def _sigmoid_normalised(facts: Facts) -> bool | None:
    """Megatron divides by the sum of the chosen scores, but not where there is one only."""
    chosen = facts.arg("moe_router_topk")
    return chosen > 1 if isinstance(chosen, int) else None


def _groups(name: str) -> Key:
    """Groups of experts; as good as one where Megatron does not limit which are chosen."""

    def value(facts: Facts) -> object | None:
        if not facts.args:
            return None
        return facts.arg(name) if facts.arg("moe_router_group_topk") else 1

    return Key(value)


def _scaling(facts: Facts) -> float | None:
    factor = facts.arg("moe_router_topk_scaling_factor") or 1.0
    return float(factor) if facts.args and isinstance(factor, int | float) else None


SIGMOID_KEYS: Mapping[str, Key] = {
    "num_experts_per_tok": arg("moe_router_topk"),
    "norm_topk_prob": Key(_sigmoid_normalised),
    "n_group": _groups("moe_router_num_groups"),
    "topk_group": _groups("moe_router_group_topk"),
    "routed_scaling_factor": Key(_scaling),
}
SIGMOID_REQUIRES: Mapping[str, tuple[object, ...]] = {
    **ROUTER_REQUIRES,
    "moe_router_score_function": ("sigmoid",),
}


FREE_SIGMOID_REQUIRES: Mapping[str, tuple[object, ...]] = {
    **SIGMOID_REQUIRES,
    "moe_router_num_groups": (),
    "moe_router_group_topk": (),
}
"""Likewise, free to choose among all experts."""


def several_experts(facts: Facts) -> str | None:
    """Check: a token goes to more than one expert. transformers' weights of those chosen always sum
    to one; Megatron takes the score of a single one as it is."""
    if facts.arg("moe_router_topk") != 1:
        return None
    return (
        "with moe_router_topk=1 Megatron weighs an expert by its score, transformers not at all: "
        "its output would differ"
    )


def best_two_of_each_group(facts: Facts) -> str | None:
    """Check: groups of experts are chosen by the sum of their two best scores.

    transformers takes two, Megatron topk // group_topk (moe_utils.py group_limited_topk).
    """
    groups, kept, chosen = (
        facts.arg(f"moe_router_{name}") for name in ("num_groups", "group_topk", "topk")
    )
    if not (isinstance(groups, int) and isinstance(kept, int) and isinstance(chosen, int)):
        return None
    if not kept or kept == groups or chosen // kept == 2:
        return None
    return (
        f"with moe_router_topk={chosen} and moe_router_group_topk={kept} Megatron chooses groups "
        f"of experts by the sum of their {chosen // kept} best scores, transformers of their 2: "
        "its output would differ"
    )


# -- shared experts -------------------------------------------------------------------------------

N_SHARED_EXPERTS = Key(
    lambda facts: (
        facts.dims["shared_ffn"] // facts.dims["moe_ffn"]
        if {"shared_ffn", "moe_ffn"} <= set(facts.dims)
        else None
    )
)
"""n_shared_experts, where `whole_shared_experts` holds."""


def whole_shared_experts(facts: Facts) -> str | None:
    """Check: the shared experts are as wide as a whole number of the others."""
    shared, one = facts.dims.get("shared_ffn", 0), facts.dims.get("moe_ffn", 1)
    if shared % one:
        return (
            f"the shared experts are {shared} wide, which is no multiple of the others' {one}: "
            "config.json can only say how many there are"
        )
    return None
