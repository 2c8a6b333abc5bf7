"""What only gpt-oss has: experts stacked in one tensor, YaRN, windows in some of the layers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from mcorefs import catalog
from mcorefs.formats.torch_dist import TorchDist
from mcorefs.mapping.facts import gather
from mcorefs.mapping.families.gpt_oss import GPT_OSS
from mcorefs.mapping.plan import plan
from mcorefs.mapping.reference import NO_REFERENCE
from mcorefs.model import Model, Options, load
from mcorefs.trainers.transformer_config import arguments
from mcorefs.views import View
from tests.checkpoints import Fixture, ensure
from tests.edited import with_args
from tests.test_config import refusal

EXPERT_5 = "decoder.layers.2.mlp.experts.5."


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return ensure(["gpt_oss-tp2-ep2"])["gpt_oss-tp2-ep2"]


@pytest.fixture
def tensors(fixture: Fixture) -> dict[str, View]:
    return dict(catalog.build(TorchDist().index(fixture.iteration).tensors).tensors)


def problems_of(tensors: Mapping[str, View]) -> list[str]:
    facts, _, problems = gather(tensors, {"num_attention_heads": 8}, NO_REFERENCE, 301)
    return [*problems, *plan(GPT_OSS, tensors, facts)[1]]


def config(fixture: Fixture, directory: Path, **changes: object) -> Mapping[str, object]:
    return load(with_args(fixture, directory, **changes), Options()).config


# -- tensors --------------------------------------------------------------------------------------


def test_one_missing_expert_is_named(tensors: dict[str, View]) -> None:
    assert problems_of(tensors) == []
    del tensors[EXPERT_5 + "linear_fc1.bias"]
    (problem,) = problems_of(tensors)
    assert problem == (
        f"model.layers.2.mlp.experts.gate_up_proj_bias needs {EXPERT_5}linear_fc1.bias, which the "
        "checkpoint does not hold"
    )


def test_one_expert_of_another_size_is_a_problem(tensors: dict[str, View]) -> None:
    tensors[EXPERT_5 + "linear_fc2.weight"] = tensors["output_layer.weight"]
    (problem,) = problems_of(tensors)
    assert problem.startswith("model.layers.2.mlp.experts.down_proj cannot be made from")


def test_one_expert_too_many_is_a_problem(tensors: dict[str, View]) -> None:
    name = EXPERT_5.replace("5", "8") + "linear_fc2.bias"
    tensors[name] = tensors[EXPERT_5 + "linear_fc2.bias"]
    (problem,) = problems_of(tensors)
    assert problem == f"the checkpoint holds {name}, which this family has no place for"


def test_sinks_alone_make_no_gpt_oss(tensors: dict[str, View]) -> None:
    biased = {name: view for name, view in tensors.items() if not name.endswith("router.bias")}
    assert any("mlp.router.bias" in problem for problem in problems_of(biased))


# -- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("glu_linear_offset", 0.0),
        ("quick_geglu", False),
        ("swiglu", True),
        ("softmax_type", "off-by-one"),
        ("moe_router_pre_softmax", True),
        ("use_grouped_gemm_for_dense_mlp", True),
        ("position_embedding_type", "none"),
    ],
)
def test_arguments_that_mean_another_model_are_refused(
    fixture: Fixture, name: str, value: object, tmp_path: Path
) -> None:
    root = with_args(fixture, tmp_path, **{name: value})
    (problem,) = refusal(lambda: load(root, Options()))
    assert f"{name}={value!r}" in problem
    assert "GptOssForCausalLM cannot express" in problem


def test_what_clamps_must_be_known(fixture: Fixture, tmp_path: Path) -> None:
    root = with_args(fixture, tmp_path, activation_func_clamp_value=None)
    (problem,) = refusal(lambda: load(root, Options()))
    assert problem.startswith("swiglu_limit is unknown")


@pytest.mark.parametrize(
    ("skipped", "slides"),
    [(2, "1010"), (3, "1101"), ([0, 0, 1, 1], "0011"), (None, "1111"), (1, "0000")],
)
def test_which_layers_have_a_window(
    fixture: Fixture, skipped: object, slides: str, tmp_path: Path
) -> None:
    types = {"1": "sliding_attention", "0": "full_attention"}
    found = config(fixture, tmp_path, window_attn_skip_freq=skipped)
    assert found["layer_types"] == [types[one] for one in slides]
    assert found["sliding_window"] == 8


def test_without_a_window_a_reference_may_have_one(fixture: Fixture, tmp_path: Path) -> None:
    root = with_args(fixture, tmp_path, window_size=None)
    assert load(root, Options()).config["layer_types"] == ["full_attention"] * 4
    model = load(root, Options(hf_config=fixture.hf))
    assert model.config["sliding_window"] == 8
    assert (
        model.config["layer_types"]
        == json.loads((fixture.hf / "config.json").read_bytes())["layer_types"]
    )


def yarn(model: Model) -> Mapping[str, object]:
    found = model.config["rope_scaling"]
    assert isinstance(found, dict)
    return found


def test_yarn_by_the_names_of_megatron_bridge(fixture: Fixture, tmp_path: Path) -> None:
    """Its provider of gpt-oss leaves mscale open."""
    root = with_args(
        fixture,
        tmp_path,
        rotary_scaling_factor=...,
        mscale=...,
        mscale_all_dim=...,
        yarn_rotary_scaling_factor=32.0,
        yarn_mscale=None,
        yarn_mscale_all_dim=None,
        yarn_original_max_position_embeddings=4096,
        yarn_beta_fast=32.0,
        yarn_beta_slow=1.0,
    )
    assert yarn(load(root, Options())) == {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    }


def test_an_attention_factor_that_transformers_would_not_take(
    fixture: Fixture, tmp_path: Path
) -> None:
    root = with_args(fixture, tmp_path, mscale=0.5, mscale_all_dim=0.25)
    found = yarn(load(root, Options()))["attention_factor"]
    assert found == pytest.approx((0.05 * math.log(8) + 1) / (0.025 * math.log(8) + 1))


def test_yarn_of_modelopt(fixture: Fixture, tmp_path: Path) -> None:
    """--enable-gpt-oss overrules the arguments; a reference overrules it."""
    root = with_args(fixture, tmp_path, enable_gpt_oss=True, position_embedding_type="rope")
    scaling = yarn(load(root, Options()))
    assert (scaling["factor"], scaling["original_max_position_embeddings"]) == (32.0, 131072)
    model = load(root, Options(hf_config=fixture.hf))
    assert yarn(model)["original_max_position_embeddings"] == 16


def test_yarn_of_ms_swift(fixture: Fixture, tmp_path: Path) -> None:
    stated = {"rope_theta": 150000, "rope_type": "yarn", "factor": 32.0, "truncate": False}
    root = with_args(fixture, tmp_path, position_embedding_type="rope", rope_scaling=stated)
    assert yarn(load(root, Options())) == {"rope_type": "yarn", "factor": 32.0, "truncate": False}
    assert yarn(load(root, Options(hf_config=fixture.hf)))["factor"] == 8.0


def test_without_yarn(fixture: Fixture, tmp_path: Path) -> None:
    found = config(fixture, tmp_path, position_embedding_type="rope")
    assert found["rope_scaling"] is None
    assert found["rope_parameters"] == {"rope_type": "default", "rope_theta": 150_000}


def test_a_reference_in_mxfp4_is_not_what_is_served(fixture: Fixture, tmp_path: Path) -> None:
    stated = json.loads((fixture.hf / "config.json").read_bytes())
    stated["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    model = load(fixture.root, Options(hf_config=tmp_path))
    assert "quantization_config" not in model.config
    assert model.config["torch_dtype"] == "bfloat16"


def test_a_provider_says_the_activation() -> None:
    quick = "megatron.core.fusions.fused_bias_geglu.quick_gelu"
    found = arguments({"gated_linear_unit": True, "activation_func": quick})
    assert found == {"swiglu": False, "quick_geglu": True}
