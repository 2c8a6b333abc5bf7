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


def _summed_scores(facts: Facts) -> int:
    """Of how many best scores Megatron takes the sum to choose groups, where it is not one.
    transformers takes the best (megatron/core/transformer/moe/moe_utils.py group_limited_topk)."""
    kept, chosen = facts.arg("moe_router_group_topk"), facts.arg("moe_router_topk")
    if not (isinstance(kept, int) and isinstance(chosen, int) and _limited(facts)):
        return 0
    return 0 if chosen // kept == 1 else chosen // kept


def _is_stated(facts: Facts) -> bool:
    """Whether the user's config.json says, of these very groups, how they are chosen: DeepSeek's
    own does, and Megatron has no other way to train what was made from it."""
    stated = {
        "topk_method": "group_limited_greedy",
        "n_group": facts.arg("moe_router_num_groups"),
        "topk_group": facts.arg("moe_router_group_topk"),
        "num_experts_per_tok": facts.arg("moe_router_topk"),
    }
    return stated.items() <= facts.stated.items()


def _best_of_each_group(facts: Facts) -> str | None:
    """Check: groups of experts are chosen by their best score."""
    count = _summed_scores(facts)
    if not count or _is_stated(facts):
        return None
    chosen, kept = facts.arg("moe_router_topk"), facts.arg("moe_router_group_topk")
    return (
        f"with moe_router_topk={chosen} and moe_router_group_topk={kept} Megatron chooses groups "
        f"of experts by the sum of their {count} best scores, transformers by their best: its "
        "output would differ. If it was made from a DeepSeek-V2 whose config.json says so "
        "(topk_method group_limited_greedy, n_group, topk_group), that one as --hf-config says "
        "that this is meant"
    )


def _groups_as_stated(facts: Facts) -> str | None:
    """Remark: groups are chosen otherwise than in training, as the user's config.json says."""
    count = _summed_scores(facts)
    if not count or not _is_stated(facts):
        return None
    return (
        "groups of experts are chosen by their best score, as topk_method in --hf-config says; in "
        f"training it was the sum of their {count} best, so some tokens go to other experts"
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
    remarks=(_groups_as_stated,),
    natural_order=True,
)
