"""A moment of scripts/fuzz, and what damage it or its readers have thought of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

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
