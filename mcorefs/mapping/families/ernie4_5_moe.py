"""ERNIE 4.5 with experts: neighbours rotated together on both sides, some layers dense, experts
chosen by softmax, shared ones.

transformers adds a bias for each expert to their probabilities to choose some of them
(modeling_ernie4_5_moe.py Ernie4_5_MoeTopKRouter). megatron-core knows such a bias beside a softmax
in no version (transformer_config.py): ms-swift trains without one, which is a bias of zeros, and
the model computes the same. Megatron-Bridge trains with sigmoids instead
(src/megatron/bridge/models/ernie/ernie_45_bridge.py): that is another model, and is refused.
"""

from __future__ import annotations

from mcorefs.dtypes import F32
from mcorefs.mapping.blocks.attention import GQA, as_stored
from mcorefs.mapping.blocks.keys import BASE_KEYS, GQA_KEYS, arg, constant, decoder_requires, dim
from mcorefs.mapping.blocks.mlp import GATED_MLP, gated_experts, router, shared_experts
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.blocks.names import LAYER, MLAYER
from mcorefs.mapping.blocks.routing import (
    AUX_LOSS_COEF,
    N_SHARED_EXPERTS,
    SOFTMAX_REQUIRES,
    no_sinkhorn,
    whole_shared_experts,
)
from mcorefs.mapping.family import Facts, Family, Key, Proven, Rule
from mcorefs.views import View, Zeros

_BIAS = "moe_statics.e_score_correction_bias"


def _no_bias(router: View, facts: Facts) -> View:
    """A bias of zeros for each row of a router."""
    return Zeros((1, router.shape[0]), F32)


def _every(facts: Facts) -> range:
    """Layers from the first of experts to the last, as far apart as the first two."""
    layers = sorted(layer for layer in facts.moe_layers if layer < facts.dims["layers"])
    step = layers[1] - layers[0] if len(layers) > 1 else 1
    return range(layers[0], layers[-1] + 1, step)


def _evenly_spaced(facts: Facts) -> str | None:
    """Check: transformers has experts in the layers from one number to another whose numbers,
    counted from 1, are multiples of a third."""
    if not facts.moe_layers:
        return None  # which the missing tensors tell
    every = _every(facts)
    if set(every) == facts.moe_layers and (every.start + 1) % every.step == 0:
        return None
    return (
        f"layers {sorted(facts.moe_layers)} have experts: config.json can only say from which "
        "layer to which, and every how many"
    )


ERNIE4_5_MOE = Family(
    name="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    rules=(
        EMBED,
        *as_stored(*GQA),
        *GATED_MLP,
        *gated_experts("mlp.experts.{expert}."),
        router("mlp.gate.weight"),
        Rule(
            LAYER + "mlp." + _BIAS,
            MLAYER + "mlp.router.weight",
            (1, "experts"),
            _no_bias,
            "moe",
            keeps_dtype=True,
            sorts_as=LAYER + "mlp.gate." + _BIAS,
        ),
        *shared_experts("mlp.shared_experts."),
        *LAYER_NORMS,
        NORM,
        HEAD,
    ),
    config={
        **{name: key for name, key in BASE_KEYS.items() if name != "attention_dropout"},
        **GQA_KEYS,
        "use_bias": Key(lambda facts: False),
        "moe_num_experts": dim("experts", "num_experts"),
        "moe_k": arg("moe_router_topk"),
        "moe_num_shared_experts": N_SHARED_EXPERTS,
        "moe_intermediate_size": dim("moe_ffn"),
        "moe_layer_start_index": Key(lambda facts: Proven(_every(facts).start)),
        "moe_layer_end_index": Key(lambda facts: Proven(_every(facts)[-1])),
        "moe_layer_interval": Key(lambda facts: Proven(_every(facts).step)),
        "moe_norm_min": constant(1e-12),
        "router_aux_loss_coef": AUX_LOSS_COEF,
        "output_router_logits": constant(False),
    },
    requires={
        **decoder_requires(),
        **SOFTMAX_REQUIRES,
        "moe_router_pre_softmax": (False,),
        "moe_router_enable_expert_bias": (False,),
        "rotary_interleaved": (True,),
    },
    checks=(no_sinkhorn, whole_shared_experts, _evenly_spaced),
    named_only=True,
    natural_order=True,
)
