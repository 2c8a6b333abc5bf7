"""Experts whose gate and up rows lie in turns; fixtures of whole models are in test_roundtrip."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from mcorefs.errors import MappingError
from mcorefs.interleaving import undone
from mcorefs.model import Options, load
from mcorefs.views import Stored, View
from tests.checkpoints import Fixture, ensure
from tests.edited import with_args
from tests.test_catalog import array, stored, values

AT = "decoder.layers.0.mlp.experts.0."
ROWS = 12
KNOWN = {"moe_grouped_gemm": True, "tensor_model_parallel_size": 1}


def tensors(rows: int = 2 * ROWS) -> tuple[dict[str, View], dict[str, np.ndarray]]:
    arrays = {
        AT + "linear_fc1.weight": array(1, rows, 5),
        AT + "linear_fc1.bias": array(2, rows),
        AT + "linear_fc2.weight": array(3, 5, ROWS),
        "decoder.layers.0.mlp.shared_experts.linear_fc1.weight": array(4, 2 * ROWS, 5),
    }
    return {name: Stored(stored(name, data.shape)) for name, data in arrays.items()}, arrays


@pytest.mark.parametrize(("size", "ranks"), [(1, 1), (3, 1), (2, 2), (3, 4), (12, 1)])
def test_gate_rows_come_first(size: int, ranks: int) -> None:
    """Row by row: which row of which rank it is, and which half of the file it went to."""
    views, arrays = tensors()
    args = {**KNOWN, "moe_mlp_glu_interleave_size": size, "expert_tensor_parallel_size": ranks}
    found, problems = undone(views, args, "Megatron-LM")
    assert problems == []
    share = ROWS // ranks
    wanted: list[int] = []
    for half in range(2):
        for rank in range(ranks):
            for row in range(share):
                block, inside = divmod(row, size)
                at = (2 * block + half) * size + inside  # among the rank's own rows
                wanted.append(rank * share + at if at < share else ROWS + rank * share + at - share)
    for name in (AT + "linear_fc1.weight", AT + "linear_fc1.bias"):
        np.testing.assert_array_equal(values(found[name], arrays), arrays[name][wanted], name)
    others = [name for name in views if not name.startswith(AT + "linear_fc1")]
    assert all(found[name] is views[name] for name in others)


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"moe_mlp_glu_interleave_size": None},
        {"moe_mlp_glu_interleave_size": 3, "moe_grouped_gemm": False},
    ],
)
def test_rows_as_ever(args: Mapping[str, object]) -> None:
    views, _ = tensors()
    assert undone(views, {**KNOWN, **args}, "Megatron-LM") == (views, [])


def test_experts_without_gates() -> None:
    views, _ = tensors(rows=ROWS)
    args = {**KNOWN, "moe_mlp_glu_interleave_size": 3}
    assert undone(views, args, "Megatron-LM") == (views, [])


@pytest.mark.parametrize(
    ("args", "trainer", "adapted", "problem"),
    [
        ({}, "Megatron-Bridge", False, "Megatron-Bridge undoes it when it saves, or does not"),
        ({}, "Megatron-LM", True, "an adapter's matrices lie so, too"),
        ({"moe_grouped_gemm": None}, "Megatron-LM", False, "only grouped experts have it so"),
        ({"tensor_model_parallel_size": None}, "Megatron-LM", False, "tensor-parallel size None"),
        ({"moe_mlp_glu_interleave_size": 5}, "Megatron-LM", False, "has 24 rows, which are no bl"),
        ({"moe_mlp_glu_interleave_size": 0}, "Megatron-LM", False, "has 24 rows, which are no bl"),
        ({"moe_mlp_glu_interleave_size": "3"}, "Megatron-LM", False, "size is '3'"),
    ],
)
def test_what_cannot_be_told_is_refused(
    args: Mapping[str, object], trainer: str, adapted: bool, problem: str
) -> None:
    views, _ = tensors()
    known = {**KNOWN, "moe_mlp_glu_interleave_size": 3, **args}
    (found,) = undone(views, known, trainer, adapted)[1]
    assert problem in found


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return ensure(["qwen3_moe-tp2-ep2-in-turns"])["qwen3_moe-tp2-ep2-in-turns"]


def test_a_checkpoint_that_cannot_be_told_is_refused(fixture: Fixture, tmp_path: Path) -> None:
    root = with_args(fixture, tmp_path, moe_grouped_gemm=...)
    with pytest.raises(MappingError) as caught:
        load(root, Options(vocab_size=301))
    (problem,) = caught.value.problems
    assert problem.startswith("gate and up rows of experts lie in turns, which cannot be undone")
