"""Mixtral 8x7B and 8x22B: Mistral with experts instead of MLPs. It has no key for how the weights
of the chosen experts are normalised: they sum to one (softmax after top-k)."""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    GQA_KEYS,
    SLIDING_WINDOW,
    arg,
    constant,
    decoder_requires,
    dim,
)
from mcorefs.mapping.blocks.mlp import gated_experts, router
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.blocks.routing import (
    AUX_LOSS_COEF,
    SOFTMAX_REQUIRES,
    no_sinkhorn,
    softmax_after_top_k,
)
from mcorefs.mapping.family import Family

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    rules=(
        EMBED,
        *GQA,
        *gated_experts(
            "block_sparse_moe.experts.{expert}.", ("w1", "w3", "w2"), fused="mlp.experts."
        ),
        router("block_sparse_moe.gate.weight", sorts_as="mlp.gate.weight"),
        *LAYER_NORMS,
        NORM,
        HEAD,
    ),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        "intermediate_size": dim("moe_ffn"),
        "num_local_experts": dim("experts", "num_experts"),
        "num_experts_per_tok": arg("moe_router_topk"),
        "sliding_window": SLIDING_WINDOW,
        "router_aux_loss_coef": AUX_LOSS_COEF,
        "output_router_logits": constant(False),
    },
    requires={
        **decoder_requires("window_size"),
        **SOFTMAX_REQUIRES,
        "window_attn_skip_freq": (),
    },
    checks=(no_sinkhorn, softmax_after_top_k),
    natural_order=True,
)
