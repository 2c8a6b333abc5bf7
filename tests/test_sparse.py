"""Sparse attention: what shapes prove of indexers, and those that no Hugging Face model has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from mcorefs import catalog
from mcorefs.formats.torch_dist import TorchDist
from mcorefs.mapping.choose import choose
from mcorefs.mapping.facts import gather
from mcorefs.mapping.families.deepseek_v32 import DEEPSEEK_V32
from mcorefs.mapping.family import Facts
from mcorefs.mapping.plan import plan
from mcorefs.mapping.reference import NO_REFERENCE
from mcorefs.model import Options, load
from mcorefs.views import View
from tests.checkpoints import Fixture, ensure
from tests.edited import with_args
from tests.test_config import refusal
from tests.test_plan import unread

V32 = "deepseek_v32-tp2-mtp"
INDEXER = "self_attention.core_attention.indexer."


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure([V32])


@pytest.fixture
def tensors(fixtures: Mapping[str, Fixture]) -> dict[str, View]:
    return dict(catalog.build(TorchDist().index(fixtures[V32].iteration).tensors).tensors)


def gathered(tensors: Mapping[str, View], **args: object) -> tuple[Facts, list[str]]:
    facts, _, problems = gather(tensors, {"mtp_num_layers": 1, **args}, NO_REFERENCE, 301)
    return facts, problems


def test_shapes_prove_the_indexers_size(tensors: dict[str, View]) -> None:
    facts, problems = gathered(tensors)
    assert problems == []
    found = {name: facts.dims[name] for name in ("index_heads", "index_dim", "index_rows")}
    assert found == {"index_heads": 4, "index_dim": 32, "index_rows": 128}


@pytest.mark.parametrize(
    ("argument", "shown"), [("dsa_indexer_n_heads", 4), ("dsa_indexer_head_dim", 32)]
)
def test_arguments_that_contradict_shapes(
    tensors: dict[str, View], argument: str, shown: int
) -> None:
    _, problems = gathered(tensors, **{argument: 64})
    assert problems == [
        f"{argument} is 64 in the training arguments but the tensor shapes say {shown}"
    ]


def test_every_layer_has_an_indexer(tensors: dict[str, View]) -> None:
    for name in ("linear_wq_b", "linear_wk", "linear_weights_proj", "k_norm"):
        del tensors[f"decoder.layers.2.{INDEXER}{name}.weight"]
    del tensors[f"decoder.layers.2.{INDEXER}k_norm.bias"]
    problems = plan(DEEPSEEK_V32, tensors, gathered(tensors)[0])[1]
    assert len(problems) == 5
    assert all(problem.startswith("model.layers.2.self_attn.indexer.") for problem in problems)


def test_an_indexer_as_wide_as_its_heads(tensors: dict[str, View]) -> None:
    tensors[f"decoder.layers.1.{INDEXER}linear_wq_b.weight"] = unread((96, 32))
    (problem,) = plan(DEEPSEEK_V32, tensors, gathered(tensors)[0])[1]
    assert "indexer.wq_b.weight has shape [96, 32], expected [128, 32]" in problem


def test_queries_that_an_indexer_saw_without_their_norm(tensors: dict[str, View]) -> None:
    """As megatron-core's specs for TransformerEngine have it up to 0.17."""
    norms = [
        name for name in tensors if name.endswith(("q_layernorm.weight", "kv_layernorm.weight"))
    ]
    assert len(norms) == 10
    for name in norms:
        fused = name.replace("q_layernorm.", "linear_q_up_proj.layer_norm_")
        fused = fused.replace("kv_layernorm.", "linear_kv_up_proj.layer_norm_")
        tensors[fused] = tensors.pop(name)
    facts, _ = gathered(tensors)
    assert choose(tensors, facts, None, NO_REFERENCE).family is DEEPSEEK_V32
    (problem,) = plan(DEEPSEEK_V32, tensors, facts)[1]
    assert "part of linear_q_up_proj" in problem


@pytest.mark.parametrize(
    ("name", "value"),
    [("dsa_indexer_scoring_relu", False), ("dsa_indexer_k_norm_epsilon", 1e-5)],
)
def test_indexers_that_no_hugging_face_model_has(
    fixtures: Mapping[str, Fixture], name: str, value: object, tmp_path: Path
) -> None:
    root = with_args(fixtures[V32], tmp_path, **{name: value})
    (problem,) = refusal(lambda: load(root, Options(family="deepseek_v32")))
    assert f"{name}={value!r}" in problem


@pytest.mark.parametrize("name", ["dsa_indexer_rope_interleaved", "dsa_indexer_rotary_interleaved"])
def test_indexers_that_rotate_neighbours_are_not_deepseeks(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    root = with_args(fixtures[V32], tmp_path, **{name: True})
    problems = refusal(lambda: load(root, Options(family="deepseek_v32")))
    assert any(f"{name}=True" in problem for problem in problems)
