"""ERNIE 4.5 with experts, as ms-swift trains it: routers of softmaxes without a bias, which
transformers has as one of zeros."""

from __future__ import annotations

from ..spec import Spec
from .base import DECODER, HF_LAYER, LAYER, PROJECTIONS, Family, Values, decoder_config, gated_mlp

_ERNIE_MOE = Spec(
    family="ernie4_5_moe",
    kv_heads=2,
    experts=8,
    topk=3,
    shared_ffn=96,
    moe_layer_freq=(0, 1, 1, 1),
    norm_eps=1e-5,
    rope_theta=500_000,
    vocab_size=301,
)


def _config(spec: Spec) -> Values:
    layers = [layer for layer in range(spec.layers) if spec.has_experts(layer)]
    return {
        **decoder_config(spec),
        "moe_num_experts": spec.experts,
        "moe_k": spec.topk,
        "moe_num_shared_experts": spec.shared_ffn // spec.moe_ffn,
        "moe_intermediate_size": spec.moe_ffn,
        "moe_layer_start_index": layers[0],
        "moe_layer_end_index": layers[-1],
        "moe_layer_interval": layers[1] - layers[0],
    }


def _arguments(spec: Spec) -> Values:
    return {"rotary_interleaved": True}


ERNIE4_5_MOE = Family(
    {
        "ernie4_5_moe-tp2-ep2": _ERNIE_MOE.but(
            tp=2,
            ep=2,
            etp=1,
            tied=True,
            hf_max_shard_size="100KB",
            vocab_size_in_args=True,
            seed=270,
        ),
        "ernie4_5_moe-tp2-every-other": _ERNIE_MOE.but(
            tp=2, moe_layer_freq=(0, 1, 0, 1), fp32_router=True, seed=271
        ),
        "ernie4_5_moe-pp2-ep2": _ERNIE_MOE.but(
            pp=2, dp=2, ep=2, dtype="fp32", moe_layer_freq=(0, 1, 1, 0), seed=272
        ),
        "torch-ernie4_5_moe-tp2-pp2-ep2": _ERNIE_MOE.but(
            format="torch", tp=2, pp=2, ep=2, etp=1, names="te", shared_ffn=48, seed=273
        ),
    },
    config=_config,
    arguments=_arguments,
    parameters={
        **DECODER,
        **gated_mlp(LAYER + "mlp.shared_experts.", HF_LAYER + "mlp.shared_experts.", PROJECTIONS),
    },
    zeros=(".moe_statics.e_score_correction_bias",),
)
