"""Mixtral: experts in every layer, under names of its own."""

from __future__ import annotations

from ..spec import Spec
from .base import DECODER, EXPERT, HF_LAYER, LAYER, Family, Values, Whole, decoder_config, gated_mlp

_MIXTRAL = Spec(family="mixtral", experts=8, norm_eps=1e-5, vocab_size=301)
_HF = HF_LAYER + "block_sparse_moe."


def _config(spec: Spec) -> Values:
    return {
        **decoder_config(spec),
        "intermediate_size": spec.moe_ffn,
        "num_local_experts": spec.experts,
        "num_experts_per_tok": spec.topk,
        "sliding_window": spec.window,
    }


MIXTRAL = Family(
    {
        "mixtral-tp2-ep2": _MIXTRAL.but(
            tp=2, ep=2, etp=1, hf_max_shard_size="100KB", vocab_size_in_args=True, seed=130
        ),
        "mixtral-tp2-window": _MIXTRAL.but(tp=2, window=8, kv_heads=2, topk=3, seed=131),
        "mixtral-pp2-ep2": _MIXTRAL.but(pp=2, dp=2, ep=2, fp32_router=True, seed=132),
        "torch-mixtral-tp2-pp2-ep2": _MIXTRAL.but(
            format="torch", tp=2, pp=2, ep=2, etp=1, names="te", seed=133
        ),
    },
    config=_config,
    parameters={
        **DECODER,
        LAYER + "mlp.router.weight": Whole(_HF + "gate.weight"),
        **gated_mlp(EXPERT, _HF + "experts.{expert}.", ("w1", "w3", "w2")),
    },
)
