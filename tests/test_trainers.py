"""What lies beside a checkpoint, and what is made of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from mcorefs import trainers
from mcorefs.errors import MappingError
from mcorefs.formats import Checkpoint
from mcorefs.locate import Location
from mcorefs.model import Options, load
from mcorefs.trainers import Companions
from tests.checkpoints import Fixture, ensure


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return ensure(["qwen3-tied"])["qwen3-tied"]  # records no arguments


@dataclass(frozen=True)
class Someone:
    """A trainer that leaves a Hugging Face directory."""

    directory: Path
    name: str = "Someone"

    def read(self, location: Location, checkpoint: Checkpoint) -> Companions | None:
        return Companions(
            self.name, {}, "nothing", "qwen3", (self.directory,), remarks=("by someone",)
        )


def test_megatron_lm_is_the_last_to_answer(fixture: Fixture) -> None:
    model = load(fixture.root, Options(hf_config=fixture.hf))
    assert model.companions.trainer == "Megatron-LM"
    assert model.companions.args == model.checkpoint.args == {}


def test_a_directory_beside_the_checkpoint_is_the_reference(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(MappingError, match="rms_norm_eps is unknown"):
        load(fixture.root, Options())
    config = json.loads((fixture.hf / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((fixture.tokenizer / "tokenizer.json").read_bytes())
    monkeypatch.setattr(trainers, "TRAINERS", (Someone(tmp_path),))
    model = load(fixture.root, Options())
    assert model.config["rms_norm_eps"] == config["rms_norm_eps"]
    assert "by someone" in model.remarks
    assert model.tokenizer.source == str(tmp_path)
    config["hidden_size"] = 96
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        MappingError, match=rf"64 in the checkpoint but 96 in {tmp_path}/config.json"
    ):
        load(fixture.root, Options())
