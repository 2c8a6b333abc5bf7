"""Gates of heads: rows of linear_qkv, which megatron-core saves in two tensors."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from mcorefs import catalog
from mcorefs.dtypes import BF16
from mcorefs.formats.torch_legacy import head_gates
from mcorefs.formats.torch_legacy.tensor_parallel import Part
from mcorefs.index import Span
from mcorefs.views import Stored
from tests.test_plan import unread


def test_both_parts_have_a_name() -> None:
    at = "decoder.layers.0.self_attention.linear_qkv.weight"
    stored = {}
    for name, rows in (("_qkv", 24), ("_gate", 2)):
        one = unread((rows, 16))
        assert isinstance(one, Stored)
        stored[f"model.{at}.{name}"] = one.tensor
    found = catalog.build(stored)
    assert {name: view.shape for name, view in found.tensors.items()} == {
        at: (24, 16),
        f"{at}._gate": (2, 16),
    }
    assert found.problems == ()
    both = {**stored, at: stored[f"model.{at}._qkv"]}
    assert catalog.build(both).problems == (f"{at} is stored twice, in two dialects",)


def test_gates_without_what_they_lie_beside() -> None:
    at = "decoder.layers.0.self_attention.linear_qkv.weight."
    for part, other in (("_gate", "_qkv"), ("_qkv", "_gate")):
        one = unread((8, 16))
        assert isinstance(one, Stored)
        problems = catalog.build({at + part: one.tensor}).problems
        assert problems == (f"{at}{other} is missing beside its other part",)


def part(*shape: int) -> Part:
    strides = (shape[1], 1) if len(shape) == 2 else (1,)
    return Part(Span("file", 0, 0), BF16, shape, strides, 0)


AT = "decoder.layers.0.self_attention."
RANK: Mapping[str, Part] = {
    AT + "linear_qkv.weight": part(6 * 16 + 2 * 2 * 16 + 6, 64),
    AT + "linear_proj.weight": part(64, 6 * 16),
    AT + "q_layernorm.weight": part(16),
}
GATED: Mapping[str, object] = {"head_wise_attn_gate": True, "kv_channels": 8}


def test_the_rows_of_a_rank_are_divided() -> None:
    """By the norm of a head, whatever the arguments say of its size."""
    found = head_gates.divided(RANK, GATED, [])
    whole = AT + "linear_qkv.weight"
    assert found[whole + "._qkv"] == RANK[whole].narrow(0, 0, 160)
    assert found[whole + "._gate"] == RANK[whole].narrow(0, 160, 6)
    assert found.keys() == RANK.keys() - {whole} | {whole + "._qkv", whole + "._gate"}


def test_only_where_the_run_says_that_heads_have_gates() -> None:
    assert head_gates.divided(RANK, {}, []) == RANK
    both = {**GATED, "attention_output_gate": True}
    assert head_gates.divided(RANK, both, []) == RANK


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"linear_qkv.weight": part(6 * 16 + 2 * 2 * 16, 64)}, "do not explain"),
        ({"linear_qkv.weight": part(6 * 16 + 6, 64)}, "do not explain"),
        ({"linear_qkv.weight": part(6 * 16 + 2 * 2 * 16 + 12, 64)}, "do not explain"),
        ({"linear_proj.weight": part(64, 90)}, "do not explain"),
        ({"linear_proj.weight": part(64)}, "nothing beside it says"),
        ({"q_layernorm.weight": part(0)}, "do not explain"),
    ],
)
def test_rows_that_no_number_of_heads_explains(changes: Mapping[str, Part], why: str) -> None:
    parts = {**RANK, **{AT + name: one for name, one in changes.items()}}
    problems: list[str] = []
    assert head_gates.divided(parts, GATED, problems) == parts
    (problem,) = problems
    assert problem.startswith(AT + "linear_qkv.weight")
    assert why in problem
