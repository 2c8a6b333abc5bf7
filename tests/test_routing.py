"""What config.json says of experts and routers, and which routers no config can express."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from mcorefs.mapping.blocks import routing
from mcorefs.mapping.families.ernie4_5_moe import ERNIE4_5_MOE
from mcorefs.mapping.family import Check, Facts, Key, Proven, Soft


def facts(
    args: Mapping[str, object] | None = None,
    moe_layers: tuple[int, ...] = (0, 1, 2, 3),
    **dims: int,
) -> Facts:
    sizes = {"layers": 4, **dims}
    return Facts(sizes, args or {}, frozenset(moe_layers), False, "bfloat16", frozenset())


@pytest.mark.parametrize(
    ("args", "groups", "kept"),
    [
        ({"moe_router_num_groups": 8, "moe_router_group_topk": 4}, 8, 4),
        ({"moe_router_num_groups": 8}, 1, 1),  # a limit that is not set limits nothing
        ({"moe_router_topk": 2}, 1, 1),
        ({}, None, None),
    ],
)
def test_groups(args: Mapping[str, object], groups: int | None, kept: int | None) -> None:
    keys = routing.SIGMOID_KEYS
    assert keys["n_group"].value(facts(args)) == groups
    assert keys["topk_group"].value(facts(args)) == kept


@pytest.mark.parametrize(
    ("key", "args", "value"),
    [
        (routing.SIGMOID_KEYS["norm_topk_prob"], {"moe_router_topk": 2}, True),
        (routing.SIGMOID_KEYS["norm_topk_prob"], {"moe_router_topk": 1}, False),
        (routing.SIGMOID_KEYS["norm_topk_prob"], {}, None),
        (routing.SIGMOID_KEYS["routed_scaling_factor"], {"moe_router_topk": 1}, 1.0),
        (
            routing.SIGMOID_KEYS["routed_scaling_factor"],
            {"moe_router_topk_scaling_factor": 2.5},
            2.5,
        ),
        (routing.SIGMOID_KEYS["routed_scaling_factor"], {}, None),
        (routing.SOFTMAX_NORM_TOPK_PROB, {"moe_router_pre_softmax": True}, False),
        (routing.SOFTMAX_NORM_TOPK_PROB, {"moe_router_pre_softmax": False}, True),
        (routing.SOFTMAX_NORM_TOPK_PROB, {}, None),
        (routing.AUX_LOSS_COEF, {"moe_aux_loss_coeff": 0.1}, Soft(0.1)),
        (routing.AUX_LOSS_COEF, {"moe_aux_loss_coeff": [0.2, 0.1]}, Soft(0.2)),
        (routing.AUX_LOSS_COEF, {"moe_aux_loss_coeff": []}, None),
    ],
)
def test_keys(key: Key, args: Mapping[str, object], value: object) -> None:
    assert key.value(facts(args)) == value


def test_dense_layers() -> None:
    mixed = facts(moe_layers=(1, 3))
    assert routing.SPARSE_LAYER_KEYS["mlp_only_layers"].value(mixed) == [0, 2]
    assert routing.FIRST_K_DENSE.value(facts(moe_layers=(2, 3))) == 2
    assert routing.FIRST_K_DENSE.value(facts()) == 0


def test_shared_experts() -> None:
    assert routing.N_SHARED_EXPERTS.value(facts(shared_ffn=96, moe_ffn=48)) == 2
    assert routing.N_SHARED_EXPERTS.value(facts(moe_ffn=48)) is None


def grouped(groups: int | None, kept: int | None, chosen: int) -> Facts:
    named = {"num_groups": groups, "group_topk": kept, "topk": chosen}
    return facts({f"moe_router_{name}": n for name, n in named.items() if n is not None})


@pytest.mark.parametrize(
    ("check", "fine", "wrong", "said"),
    [
        (
            routing.leading_dense,
            facts(moe_layers=(2, 3)),
            facts(moe_layers=(0, 2)),
            "layers [1, 3] are dense although",
        ),
        (
            routing.no_sinkhorn,
            facts({"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"]}),
            facts({"moe_router_load_balancing_type": "sinkhorn"}),
            "sinkhorn",
        ),
        (
            routing.best_two_of_each_group,
            grouped(8, 4, 8),
            grouped(8, 4, 4),
            "moe_router_group_topk=4 Megatron chooses groups of experts by the sum of their 1 best",
        ),
        (routing.best_two_of_each_group, grouped(4, 4, 4), grouped(4, 2, 6), "their 3 best"),
        (routing.best_two_of_each_group, grouped(None, None, 6), grouped(4, 1, 1), "their 1 best"),
        (
            routing.whole_shared_experts,
            facts(shared_ffn=96, moe_ffn=48),
            facts(shared_ffn=64, moe_ffn=48),
            "the shared experts are 64 wide, which is no multiple of the others' 48",
        ),
    ],
)
def test_checks(check: Check, fine: Facts, wrong: Facts, said: str) -> None:
    assert check(fine) is None
    assert said in str(check(wrong))


@pytest.mark.parametrize(
    ("moe_layers", "said"),
    [
        ((1, 2, 3), (1, 3, 1)),
        ((1, 2), (1, 2, 1)),
        ((3,), (3, 3, 1)),
        ((1, 3), (1, 3, 2)),
        ((2, 5, 8), (2, 8, 3)),
        ((0, 2), None),  # it would say 1 and 3
        ((1, 2, 4), None),
    ],
)
def test_layers_of_experts_from_one_to_another(
    moe_layers: tuple[int, ...], said: tuple[int, int, int] | None
) -> None:
    found = facts({"moe_router_topk": 2}, moe_layers, layers=9, shared_ffn=8, moe_ffn=8)
    problems = [problem for check in ERNIE4_5_MOE.checks if (problem := check(found))]
    assert ["config.json can only say" in problem for problem in problems] == [True] * (not said)
    if said:
        names = ("start_index", "end_index", "interval")
        keys = [ERNIE4_5_MOE.config[f"moe_layer_{name}"].value(found) for name in names]
        assert keys == [Proven(value) for value in said]


def test_a_softmax_before_top_k_differs_by_a_factor_for_each_token() -> None:
    """megatron-core's router against transformers' Mixtral, which divides by the sum."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    logits = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    values, indices = logits.softmax(-1).topk(2)  # as MixtralTopKRouter
    divided = torch.zeros_like(logits).scatter(1, indices, values / values.sum(-1, keepdim=True))
    after, before = (
        topk_routing_with_score_function(logits, 2, use_pre_softmax=pre)[0] for pre in (False, True)
    )
    torch.testing.assert_close(after, divided)
    torch.testing.assert_close(before, divided * values.sum(-1, keepdim=True))
    assert values.sum(-1).std() > 0.05
    refused = routing.softmax_after_top_k
    assert refused(facts({"moe_router_pre_softmax": False})) is None
    assert refused(facts()) is None
    problem = refused(facts({"moe_router_pre_softmax": True}))
    assert problem is not None
    assert "by a factor for each token" in problem
