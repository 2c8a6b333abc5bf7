"""Qwen3.5's language model of experts. Its positions are those of images too (mrope), which of a
text are those of rope: so are they computed here."""

from __future__ import annotations

from ..spec import Spec
from .base import AT_MTP_APART, Family, Values
from .qwen3_5_text import APART
from .qwen3_next import HYBRID, SHARED_EXPERT, hybrid_arguments, hybrid_config

_QWEN3_5_MOE = HYBRID.but(family="qwen3_5_moe_text", experts=8, shared_ffn=80, vocab_size=301)


def _config(spec: Spec) -> Values:
    return {
        **{
            name: value
            for name, value in hybrid_config(spec).items()
            if name != "intermediate_size"
        },
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.topk,
        "moe_intermediate_size": spec.moe_ffn,
        "shared_expert_intermediate_size": spec.shared_ffn,
        "mtp_num_hidden_layers": spec.mtp,
    }


def _arguments(spec: Spec) -> Values:
    return {
        **hybrid_arguments(spec),
        "moe_shared_expert_gate": True,
        "position_embedding_type": "mrope",
        "mrope_section": [1, 1, 0],
    }


def _built(spec: Spec) -> Values:
    return {"position_embedding_type": "rope", "mrope_section": None}


QWEN3_5_MOE_TEXT = Family(
    {
        "qwen3_5_moe_text-tp2-ep2": _QWEN3_5_MOE.but(
            tp=2, ep=2, etp=1, hf_max_shard_size="100KB", vocab_size_in_args=True, seed=190
        ),
        "qwen3_5_moe_text-fp32": _QWEN3_5_MOE.but(dtype="fp32", topk=3, tied=True, seed=191),
        "qwen3_5_moe_text-ep2-mtp": _QWEN3_5_MOE.but(dp=2, ep=2, mtp=1, seed=194),
        "qwen3_5_moe_text-pp2-ep2": _QWEN3_5_MOE.but(pp=2, dp=2, ep=2, seed=192),
        "torch-qwen3_5_moe_text-tp2-pp2-ep2": _QWEN3_5_MOE.but(
            format="torch", tp=2, pp=2, ep=2, etp=1, names="te", seed=193
        ),
    },
    config=_config,
    arguments=_arguments,
    built=_built,
    mtp_at=AT_MTP_APART,
    parameters={**APART, **SHARED_EXPERT},
)
