"""dots.llm1: Qwen3's attention, the experts of DeepSeek-V3. All of which GLM-4.5 can have: what is
not named is served as that, and computes the same."""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA, QK_NORM
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    DECODER_REQUIRES,
    GQA_KEYS,
    attention_kinds,
    constant,
    dim,
)
from mcorefs.mapping.blocks.mlp import (
    GATED_MLP,
    expert_bias,
    gated_experts,
    router,
    shared_experts,
)
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.blocks.routing import (
    FIRST_K_DENSE,
    N_SHARED_EXPERTS,
    SIGMOID_KEYS,
    SIGMOID_REQUIRES,
    best_two_of_each_group,
    leading_dense,
    no_sinkhorn,
    whole_shared_experts,
)
from mcorefs.mapping.family import Family, Key, Proven, Soft

DOTS1 = Family(
    name="dots1",
    architecture="Dots1ForCausalLM",
    rules=(
        EMBED,
        *GQA,
        *QK_NORM,
        *GATED_MLP,
        *gated_experts("mlp.experts.{expert}."),
        router("mlp.gate.weight"),
        expert_bias("mlp.gate.e_score_correction_bias"),
        *shared_experts("mlp.shared_experts."),
        *LAYER_NORMS,
        NORM,
        HEAD,
    ),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        **SIGMOID_KEYS,
        "attention_bias": Key(lambda facts: False),
        "n_routed_experts": dim("experts", "num_local_experts"),
        "n_shared_experts": N_SHARED_EXPERTS,
        "moe_intermediate_size": dim("moe_ffn"),
        "first_k_dense_replace": FIRST_K_DENSE,
        "layer_types": Key(attention_kinds),
        "sliding_window": Key(lambda facts: Proven(None)),
        "max_window_layers": Key(lambda facts: Soft(facts.dims["layers"])),
        "output_router_logits": constant(False),
        # What other code than transformers' asks for.
        "scoring_func": constant("sigmoid"),
        "topk_method": constant("noaux_tc"),
    },
    requires={**DECODER_REQUIRES, **SIGMOID_REQUIRES},
    checks=(no_sinkhorn, leading_dense, whole_shared_experts, best_two_of_each_group),
    named_only=True,
    natural_order=True,
)
