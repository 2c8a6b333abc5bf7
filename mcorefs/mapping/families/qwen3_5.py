"""Qwen3.5's language models, dense and of experts: what Qwen3-Next is, with the linear layers of
its gated delta nets apart. Without vision.

megatron-core holds a model of experts just as it holds Qwen3-Next, which computes the same: it is
served as that unless it is named, or was trained with positions of images too (mrope), which of a
text are those of rope.
"""

from __future__ import annotations

from mcorefs.mapping.blocks.delta_net import (
    DELTA_NET,
    FULL_QK_NORM,
    GATED_GQA,
    HYBRID_CHECKS,
    HYBRID_KEYS,
    HYBRID_NORMS,
    HYBRID_REQUIRES,
    in_proj,
    one_by_one,
)
from mcorefs.mapping.blocks.keys import BASE_KEYS, GQA_KEYS, arg, constant, dim
from mcorefs.mapping.blocks.mlp import (
    GATED_MLP,
    gated_experts,
    router,
    shared_expert_gate,
    shared_experts,
)
from mcorefs.mapping.blocks.model import EMBED, HEAD, NORM, at_zero
from mcorefs.mapping.blocks.mtp import MTP_HIDDEN_KEYS, mtp_apart, one_around_all
from mcorefs.mapping.blocks.routing import AUX_LOSS_COEF, SOFTMAX_REQUIRES, no_sinkhorn
from mcorefs.mapping.family import Family

_ATTENTION = (
    *DELTA_NET,
    in_proj("in_proj_qkv", "linear_mixed", one_by_one("qkv")),
    in_proj("in_proj_z", "linear_values", one_by_one("z")),
    in_proj("in_proj_b", "linear_value_heads", one_by_one("b")),
    in_proj("in_proj_a", "linear_value_heads", one_by_one("a")),
    *GATED_GQA,
    *FULL_QK_NORM,
)
_DENSE = (*_ATTENTION, *GATED_MLP, *HYBRID_NORMS)
_SPARSE = (
    *_ATTENTION,
    *gated_experts("mlp.experts.{expert}."),
    router("mlp.gate.weight"),
    *shared_experts("mlp.shared_expert."),
    shared_expert_gate("mlp.shared_expert_gate.weight"),
    *HYBRID_NORMS,
)
_CONFIG = {
    **BASE_KEYS,
    **GQA_KEYS,
    **HYBRID_KEYS,
    **MTP_HIDDEN_KEYS,
    "attention_bias": constant(False),
}
_REQUIRES = {**HYBRID_REQUIRES, "position_embedding_type": ("rope", "mrope")}

QWEN3_5 = Family(
    name="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    rules=(EMBED, *_DENSE, *at_zero(NORM), HEAD, *mtp_apart(_DENSE)),
    config=_CONFIG,
    requires=_REQUIRES,
    checks=(*HYBRID_CHECKS, one_around_all),
)
QWEN3_5_MOE = Family(
    name="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    rules=(EMBED, *_SPARSE, *at_zero(NORM), HEAD, *mtp_apart(_SPARSE)),
    config={
        **{name: key for name, key in _CONFIG.items() if name != "intermediate_size"},
        "num_experts": dim("experts", "num_local_experts"),
        "num_experts_per_tok": arg("moe_router_topk"),
        "moe_intermediate_size": dim("moe_ffn"),
        "shared_expert_intermediate_size": dim("shared_ffn"),
        "router_aux_loss_coef": AUX_LOSS_COEF,
        "output_router_logits": constant(False),
    },
    requires={**_REQUIRES, **SOFTMAX_REQUIRES, "moe_router_pre_softmax": (False,)},
    checks=(no_sinkhorn, *HYBRID_CHECKS, one_around_all),
    given=("mrope_section",),
    natural_order=True,
)
