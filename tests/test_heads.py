"""Models that put out scores or an embedding instead of words: ms-swift's task_type seq_cls (whose
output layer is its own, whole on every rank) and embedding (which has none)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from mcorefs.errors import CheckpointError, MappingError
from mcorefs.files import read_all
from mcorefs.materialize import materialize
from mcorefs.model import Model, Options, load
from mcorefs.tree import build, open_tree
from tests.checkpoints import HEADED, Fixture, ensure
from tests.recordings import assert_same_bytes

SCORES = [name for name, spec in HEADED.items() if spec.labels]
EMBEDS = [name for name, spec in HEADED.items() if spec.bare]


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure(HEADED)


def options(fixture: Fixture) -> Options:
    if fixture.spec.common == "no_args":
        return Options(hf_config=fixture.hf)
    return Options(vocab_size=fixture.spec.vocab_size)


def task_of(fixture: Fixture) -> str:
    return "embedding" if fixture.spec.bare else "seq_cls"


def trained_by_swift(fixture: Fixture, directory: Path) -> Path:
    root = directory / "checkpoint-100"
    shutil.copytree(fixture.root, root)
    said = {"swift_version": "4.6.0", "task_type": task_of(fixture), "model_dir": str(fixture.hf)}
    (root / "args.json").write_text(json.dumps(said))
    return root


@pytest.mark.parametrize("name", HEADED)
def test_files_are_those_of_save_pretrained(
    fixtures: Mapping[str, Fixture], tmp_path: Path, name: str
) -> None:
    fixture = fixtures[name]
    assert_same_bytes(load(trained_by_swift(fixture, tmp_path), options(fixture)), fixture)
    by_hand = replace(options(fixture), task=task_of(fixture))
    assert_same_bytes(load(fixture.root, by_hand), fixture)


def config(model: Model, directory: Path) -> dict[str, object]:
    tree, _ = build(model, "50GB", 1 << 20)
    (directory / "config.json").write_bytes(read_all(tree.files["config.json"]))
    found: dict[str, object] = AutoConfig.from_pretrained(directory).to_dict()
    return found


@pytest.mark.parametrize("name", HEADED)
def test_config(fixtures: Mapping[str, Fixture], tmp_path: Path, name: str) -> None:
    fixture = fixtures[name]
    model = load(fixture.root, replace(options(fixture), task=task_of(fixture)))
    made, expected = config(model, tmp_path), AutoConfig.from_pretrained(fixture.hf).to_dict()
    for key in ("architectures", "id2label", "label2id", "num_labels", "tie_word_embeddings"):
        assert made.get(key) == expected.get(key)


@pytest.mark.parametrize("name", HEADED)
def test_transformers_computes_the_same(
    fixtures: Mapping[str, Fixture], tmp_path: Path, name: str
) -> None:
    fixture = fixtures[name]
    kind = AutoModel if fixture.spec.bare else AutoModelForSequenceClassification
    opened = open_tree(fixture.root, replace(options(fixture), task=task_of(fixture)))
    materialize(opened.tree, tmp_path / "out")
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        made, expected = (
            kind.from_pretrained(place, dtype=torch.float32).eval()(tokens)[0]
            for place in (tmp_path / "out", fixture.hf)
        )
    assert torch.equal(made, expected)


@pytest.mark.parametrize(
    ("name", "rows", "kind"),
    [
        ("scores-qwen3-tp2-pp2", "3 rows", "a classifier"),
        ("scores-torch-llama-tp2", "1 row", r"a value head \(an RL critic\) or a reward model"),
    ],
)
def test_a_head_that_nothing_explains(
    fixtures: Mapping[str, Fixture], name: str, rows: str, kind: str
) -> None:
    fixture = fixtures[name]
    wanted = f"has {rows} where .* no language model but {kind}; --task seq_cls presents"
    with pytest.raises(MappingError, match=wanted):
        load(fixture.root, options(fixture))


def test_no_head_that_nothing_explains(fixtures: Mapping[str, Fixture]) -> None:
    untied = fixtures["embeds-torch-qwen2-pp2"]
    with pytest.raises(MappingError, match=r"pipeline stage is missing, or .*--task embed"):
        load(untied.root, options(untied))
    with pytest.raises(MappingError, match="its task is seq_cls, but the checkpoint holds no out"):
        load(untied.root, replace(options(untied), task="seq_cls"))


def test_a_tied_head_may_also_be_an_embedding(fixtures: Mapping[str, Fixture]) -> None:
    tied = fixtures["embeds-qwen3-tp2"]
    model = load(tied.root, options(tied))
    assert model.architecture == "Qwen3ForCausalLM"
    assert model.config["tie_word_embeddings"] is True


def test_names_of_tasks(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures["scores-qwen3-tp2-pp2"]
    with pytest.raises(CheckpointError, match="--task scores: expected one of causal_lm, seq_cls"):
        load(fixture.root, replace(options(fixture), task="scores"))
    root = trained_by_swift(fixture, tmp_path)
    (root / "args.json").write_text('{"swift_version": "5", "task_type": "dreams"}')
    with pytest.raises(MappingError, match="it was trained for the task 'dreams', which is not"):
        load(root, options(fixture))


def test_names_of_labels(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    """Those of a reference are kept where it has as many."""
    fixture = fixtures["scores-qwen3-tp2-pp2"]
    reference = json.loads((fixture.hf / "config.json").read_text())
    names = {"0": "bad", "1": "fair", "2": "good"}
    for labels, kept in ((names, True), ({"0": "bad", "1": "good"}, False)):
        reference["id2label"] = labels
        reference["label2id"] = {label: int(number) for number, label in labels.items()}
        (tmp_path / "config.json").write_text(json.dumps(reference))
        model = load(fixture.root, Options(hf_config=tmp_path, task="seq_cls"))
        assert (model.config["id2label"] == labels) is kept
        assert len(config(model, tmp_path)["id2label"]) == 3  # type: ignore[arg-type]
