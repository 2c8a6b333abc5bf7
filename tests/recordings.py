"""What training frameworks write beside the weights, as they wrote it: `recorded/README.md` says
how it was made; and what comes out of it, held against the Hugging Face model it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from mcorefs.files import read_all
from mcorefs.model import Model
from mcorefs.tree import build
from tests.checkpoints import Fixture

RECORDED = Path(__file__).parent / "recorded"


def recorded(name: str) -> dict[str, Any]:
    """The YAML file `name`, to be changed and written again; none holds a tag."""
    found: dict[str, Any] = yaml.safe_load((RECORDED / name).read_text())
    return found


def assert_same_bytes(model: Model, fixture: Fixture) -> None:
    """Every safetensors file is what `save_pretrained` wrote."""
    tree, _ = build(model, fixture.spec.hf_max_shard_size or "50GB", 1 << 20)
    expected = sorted(fixture.hf.glob("*.safetensors"))
    assert sorted(name for name in tree.files if name.endswith(".safetensors")) == [
        file.name for file in expected
    ]
    for file in expected:
        assert read_all(tree.files[file.name]) == file.read_bytes(), file.name


def differences(model: Model, fixture: Fixture, directory: Path) -> dict[str, object]:
    """Attributes of the config that differ from those of the original model."""
    tree, _ = build(model, "50GB", 1 << 20)
    (directory / "config.json").write_bytes(read_all(tree.files["config.json"]))
    made, expected = (AutoConfig.from_pretrained(p).to_dict() for p in (directory, fixture.hf))
    unimportant = {"transformers_version", "_name_or_path", "pad_token_id"}
    return {
        name: made.get(name)
        for name in made.keys() | expected.keys()
        if name not in unimportant and made.get(name) != expected.get(name)
    }
