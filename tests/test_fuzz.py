"""A moment of scripts/fuzz, and what damage it or its readers have thought of."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mcorefs.errors import CheckpointError
from mcorefs.model import Options, load
from scripts.fuzz import DIST, TARGETS, Bench
from tests.checkpoints import ensure
from tests.edited import copy, edit_metadata


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("target", TARGETS)
def test_damage_is_refused_or_harmless(bench: Bench, target: str) -> None:
    findings = [bench.look(target, seed) for seed in range(12)]
    assert [finding for finding in findings if finding] == []


def test_one_rank_in_the_place_of_another(tmp_path: Path) -> None:
    """Ranks write alike, so that a chunk read from another rank's file would look whole."""
    fixture = ensure([DIST])[DIST]
    iteration = copy(fixture, tmp_path)

    def edit(metadata: Any) -> None:
        held = {
            index.offset[0]: (index, info)
            for index, info in metadata.storage_data.items()
            if index.fqn == "embedding.word_embeddings.weight"
        }
        (_, first), (index, _) = held[0], held[max(held)]
        metadata.storage_data[index] = replace(first)

    edit_metadata(iteration, edit)
    with pytest.raises(CheckpointError, match="is that of another chunk"):
        load(iteration.parent, Options(vocab_size=fixture.spec.vocab_size))


STACK = "decoder.layers.self_attention.linear_qkv.weight"


@pytest.mark.parametrize("fqn", [STACK, "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"])
def test_an_axis_without_end(tmp_path: Path, fqn: str) -> None:
    """Where a tensor has no elements, its other axes cost a stranger nothing."""
    fixture = ensure([DIST])[DIST]
    iteration = copy(fixture, tmp_path)

    def edit(metadata: Any) -> None:
        held = metadata.state_dict_metadata
        held[fqn] = replace(held[STACK], size=torch.Size((10**12, 0)), chunks=[])

    edit_metadata(iteration, edit)
    start = time.process_time()
    with pytest.raises(CheckpointError, match="which no model has"):
        load(iteration.parent, Options(vocab_size=fixture.spec.vocab_size))
    assert time.process_time() - start < 20
