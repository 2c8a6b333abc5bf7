"""DeepSeek-V2 and V2-Lite: multi-latent attention, dense layers before those of experts, routers of
softmaxes whose chosen weights do not sum to one."""

from __future__ import annotations

from mcorefs.mapping.blocks.deepseek import DEEPSEEK_CHECKS, DEEPSEEK_KEYS, DEEPSEEK_LAYER
from mcorefs.mapping.blocks.mla import MLA_REQUIRES
from mcorefs.mapping.blocks.model import EMBED, HEAD, NORM
from mcorefs.mapping.blocks.routing import ROUTER_REQUIRES
from mcorefs.mapping.family import Facts, Family, Key


def _limited(facts: Facts) -> bool:
    """Whether a token's experts are chosen from some groups only."""
    kept, groups = (facts.arg(f"moe_router_{name}") for name in ("group_topk", "num_groups"))
    return bool(kept) and kept != groups


def _topk_method(facts: Facts) -> str | None:
    if not facts.args:
        return None
    return "group_limited_greedy" if _limited(facts) else "greedy"


def _best_of_each_group(facts: Facts) -> str | None:
    """Check: groups of experts are chosen by their best score. transformers takes one, Megatron
    the sum of topk // group_topk (megatron/core/transformer/moe/moe_utils.py group_limited_topk).
    """
    kept, chosen = facts.arg("moe_router_group_topk"), facts.arg("moe_router_topk")
    if not (isinstance(kept, int) and isinstance(chosen, int) and _limited(facts)):
        return None
    if chosen // kept == 1:
        return None
    return (
        f"with moe_router_topk={chosen} and moe_router_group_topk={kept} Megatron chooses groups "
        f"of experts by the sum of their {chosen // kept} best scores, transformers by their best: "
        "its output would differ"
    )


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    rules=(EMBED, *DEEPSEEK_LAYER, NORM, HEAD),
    config={
        **DEEPSEEK_KEYS,
        "norm_topk_prob": Key(lambda facts: False),
        "mlp_bias": Key(lambda facts: False),
        "scoring_func": Key(lambda facts: "softmax"),
        "topk_method": Key(_topk_method),
    },
    requires={
        **MLA_REQUIRES,
        **ROUTER_REQUIRES,
        "moe_router_score_function": ("softmax",),
        "moe_router_pre_softmax": (True,),
    },
    checks=(*DEEPSEEK_CHECKS, _best_of_each_group),
    natural_order=True,
)
