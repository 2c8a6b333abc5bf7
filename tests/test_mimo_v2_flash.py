"""MiMo-V2-Flash: which layers have a window, how large it is, and what a reference may say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mcorefs.catalog import build as build_catalog
from mcorefs.errors import MappingError
from mcorefs.files import read_all
from mcorefs.formats.torch_dist import TorchDist
from mcorefs.mapping.facts import gather
from mcorefs.mapping.families.mimo_v2_flash import MIMO_V2_FLASH
from mcorefs.mapping.family import Facts
from mcorefs.mapping.plan import plan
from mcorefs.mapping.reference import NO_REFERENCE
from mcorefs.model import Model, Options, load
from mcorefs.tree import build
from tests.checkpoints import Fixture, ensure
from tests.edited import with_args

NAME, SILENT = "mimo_v2_flash-tp2-ep2", "mimo_v2_flash-no-args"
MTP = "mimo_v2_flash-tp2-ep2-mtp"


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure([NAME, SILENT, MTP])


def refusal(root: Path, options: Options) -> tuple[str, ...]:
    with pytest.raises(MappingError) as caught:
        load(root, options)
    return caught.value.problems


def reference(fixture: Fixture, directory: Path, **changes: object) -> Options:
    """Options with the oracle's config.json changed."""
    directory.mkdir()
    config = json.loads((fixture.hf / "config.json").read_bytes())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return Options(hf_config=directory)


def test_it_is_known_by_its_arguments(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    assert load(fixtures[NAME].root, Options()).choice.family.name == "mimo_v2_flash"
    root = with_args(fixtures[NAME], tmp_path, hybrid_attention_pattern=...)
    (problem,) = refusal(root, Options(family="mimo_v2_flash"))
    assert problem == (
        "hybrid_attention_pattern=None, but by their sinks the layers are [0, 1, 1, 0]"
    )


@pytest.mark.parametrize(
    ("argument", "value", "problem"),
    [
        ("hybrid_attention_pattern", [0, 1, 0, 1], "by their sinks the layers are [0, 1, 1, 0]"),
        ("hybrid_attention_pattern", [0, 1, 1], "by their sinks the layers are [0, 1, 1, 0]"),
        ("window_size", [7, 0], "window_size=[7, 0], expected a number of tokens"),
        ("window_attn_skip_freq", 2, "window_attn_skip_freq=2"),
        ("swa_num_query_groups", 2, "swa_num_query_groups is 2"),
        ("full_attn_num_query_groups", 4, "full_attn_num_query_groups is 4"),
        ("v_head_dim", 16, "v_head_dim is 16"),
        ("kv_channels", 20, "which no number of query groups of 8 heads of size 20 explains"),
        ("rotary_seq_len_interpolation_factor", 2, "rotary_seq_len_interpolation_factor=2"),
    ],
)
def test_what_does_not_fit_is_refused(
    fixtures: Mapping[str, Fixture], argument: str, value: object, problem: str, tmp_path: Path
) -> None:
    root = with_args(fixtures[NAME], tmp_path, **{argument: value})
    assert any(problem in told for told in refusal(root, Options(family="mimo_v2_flash")))


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        ({"groups": 2, "sliding_groups": 2}, "have 2 query groups, expected 4"),
        ({"sliding_groups": 4}, "no layer is without a window"),
    ],
)
def test_windows_must_have_twice_the_groups(groups: Mapping[str, int], problem: str) -> None:
    facts = Facts({"layers": 4, **groups}, {}, frozenset(), False, "bfloat16", frozenset())
    (told,) = (told for check in MIMO_V2_FLASH.checks if (told := check(facts)) is not None)
    assert problem in told


def test_the_window_of_each_reader(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    """Eight tokens with itself: the hub's sliding_window_size is without."""
    config = load(fixtures[NAME].root, Options()).config
    assert (config["sliding_window"], config["sliding_window_size"]) == (8, 7)
    given = reference(fixtures[NAME], tmp_path / "hub", sliding_window_size=8)
    model = load(fixtures[NAME].root, given)
    assert model.config["sliding_window_size"] == 8
    assert any("sliding_window_size is 8 as in" in remark for remark in model.remarks)


def test_references_in_either_style(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    plain = load(fixtures[NAME].root, Options()).config
    hub = {"rope_parameters": None, "rope_theta": 5e6, "swa_rope_theta": 1e4, "rope_scaling": None}
    for number, changes in enumerate(({}, {**hub, "partial_rotary_factor": 0.5})):
        given = reference(fixtures[NAME], tmp_path / str(number), **changes)
        config = load(fixtures[NAME].root, given).config
        assert config["rope_parameters"] == plain["rope_parameters"]
        assert "rope_scaling" not in config
        assert "rope_local_base_freq" not in config
    scaled = {**hub, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    given = reference(fixtures[NAME], tmp_path / "scaled", **scaled)
    (problem,) = refusal(fixtures[NAME].root, given)
    assert problem.startswith("rope_scaling is")
    given = reference(fixtures[NAME], tmp_path / "other", **{**hub, "swa_rope_theta": 2e4})
    (problem,) = refusal(fixtures[NAME].root, given)
    assert problem.startswith("swa_rope_theta is 10000")


def test_without_arguments_a_reference_says_the_rest(fixtures: Mapping[str, Fixture]) -> None:
    fixture = fixtures[SILENT]
    assert (
        load(fixture.root, Options(hf_config=fixture.hf)).config["attention_value_scale"] == 0.707
    )
    with pytest.raises(MappingError):
        load(fixture.root, Options())


def test_layers_for_prediction(fixtures: Mapping[str, Fixture]) -> None:
    fixture = fixtures[MTP]
    options = Options(vocab_size=fixture.spec.vocab_size)
    model = load(fixture.root, options)
    assert model.config["num_nextn_predict_layers"] == 2
    inside = {tensor.name for tensor in model.tensors if "mtp.layers.1." in tensor.name}
    assert {name.removeprefix("model.mtp.layers.1.") for name in inside} == {
        *(f"{name}.weight" for name in ("eh_proj", "enorm", "hnorm", "final_layernorm")),
        *(f"{name}_layernorm.weight" for name in ("input", "pre_mlp")),
        *(f"self_attn.{x}_proj.weight" for x in "qkvo"),
        "self_attn.attention_sink_bias",
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    without = load(fixture.root, replace(options, mtp=False))
    assert without.config["num_nextn_predict_layers"] == 0
    assert not any("mtp" in tensor.name for tensor in without.tensors)


def test_a_layer_for_prediction_without_a_window_is_refused(
    fixtures: Mapping[str, Fixture],
) -> None:
    """Its sinks show it, as those of others do."""
    whole = TorchDist().index(fixtures[MTP].iteration)
    sinks = re.compile(r"mtp\.layers\.1\..*softmax_offset")
    stored = {name: one for name, one in whole.tensors.items() if not sinks.match(name)}
    assert len(stored) == len(whole.tensors) - 1
    tensors = build_catalog(stored).tensors
    facts, _, problems = gather(tensors, whole.args, NO_REFERENCE)
    assert not problems
    _, problems = plan(MIMO_V2_FLASH, tensors, facts)
    assert any("linear_qkv.weight, which this family has no place for" in told for told in problems)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_value_scale": 0.5},
        {"sliding_window_size": 8},
        {"norm_topk_prob": False},
        {"routed_scaling_factor": 2.0},
        {"rope_parameters.sliding_attention.rope_theta": 2e4},
        {"rope_parameters.full_attention.partial_rotary_factor": 0.25},
    ],
)
def test_each_key_counts(
    fixtures: Mapping[str, Fixture], change: Mapping[str, object], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = load(fixtures[NAME].root, Options())
    whole = _logits(AutoModelForCausalLM.from_pretrained(written(model, tmp_path)))
    config = json.loads((tmp_path / "config.json").read_text())
    ((at, value),) = change.items()
    *outer, key = at.split(".")
    inner = config
    for name in outer:
        inner = inner[name]
    assert key in inner
    inner[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), whole)


def written(model: Model, directory: Path) -> Path:
    tree, _ = build(model, "50GB", 1 << 20)
    for name, file in tree.files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_all(file))
    return directory


@torch.no_grad()
def _logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(torch.arange(0, 300, 7)[None]).logits
    return found
