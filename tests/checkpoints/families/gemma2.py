"""Gemma 2, as Megatron-Bridge's provider has it. Where scores and logits are capped, megatron-core
alone does not compute it (`beyond_core`); where they are not, it does: every other layer has a
window there too, if it is told so."""

from __future__ import annotations

from ..spec import Spec
from .base import DECODER, HF_LAYER, LAYER, Family, Norm, Value, Values, decoder_config
from .gemma import ARGUMENTS, BUILT

OUTPUT_NORMS = ("self_attention.linear_proj.post_layernorm", "mlp.linear_fc2.post_layernorm")
SANDWICH: dict[str, Value] = {
    **DECODER,
    f"{LAYER}{OUTPUT_NORMS[0]}.weight": Norm(HF_LAYER + "post_attention_layernorm.weight"),
    LAYER + "pre_mlp_layernorm.weight": Norm(HF_LAYER + "pre_feedforward_layernorm.weight"),
    f"{LAYER}{OUTPUT_NORMS[1]}.weight": Norm(HF_LAYER + "post_feedforward_layernorm.weight"),
}
_GEMMA2 = Spec(family="gemma2", tied=True, rope_theta=10_000, window=8, output_norms=OUTPUT_NORMS)
_SCALAR = 24


def _config(spec: Spec) -> Values:
    return {
        **decoder_config(spec),
        "hidden_act": "gelu_pytorch_tanh",  # as the hub's, though no longer read
        "sliding_window": spec.window,
        "query_pre_attn_scalar": _SCALAR,
        "attn_logit_softcapping": 50.0 if spec.beyond_core else None,
        "final_logit_softcapping": 30.0 if spec.beyond_core else None,
    }


def _arguments(spec: Spec) -> Values:
    return {
        **ARGUMENTS,
        "query_pre_attn_scalar": _SCALAR,
        "attn_logit_softcapping": 50.0 if spec.beyond_core else 0.0,
        "final_logit_softcapping": 30.0 if spec.beyond_core else 0.0,
    }


def _built(spec: Spec) -> Values:
    return {**BUILT, "softmax_scale": _SCALAR**-0.5, "window_attn_skip_freq": 2}


GEMMA2 = Family(
    {
        "gemma2-tp2-uncapped": _GEMMA2.but(tp=2, vocab_size_in_args=True, seed=220),
        "gemma2-tp2-pp2": _GEMMA2.but(tp=2, pp=2, beyond_core=True, seed=221),
        "torch-gemma2-tp2": _GEMMA2.but(
            format="torch", tp=2, names="te", beyond_core=True, seed=222
        ),
        "torch-gemma2-pp2": _GEMMA2.but(format="torch", pp=2, beyond_core=True, seed=223),
    },
    config=_config,
    arguments=_arguments,
    built=_built,
    parameters=SANDWICH,
)
