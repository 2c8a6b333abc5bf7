"""OLMoE of ms-swift, whose attention module changed: rows and names as each has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mcorefs.errors import MappingError
from mcorefs.files import read_all
from mcorefs.model import Options, load
from mcorefs.tree import build
from tests.checkpoints import Fixture, ensure
from tests.edited import State, saved_anew, with_args

NAME = "olmoe-normalised"
AT = "decoder.layers.{}.self_attention."


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return ensure([NAME])[NAME]


def is_served_whole(root: Path, fixture: Fixture) -> None:
    model = load(root, Options(vocab_size=fixture.spec.vocab_size))
    assert model.choice.family.name == "olmoe"
    tree, _ = build(model, "50GB", 1 << 20)
    served = read_all(tree.files["model.safetensors"])
    assert served == (fixture.hf / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("trained", "interleaved"), [("tuner_type", False), ("train_type", False), ("tuner_type", True)]
)
def test_rows_one_above_the_other(
    fixture: Fixture, tmp_path: Path, trained: str, interleaved: bool
) -> None:
    """mcore-bridge:src/mcore_bridge/model/gpts/olmoe.py up to 1.4, OLMoEBridge._set_attn_state."""
    spec = fixture.spec
    oracle = load_file(fixture.hf / "model.safetensors")

    def change(state: State) -> None:
        for layer in range(spec.layers):
            at = f"model.layers.{layer}.self_attn."
            q, k, v = (oracle[f"{at}{x}_proj.weight"] for x in "qkv")
            norms = [oracle[f"{at}{x}_norm.weight"] for x in "qk"]
            if interleaved:
                q, k, *norms = map(neighbours, (q, k, *norms))
            state[AT.format(layer) + "linear_qkv.weight"] = torch.cat([q, k, v])
            for x, norm in zip("qk", norms, strict=True):
                state[AT.format(layer) + f"{x}_layernorm.weight"] = norm

    def neighbours(rows: Tensor) -> Tensor:
        """What is rotated together side by side."""
        halves = rows.view(-1, 2, spec.head_dim // 2, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)

    root = with_args(fixture, tmp_path, **{trained: "full"}, rotary_interleaved=interleaved)
    is_served_whole(saved_anew(fixture, root, change), fixture)


def test_megatron_cores_rows_and_names_of_its_own(fixture: Fixture, tmp_path: Path) -> None:
    """The same from 1.5 on: OLMoESelfAttention."""

    def change(state: State) -> None:
        for layer in range(fixture.spec.layers):
            for x in "qk":
                norm = state.pop(AT.format(layer) + f"{x}_layernorm.weight")
                state[AT.format(layer) + f"{x}_norm.weight"] = norm

    root = with_args(fixture, tmp_path, tuner_type="full")
    is_served_whole(saved_anew(fixture, root, change), fixture)


@pytest.mark.parametrize("tp", [2, None])
def test_rows_that_ranks_took_for_their_own_are_refused(
    fixture: Fixture, tmp_path: Path, tp: int | None
) -> None:
    root = with_args(fixture, tmp_path, tuner_type="full", tensor_model_parallel_size=tp)
    with pytest.raises(MappingError) as caught:
        load(root, Options(vocab_size=fixture.spec.vocab_size))
    (problem,) = caught.value.problems
    assert "which rows are which cannot be told" in problem
