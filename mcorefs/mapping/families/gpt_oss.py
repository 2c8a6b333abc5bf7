"""gpt-oss (20b, 120b): attention sinks, every second layer with a window, biases in all linear
layers and in the router, clamped SwiGLU, YaRN.

Its experts are fused, transposed, and their gate and up rows alternate
(transformers:src/transformers/models/gpt_oss/modeling_gpt_oss.py GptOssExperts; checked against
Megatron-Bridge:src/megatron/bridge/models/gpt_oss/gpt_oss_bridge.py). The hub's own files hold them
in MXFP4; here they are what the checkpoint holds.
"""

from __future__ import annotations

from dataclasses import replace

from mcorefs.mapping.blocks.attention import GQA_ALL_BIAS, SINKS
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    GQA_KEYS,
    SLIDING_WINDOW,
    arg,
    attention_kinds,
    constant,
    decoder_requires,
    dim,
)
from mcorefs.mapping.blocks.mlp import router
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM, transposed
from mcorefs.mapping.blocks.names import LAYER, MLAYER
from mcorefs.mapping.blocks.routing import AUX_LOSS_COEF, SOFTMAX_REQUIRES, no_sinkhorn
from mcorefs.mapping.blocks.yarn import YARN
from mcorefs.mapping.family import Facts, Family, Key, Rule, Soft
from mcorefs.views import Flatten, Permute, Unflatten, View


def _alternating(view: View, facts: Facts) -> View:
    """Gate rows and up rows one by one, as rows of the bias or columns of the transposed weight."""
    halves = Unflatten(view, 0, (2, view.shape[0] // 2))
    pairs = Permute(halves, (1, 0) if len(view.shape) == 1 else (2, 1, 0))
    return Flatten(pairs, len(view.shape) - 1, 2)


def _layer_types(facts: Facts) -> object | None:
    kinds = attention_kinds(facts)
    if not facts.arg("window_size"):
        return Soft(kinds) if facts.args else None
    return kinds


_EXPERTS, _EXPERT = LAYER + "mlp.experts.", MLAYER + "mlp.experts.{expert}."
_FC1, _FC2 = _EXPERT + "linear_fc1.", _EXPERT + "linear_fc2."
_ROUTER = router("mlp.router.weight")

GPT_OSS = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    rules=(
        EMBED,
        SINKS,
        *GQA_ALL_BIAS,
        _ROUTER,
        replace(
            _ROUTER,
            hf=LAYER + "mlp.router.bias",
            source=MLAYER + "mlp.router.bias",
            shape=("experts",),
        ),
        Rule(
            _EXPERTS + "gate_up_proj",
            _FC1 + "weight",
            ("experts", "hidden", "moe_gate_up"),
            _alternating,
            "moe",
        ),
        Rule(
            _EXPERTS + "gate_up_proj_bias",
            _FC1 + "bias",
            ("experts", "moe_gate_up"),
            _alternating,
            "moe",
        ),
        Rule(
            _EXPERTS + "down_proj",
            _FC2 + "weight",
            ("experts", "moe_ffn", "hidden"),
            transposed(),
            "moe",
        ),
        Rule(_EXPERTS + "down_proj_bias", _FC2 + "bias", ("experts", "hidden"), layers="moe"),
        *LAYER_NORMS,
        NORM,
        HEAD,
    ),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        "hidden_act": constant("silu"),
        "rope_scaling": YARN,
        "attention_bias": constant(True),
        "intermediate_size": dim("moe_ffn"),
        "num_local_experts": dim("experts", "num_experts"),
        "num_experts_per_tok": arg("moe_router_topk"),
        "swiglu_limit": arg("activation_func_clamp_value"),
        "sliding_window": SLIDING_WINDOW,
        "layer_types": Key(_layer_types, None),
        "router_aux_loss_coef": AUX_LOSS_COEF,
        "output_router_logits": constant(False),
    },
    requires={
        **decoder_requires("window_size", "activation_func_clamp_value"),
        **SOFTMAX_REQUIRES,
        "swiglu": (False,),
        "activation_func": (),
        "quick_geglu": (True,),
        "glu_linear_offset": (1, 1.0),
        "position_embedding_type": ("yarn", "rope"),
        "add_bias_linear": (True,),
        "add_qkv_bias": (True, False),
        "softmax_type": ("learnable",),
        "moe_router_pre_softmax": (False,),
    },
    checks=(no_sinkhorn,),
)
