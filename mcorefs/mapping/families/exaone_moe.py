"""K-EXAONE: the windows of EXAONE 4, norms before attention and MLP, the first layers dense, then
experts with shared ones and a router of sigmoids with a bias for each expert; a dense layer for
multi-token prediction.

Megatron-Bridge:src/megatron/bridge/models/exaone/exaone_moe/; vLLM:vllm/model_executor/models/
exaone_moe.py for what it makes of that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mcorefs.mapping.blocks.attention import GQA, QK_NORM
from mcorefs.mapping.blocks.exaone import HYBRID_WINDOW_KEYS, full_layers_do_not_rotate
from mcorefs.mapping.blocks.keys import BASE_KEYS, GQA_KEYS, constant, decoder_requires, dim
from mcorefs.mapping.blocks.mlp import (
    GATED_MLP,
    expert_bias,
    gated_experts,
    router,
    shared_experts,
)
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM, gamma
from mcorefs.mapping.blocks.mtp import NEXTN_KEYS, mtp_apart, one_around_all
from mcorefs.mapping.blocks.routing import (
    FIRST_K_DENSE,
    MLP_LAYER_TYPES,
    N_SHARED_EXPERTS,
    SIGMOID_KEYS,
    SIGMOID_REQUIRES,
    best_two_of_each_group,
    leading_dense,
    no_sinkhorn,
    whole_shared_experts,
)
from mcorefs.mapping.family import LEFT_OUT, Facts, Family, Key, Soft

_BIAS = "e_score_correction_bias"


def _one_window(facts: Facts) -> str | None:
    """Check: what Megatron-Bridge's layers have of their own is the same for all: windows, and
    limits of what the gates let through, which transformers has none of."""
    limits, windows = facts.arg("swiglu_limits"), facts.arg("sliding_windows")
    if isinstance(limits, list | tuple) and any(limits):
        return f"with swiglu_limits={limits!r} gates are limited, in transformers they are not"
    if not isinstance(windows, list | tuple):
        return None
    common = facts.arg("window_size")
    one = common[0] + 1 if isinstance(common, list | tuple) and common else None
    if set(windows) <= {0, one}:
        return None
    return f"sliding_windows={windows!r} are not all window_size={common!r}: transformers has one"


# -- layers for multi-token prediction ------------------------------------------------------------

_WINDOWS_OF_MTP = "mtp_sliding_windows"


def _mtp_windows(facts: Facts) -> list[object] | None:
    """How many tokens each layer for multi-token prediction sees; 0: all."""
    stated = facts.arg(_WINDOWS_OF_MTP)
    if isinstance(stated, list | tuple):
        return list(stated)
    return None if facts.arg("window_size") else [0] * facts.dims.get("mtp", 0)


def _mtp_windows_as_the_decoders(facts: Facts) -> str | None:
    """Check: it is known which tokens the layer for multi-token prediction sees, and it rotates
    where engines let it: with Megatron-Bridge, if it has a window. By itself megatron-core gives it
    the window of one of the decoder's layers, another one in each version
    (multi_token_prediction.py)."""
    count = facts.dims.get("mtp", 0)
    if not count or not facts.args:
        return None
    windows, common = _mtp_windows(facts), facts.arg("window_size")
    if windows is None:
        return (
            "nothing tells whether its layer for multi-token prediction has a window: "
            f"{_WINDOWS_OF_MTP} is not set, as Megatron-Bridge sets it; --no-mtp serves the model "
            "without it"
        )
    one = common[0] + 1 if isinstance(common, list | tuple) and common else None
    if len(windows) != count or not set(windows) <= {0, one}:
        return (
            f"{_WINDOWS_OF_MTP}={windows!r}, expected {count} of 0 or {one}, the decoder's: "
            "--no-mtp serves the model without its multi-token prediction"
        )
    if one is None and facts.arg(_WINDOWS_OF_MTP) is not None:
        return (
            "its layer for multi-token prediction rotates nothing, though the decoder has no "
            "window, where engines rotate: --no-mtp serves the model without it"
        )
    return None


def _of_mtp(value: Callable[[Facts], object | None]) -> Key:
    """A key of models that have layers for multi-token prediction."""
    return Key(lambda facts: value(facts) if facts.dims.get("mtp") else LEFT_OUT, LEFT_OUT)


def _mtp_types(facts: Facts) -> list[str] | None:
    windows = _mtp_windows(facts) if facts.args else None
    if windows is None:
        return None
    return ["sliding_attention" if one else "full_attention" for one in windows]


def _steps(facts: Facts) -> Soft | None:
    """More than there are layers where one is used that many times."""
    said = facts.arg("mtp_num_layers")
    return None if said is None else Soft(said)


_MTP_KEYS: Mapping[str, Key] = {
    "mtp_layer_types": _of_mtp(_mtp_types),
    _WINDOWS_OF_MTP: _of_mtp(lambda facts: _mtp_windows(facts) if facts.args else None),
    "mtp_num_speculative_steps": _of_mtp(_steps),
}
"""Which transformers' class does not have, but Megatron-Bridge and vLLM read."""

_DENSE = (*GQA, *QK_NORM, *GATED_MLP, *LAYER_NORMS)

EXAONE_MOE = Family(
    name="exaone_moe",
    architecture="ExaoneMoeForCausalLM",
    rules=(
        EMBED,
        *_DENSE,
        *gated_experts("mlp.experts.{expert}."),
        router("mlp.gate.weight"),
        expert_bias(f"mlp.{_BIAS}", sorts_as=f"mlp.gate.{_BIAS}"),
        *shared_experts("mlp.shared_experts."),
        NORM,
        HEAD,
        *mtp_apart(_DENSE, gamma),
    ),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        **HYBRID_WINDOW_KEYS,
        **SIGMOID_KEYS,
        **NEXTN_KEYS,
        **_MTP_KEYS,
        "num_experts": dim("experts", "num_local_experts"),
        "num_shared_experts": N_SHARED_EXPERTS,
        "moe_intermediate_size": dim("moe_ffn"),
        "mlp_layer_types": MLP_LAYER_TYPES,
        "first_k_dense_replace": FIRST_K_DENSE,
        "output_router_logits": constant(False),
    },
    requires={**decoder_requires("window_size", "no_rope_freq"), **SIGMOID_REQUIRES},
    checks=(
        no_sinkhorn,
        leading_dense,
        whole_shared_experts,
        best_two_of_each_group,
        full_layers_do_not_rotate,
        _one_window,
        one_around_all,
        _mtp_windows_as_the_decoders,
    ),
    given=("window_size",),
    natural_order=True,
)
