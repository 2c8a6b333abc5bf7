"""Falcon-H1: what no tensor shows (multipliers), and what transformers' model cannot express."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from mcorefs import catalog
from mcorefs.errors import MappingError
from mcorefs.formats.torch_dist import TorchDist
from mcorefs.formats.torch_legacy import mamba
from mcorefs.mapping.choose import choose
from mcorefs.mapping.facts import gather
from mcorefs.mapping.families.falcon_h1 import FALCON_H1
from mcorefs.mapping.plan import plan
from mcorefs.mapping.reference import NO_REFERENCE
from mcorefs.model import Model, Options, load
from mcorefs.views import View
from tests.checkpoints import Fixture, ensure
from tests.checkpoints.families.falcon_h1 import MULTIPLIERS
from tests.edited import with_args
from tests.recordings import assert_same_bytes, differences
from tests.test_config import reference, refusal
from tests.test_megatron_bridge import changed, saved
from tests.test_nemotron_h import RANK
from tests.test_plan import unread

NORM, NO_NORM = "falcon_h1-tp2", "falcon_h1-without-norm"
AT = "decoder.layers.0.mamba_mixer."
ARGS: Mapping[str, object] = {"mamba_num_groups": 4, "kv_channels": 16}


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure([NORM, NO_NORM])


@pytest.fixture
def tensors(fixtures: Mapping[str, Fixture]) -> dict[str, View]:
    return dict(catalog.build(TorchDist().index(fixtures[NORM].iteration).tensors).tensors)


def problems_of(tensors: Mapping[str, View], **args: object) -> list[str]:
    facts, _, problems = gather(tensors, {**ARGS, **args}, NO_REFERENCE, 301)
    return [*problems, *plan(FALCON_H1, tensors, facts)[1]]


def with_reference(fixture: Fixture, directory: Path, **changes: object) -> Model:
    return load(fixture.root, Options(hf_config=reference(fixture, directory, **changes)))


# -- multipliers ----------------------------------------------------------------------------------


def test_multipliers_that_are_not_recorded_are_refused(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """Unless the user's own config has them."""
    fixture = fixtures[NORM]
    root = with_args(fixture, tmp_path, **dict.fromkeys(MULTIPLIERS, ...))
    problems = refusal(lambda: load(root, Options()))
    unknown = {problem.partition(" ")[0] for problem in problems if "is unknown" in problem}
    assert unknown == set(MULTIPLIERS)
    assert len(problems) == len(unknown)
    given = reference(fixture, tmp_path / "given")
    config = load(root, Options(hf_config=given)).config
    assert {name: config[name] for name in MULTIPLIERS} == MULTIPLIERS


@pytest.mark.parametrize("name", MULTIPLIERS)
def test_a_reference_with_another_multiplier_is_refused(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    value = MULTIPLIERS[name]
    other = [1.0 for _ in value] if isinstance(value, list) else 1.0
    (problem,) = refusal(lambda: with_reference(fixtures[NORM], tmp_path, **{name: other}))
    assert problem.startswith(f"{name} is {json.dumps(value)} in the checkpoint but")


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("key_multiplier", "1.0", "a number"),
        ("key_multiplier", [1.0], "a number"),
        ("lm_head_multiplier", True, "a number"),
        ("mlp_multipliers", 1.0, "2 numbers"),
        ("mlp_multipliers", (1.0, 2.0, 3.0), "2 numbers"),
        ("ssm_multipliers", [1.0, 2.0, 3.0, 4.0, None], "5 numbers"),
    ],
)
def test_multipliers_that_are_no_numbers(
    tensors: Mapping[str, View], name: str, value: object, wanted: str
) -> None:
    assert problems_of(tensors) == []
    (problem,) = problems_of(tensors, **{name: value})
    assert problem == f"{name} is {value!r} in the training arguments, which is not {wanted}"


# -- norms ----------------------------------------------------------------------------------------


def test_two_norms_of_one_input_are_refused(tensors: dict[str, View]) -> None:
    """As Megatron-Bridge 0.5 saved them."""
    for layer in range(4):
        at = f"decoder.layers.{layer}."
        del tensors[at + "norm.weight"]
        for module in ("mamba_mixer.in_proj.", "self_attention.linear_qkv."):
            tensors[f"{at}{module}layer_norm_weight"] = unread((64,))
    problems = problems_of(tensors)
    assert any("as they had in Megatron-Bridge before 0.6" in problem for problem in problems)
    facts = gather(tensors, ARGS, NO_REFERENCE)[0]
    with pytest.raises(MappingError, match="what speaks against falcon_h1:") as caught:
        choose(tensors, facts, None, NO_REFERENCE)
    own = "decoder.layers.*.mamba_mixer.in_proj.layer_norm_weight"
    assert f"has {own}" in caught.value.problems


def test_norms_of_mixers(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    """Their epsilon is 1e-5 in Megatron, and that of all other norms in transformers."""
    root = with_args(fixtures[NORM], tmp_path / "a", rmsnorm=False)
    assert refusal(lambda: load(root, Options())) == (
        "rmsnorm is False in the training arguments but the checkpoint holds mixer norms",
    )
    root = with_args(fixtures[NORM], tmp_path / "b", layernorm_epsilon=1e-6)
    (problem,) = refusal(lambda: load(root, Options()))
    assert "layernorm_epsilon=1e-06, but with 1e-05 in the norms of its mixers" in problem
    root = with_args(fixtures[NORM], tmp_path / "c", layernorm_epsilon=...)
    assert load(root, Options()).config["rms_norm_eps"] == 1e-5
    without = load(fixtures[NO_NORM].root, Options()).config
    assert (without["rms_norm_eps"], without["mamba_rms_norm"]) == (1e-6, False)
    root = with_args(fixtures[NO_NORM], tmp_path / "d", layernorm_epsilon=...)
    (problem,) = refusal(lambda: load(root, Options()))
    assert problem.startswith("rms_norm_eps is unknown")


def test_what_is_normed_before_the_gate(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    """The default of transformers' config, which means nothing where there is no norm."""
    (problem,) = refusal(
        lambda: with_reference(fixtures[NORM], tmp_path, mamba_norm_before_gate=True)
    )
    assert problem.startswith("mamba_norm_before_gate is false in the checkpoint but true in")
    model = with_reference(fixtures[NO_NORM], tmp_path, mamba_norm_before_gate=True)
    assert model.config["mamba_norm_before_gate"] is True
    assert load(fixtures[NORM].root, Options()).config["mamba_norm_before_gate"] is False


# -- what else a reference may say ----------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["attention_bias", "mlp_bias", "projectors_bias", "mamba_proj_bias"]
)
def test_there_are_no_biases(fixtures: Mapping[str, Fixture], name: str, tmp_path: Path) -> None:
    (problem,) = refusal(lambda: with_reference(fixtures[NORM], tmp_path, **{name: True}))
    assert problem.startswith(f"{name} is false in the checkpoint but true in")
    root = with_args(fixtures[NORM], tmp_path / "run", add_bias_linear=True)
    (problem,) = refusal(lambda: load(root, Options()))
    assert "add_bias_linear=True" in problem


def test_steps_have_no_limit(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    assert "time_step_limit" not in load(fixtures[NORM].root, Options()).config
    for stated in ([0.0, float("inf")], [0, {"__float__": "Infinity"}]):
        config = with_reference(fixtures[NORM], tmp_path, time_step_limit=stated).config
        assert config["time_step_limit"] == stated
    (problem,) = refusal(
        lambda: with_reference(fixtures[NORM], tmp_path, time_step_limit=[0.001, 0.1])
    )
    assert problem.startswith("time_step_limit is [0.001, 0.1] in")


def test_sizes_as_references_state_them(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    config = with_reference(
        fixtures[NORM], tmp_path, mamba_d_head="auto", mamba_d_ssm=None, mamba_chunk_size=256
    ).config
    assert (config["mamba_d_head"], config["mamba_d_ssm"]) == (12, 96)
    (problem,) = refusal(lambda: with_reference(fixtures[NORM], tmp_path, mamba_d_ssm=128))
    assert problem.startswith("mamba_d_ssm is 96 in the checkpoint but 128 in")


def test_the_number_of_groups_may_come_from_a_reference(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    root = with_args(fixtures[NORM], tmp_path, mamba_num_groups=...)
    with pytest.raises(MappingError, match="mamba_num_groups is recorded nowhere"):
        load(root, Options())
    given = reference(fixtures[NORM], tmp_path / "given")
    config = load(root, Options(hf_config=given)).config
    assert (config["mamba_n_groups"], config["mamba_d_state"]) == (4, 10)


# -- layers ---------------------------------------------------------------------------------------


def test_other_layers_among_them_are_refused(tensors: dict[str, View]) -> None:
    """Megatron-Bridge has them, of Mamba alone, say; transformers has not."""
    for name in [name for name in tensors if name.startswith("decoder.layers.2.")]:
        view = tensors.pop(name)
        if ".mamba_mixer." in name:
            tensors[name.replace("mamba_mixer", "mixer")] = view
    facts = gather(tensors, ARGS, NO_REFERENCE)[0]
    problems = refusal(lambda: choose(tensors, facts, None, NO_REFERENCE))
    assert any(problem.startswith("has decoder.layers.*.mixer.") for problem in problems)
    assert any("model.layers.2.self_attn.q_proj.weight needs" in p for p in problems_of(tensors))


def test_rows_in_an_order_that_nothing_tells_are_refused(tensors: Mapping[str, View]) -> None:
    bare = {name.removesuffix(".joined"): view for name, view in tensors.items()}
    (problem,) = problems_of(bare, tensor_model_parallel_size=2)
    assert problem.startswith("the rows of mixer.in_proj.weight lie in an order that nothing")
    assert problems_of(bare, tensor_model_parallel_size=1) == []


def test_the_convolution_under_its_newer_names() -> None:
    """megatron-core 0.18 on: parameters of the mixer itself."""
    rank = {name.replace(".mixer.", ".mamba_mixer."): part for name, part in RANK.items()}
    renamed = {name.replace("conv1d.", "conv1d_"): part for name, part in rank.items()}
    assert AT + "conv1d_weight" in renamed
    found = mamba.divided(renamed, [])
    assert found == mamba.divided(rank, [])
    assert AT + "conv1d.bias.x" in found


def test_there_are_no_other_heads(fixtures: Mapping[str, Fixture]) -> None:
    with pytest.raises(MappingError, match="no class of that family for seq_cls"):
        load(fixtures[NORM].root, Options(task="seq_cls"))


# -- Megatron-Bridge ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NORM, NO_NORM])
def test_everything_comes_from_the_run_config_of_megatron_bridge(
    fixtures: Mapping[str, Fixture], tmp_path: Path, name: str
) -> None:
    """The fields of Megatron-Bridge:src/megatron/bridge/models/falcon_h1/falconh1_provider.py
    FalconH1ModelProvider, and of its ancestors as they were recorded of another."""
    spec = fixtures[name].spec
    text = changed(
        "megatron_bridge/0.3.1/llama-tp2.yaml",
        _target_="megatron.bridge.models.falcon_h1.falconh1_provider.FalconH1ModelProvider",
        hf_model_id="tiiuae/Falcon-H1-0.5B-Instruct",
        num_layers=spec.layers,
        hidden_size=spec.hidden,
        ffn_hidden_size=spec.ffn,
        num_attention_heads=spec.heads,
        num_query_groups=spec.kv_heads,
        kv_channels=spec.head_dim,
        vocab_size=spec.vocab_size,
        seq_length=spec.max_positions,
        layernorm_epsilon=spec.norm_eps,
        rotary_base=spec.rope_theta,
        rope_scaling=False,
        hybrid_override_pattern=None,
        falconh1_ratio=1.0,
        mamba_num_heads=8,
        mamba_head_dim=12,
        mamba_num_groups=4,
        mamba_state_dim=10,
        d_conv=4,
        conv_bias=True,
        expand=2,
        chunk_size=128,
        rmsnorm=spec.mixer_norm,
        norm_before_gate=False,
        share_embeddings_and_output_weights=False,
        **MULTIPLIERS,
    )
    model = load(saved(fixtures[name], tmp_path, text), Options())
    assert model.choice.evidence == ("the trainer names model_type falcon_h1",)
    assert differences(model, fixtures[name], tmp_path) == {}
    assert_same_bytes(model, fixtures[name])
