"""Arguments with an entry for each layer: as many as there are layers, of the kinds they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from mcorefs.errors import MappingError
from mcorefs.mapping.layer_lists import list_problems
from mcorefs.model import Options, load
from tests.checkpoints import Fixture, ensure
from tests.edited import with_args

NAMES = (
    "dots1-tp2-ep2",
    "exaone4-tp2-window",
    "exaone_moe-tp2-ep2",
    "exaone_moe-tp2-ep2-mtp",
    "glm4_moe-tp2-ep2",
    "gpt_oss-tp2-ep2",
    "mimo_v2_flash-tp2-ep2",
    "qwen3_next-tp2-ep2",
)


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure(NAMES)


def problems(args: Mapping[str, object], layers: int = 4) -> list[str]:
    return list(list_problems(args, layers, {"moe_layer_freq": {1, 2, 3}}))


@pytest.mark.parametrize("length", [3, 5])
def test_a_list_of_another_length(length: int) -> None:
    (problem,) = problems({"window_attn_skip_freq": [1] * length})
    assert problem == (
        f"window_attn_skip_freq in the training arguments has {length} entries, expected 4: "
        "one for each layer"
    )


def test_layers_for_prediction_may_be_behind() -> None:
    assert not problems({"no_rope_freq": [0] * 5, "mtp_num_layers": 1})
    assert not problems({"no_rope_freq": [0] * 4, "mtp_num_layers": 1})
    (problem,) = problems({"no_rope_freq": [0] * 6, "mtp_num_layers": 1})
    assert "has 6 entries, expected 4 or 5" in problem


def test_what_is_no_list_of_layers() -> None:
    assert not problems({"window_attn_skip_freq": 2, "interleaved_attn_pattern": (5, 1)})
    assert not problems({"moe_layer_freq": 1, "no_rope_freq": None})
    (problem,) = problems({"interleaved_attn_pattern": ["sliding_attention"]})
    assert problem.startswith("interleaved_attn_pattern in the training arguments has 1 entries")


def test_kinds_that_tensors_show() -> None:
    assert not problems({"moe_layer_freq": [0, 1, 1, 1]})
    (problem,) = problems({"moe_layer_freq": [1, 1, 1, 0]})
    assert problem.endswith("by their tensors these layers are of that kind: [1, 2, 3]")
    assert not list(list_problems({"moe_layer_freq": [1, 1]}, 2, {"moe_layer_freq": set()}))


def test_another_number_of_layers_is_told_by_itself() -> None:
    assert not problems({"num_layers": 6, "window_attn_skip_freq": [1] * 6})


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("dots1-tp2-ep2", "window_attn_skip_freq", [1, 0, 1]),
        ("exaone4-tp2-window", "window_attn_skip_freq", [1, 1, 1, 0, 1]),
        ("exaone4-tp2-window", "no_rope_freq", [0, 0, 0]),
        ("exaone_moe-tp2-ep2", "window_attn_skip_freq", [1, 1, 1]),
        ("exaone_moe-tp2-ep2", "sliding_windows", [8, 8, 8]),
        ("exaone_moe-tp2-ep2", "swiglu_limits", [0.0] * 5),
        ("exaone_moe-tp2-ep2-mtp", "no_rope_freq", [0, 0, 0, 1, 1, 1]),
        ("glm4_moe-tp2-ep2", "moe_layer_freq", [0, 1, 1]),
        ("glm4_moe-tp2-ep2", "moe_layer_freq", [0, 0, 1, 1]),
        ("gpt_oss-tp2-ep2", "window_attn_skip_freq", [1, 0]),
        ("mimo_v2_flash-tp2-ep2", "hybrid_attention_pattern", [0, 1, 1, 0, 0]),
        ("qwen3_next-tp2-ep2", "linear_attention_freq", [1, 0]),
        ("qwen3_next-tp2-ep2", "linear_attention_freq", [0, 1, 0, 1]),
    ],
)
def test_no_family_takes_it(
    fixtures: Mapping[str, Fixture], name: str, argument: str, value: object, tmp_path: Path
) -> None:
    fixture = fixtures[name]
    options = Options(vocab_size=fixture.spec.vocab_size, family=fixture.spec.family)
    load(fixture.root, options)
    root = with_args(fixture, tmp_path, **{argument: value})
    with pytest.raises(MappingError) as caught:
        load(root, options)
    assert any(
        told.startswith(f"{argument} in the training arguments") for told in caught.value.problems
    )


def test_a_window_behind_the_decoder_is_not_in_its_config(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """megatron-core 0.16 counts layers for multi-token prediction on."""
    fixture = fixtures["exaone_moe-tp2-ep2-mtp"]
    options = Options(vocab_size=fixture.spec.vocab_size)
    longer = {"window_attn_skip_freq": [1, 1, 1, 0, 0], "no_rope_freq": [0, 0, 0, 1, 1]}
    root = with_args(fixture, tmp_path, **longer)
    assert load(root, options).config == load(fixture.root, options).config
    without = replace(options, mtp=False)
    assert load(root, without).config == load(fixture.root, without).config
