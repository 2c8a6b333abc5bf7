"""What the bench calls the same job: every tensor of the model, and no other values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scripts.benchmarks.peers import compare
from scripts.benchmarks.places import Place

MODEL = {"a": torch.arange(6).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    weights = tmp_path / "model.safetensors"
    save_file(MODEL, weights)
    (tmp_path / "out").mkdir()
    return Place(tmp_path, tmp_path, weights)


def test_the_same_tensors_in_other_files(place: Place, tmp_path: Path) -> None:
    for name, tensor in MODEL.items():
        save_file({name: tensor}, tmp_path / "out" / f"{name}.safetensors")
    compare(tmp_path / "out", place)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": MODEL["a"] + 1}, "a is not the model's"),
        ({"b": MODEL["b"].half()}, "b is not the model's"),
        ({"c": torch.zeros(1)}, "c is not the model's"),
        ({"a": None}, r"lacks \['a'\]"),
    ],
)
def test_another_job(
    place: Place, tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    tensors = {name: one for name, one in {**MODEL, **changes}.items() if one is not None}
    save_file(tensors, tmp_path / "out" / "made.safetensors")
    with pytest.raises(SystemExit, match=message):
        compare(tmp_path / "out", place)
