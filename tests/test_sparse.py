"""Sparse attention: what shapes prove of indexers, and those that no Hugging Face model has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import GlmMoeDsaConfig

from mcorefs import catalog
from mcorefs.formats.torch_dist import TorchDist
from mcorefs.mapping.blocks.indexer import SHARED_INDEX_KEYS, shared_as_said
from mcorefs.mapping.choose import choose
from mcorefs.mapping.facts import gather
from mcorefs.mapping.families.deepseek_v32 import DEEPSEEK_V32
from mcorefs.mapping.family import Facts, Soft
from mcorefs.mapping.plan import plan
from mcorefs.mapping.reference import NO_REFERENCE
from mcorefs.model import Options, load
from mcorefs.views import View
from tests.checkpoints import Fixture, ensure
from tests.edited import with_args
from tests.test_config import reference, refusal
from tests.test_plan import unread

V32, GLM = "deepseek_v32-tp2-mtp", "glm_moe_dsa-tp2-ep2-shared"
FREQ, OFFSET = "dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset"
INDEXER = "self_attention.core_attention.indexer."


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure([V32, GLM])


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
    assert found == {"index_heads": 16, "index_dim": 32, "index_rows": 512}


@pytest.mark.parametrize(
    ("argument", "shown"), [("dsa_indexer_n_heads", 16), ("dsa_indexer_head_dim", 32)]
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
    assert "indexer.wq_b.weight has shape [96, 32], expected [512, 32]" in problem


def test_queries_that_an_indexer_saw_without_their_norm(tensors: dict[str, View]) -> None:
    """As megatron-core's specs for TransformerEngine have it up to 0.18."""
    norms = [
        name for name in tensors if name.endswith(("q_layernorm.weight", "kv_layernorm.weight"))
    ]
    assert len(norms) == 10
    for name in norms:
        fused = name.replace("q_layernorm.", "linear_q_up_proj.layer_norm_")
        fused = fused.replace("kv_layernorm.", "linear_kv_up_proj.layer_norm_")
        tensors[fused] = tensors.pop(name)
    facts, _ = gathered(tensors, dsa_indexer_rope_interleaved=False)
    assert choose(tensors, facts, None, NO_REFERENCE).family is DEEPSEEK_V32
    (problem,) = plan(DEEPSEEK_V32, tensors, facts)[1]
    assert "part of linear_q_up_proj" in problem


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dsa_indexer_scoring_relu", False),
        ("dsa_indexer_k_norm_epsilon", 1e-5),
        ("dsa_indexer_topk_freq", 2),
    ],
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


# -- layers that share what an indexer chose ------------------------------------------------------


def test_the_argument_that_tells_glm_from_deepseek(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    assert load(fixtures[V32].root, Options()).choice.family.name == "deepseek_v32"
    assert load(fixtures[GLM].root, Options()).choice.family.name == "glm_moe_dsa"


def test_config_says_which_layers_share(fixtures: Mapping[str, Fixture]) -> None:
    config = load(fixtures[GLM].root, Options()).config
    assert config["indexer_types"] == ["full", "shared", "shared", "full"]
    assert (config["index_topk_freq"], config["index_skip_topk_offset"]) == (3, 1)
    assert config["indexer_rope_interleave"] is True


@pytest.mark.parametrize(
    ("freq", "offset", "wanted"), [(1, 0, "none"), (2, 1, "[1, 3]"), (3, 2, "[2, 3]")]
)
def test_layers_share_as_arguments_say(
    fixtures: Mapping[str, Fixture], freq: int, offset: int, wanted: str, tmp_path: Path
) -> None:
    root = with_args(fixtures[GLM], tmp_path, **{FREQ: freq, OFFSET: offset})
    (problem,) = refusal(lambda: load(root, Options(family="glm_moe_dsa")))
    assert problem.startswith("layers [1, 2] hold no indexer, but with dsa_indexer_topk_freq=")
    assert problem.endswith(f"it would be layers {wanted}")


def scheduled(*indexed: int) -> tuple[object, object]:
    """index_topk_freq and index_skip_topk_offset of eight layers with indexers in these."""
    facts = Facts(
        {"layers": 8},
        {},
        frozenset(),
        False,
        "bfloat16",
        frozenset(),
        indexed_layers=frozenset(indexed),
    )
    freq, offset = (
        SHARED_INDEX_KEYS[f"index_{name}"].value for name in ("topk_freq", "skip_topk_offset")
    )
    return freq(facts), offset(facts)


@pytest.mark.parametrize("freq", [1, 2, 3, 4])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_the_schedule_is_that_of_transformers(freq: int, offset: int) -> None:
    config = GlmMoeDsaConfig(
        num_hidden_layers=8, index_topk_freq=freq, index_skip_topk_offset=offset
    )
    assert config.indexer_types is not None
    indexed = [n for n, kind in enumerate(config.indexer_types) if kind == "full"]
    assert scheduled(*indexed) == (freq, Soft(0) if freq == 1 else offset)


def test_layers_may_share_without_a_schedule() -> None:
    assert scheduled(0, 1, 3, 6)[0] is None
    assert scheduled(0)[1] == 1


def test_the_first_layer_has_an_indexer() -> None:
    facts = Facts(
        {"layers": 2},
        {},
        frozenset(),
        False,
        "bfloat16",
        frozenset(),
        indexed_layers=frozenset([1]),
    )
    assert "layer 0 has no indexer" in (shared_as_said(facts) or "")


def test_without_arguments_a_reference_must_say_how_indexers_rotate(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """As ms-swift saves it."""
    names = (FREQ, OFFSET, "dsa_indexer_topk", "dsa_indexer_rope_interleaved")
    root = with_args(fixtures[GLM], tmp_path, **dict.fromkeys(names, ...))
    given = reference(fixtures[GLM], tmp_path / "given")
    unknown = refusal(lambda: load(root, Options(hf_config=given)))
    keys = {problem.partition(" ")[0] for problem in unknown}
    assert keys == {"indexer_rope_interleave"}
    said = {"index_topk_freq": 3, "index_skip_topk_offset": 1, "indexer_rope_interleave": True}
    given = reference(fixtures[GLM], tmp_path / "given", **said)
    config = load(root, Options(hf_config=given)).config
    assert {name: config[name] for name in said} == said
    given = reference(
        fixtures[GLM], tmp_path / "given", **{**said, "indexer_rope_interleave": False}
    )
    (problem,) = refusal(lambda: load(root, Options(hf_config=given)))
    assert problem.startswith("indexer_rope_interleave is false in ")
    assert problem.endswith("where the model computes with true")


@pytest.mark.parametrize("name", [V32, GLM])
def test_how_indexers_rotate_is_told_by_who_has_arguments(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    """megatron-core 0.18 had no such argument, and rotated the last part of each head."""
    root = with_args(fixtures[name], tmp_path, dsa_indexer_rope_interleaved=...)
    rotates = {"indexer_rope_interleave": name == GLM}
    given = reference(fixtures[name], tmp_path / "given", **rotates)
    (problem,) = refusal(lambda: load(root, Options(hf_config=given)))
    assert problem.startswith("no argument says how indexers rotate their heads")
