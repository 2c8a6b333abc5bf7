"""NeMo 2: `context/` beside `weights/` says how the model was built.

    <name>/weights/                 the shards; adapter_metadata.json if they are only an adapter
    <name>/context/model.yaml       config: {_target_: ...Qwen3Config600M, num_layers: ..., ...}
    <name>/context/nemo_tokenizer/  the tokenizer, as Hugging Face files

`context/io.json` and the files with uuids for names hold pickled objects: they are left alone.
Layout facts: NeMo:nemo/lightning/io/mixin.py io_dump and io/pl.py ckpt_to_weights_subdir.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mcorefs.formats import Checkpoint
from mcorefs.locate import Location
from mcorefs.steps import read_json
from mcorefs.trainers.base import Companions, LoraTraining
from mcorefs.trainers.plain_yaml import read_yaml
from mcorefs.trainers.transformer_config import arguments

CONTEXT, ADAPTER = "context", "adapter_metadata.json"
_CONFIGS = (("Qwen3MoE", "qwen3_moe"), ("Qwen3Config", "qwen3"))
"""Configs of one family each, by how the names of their classes begin."""
_CONFIG_MOE = ("Qwen3Config30B_A3B", "Qwen3Config235B_A22B")


class NeMo:
    """Known by `context/model.yaml`."""

    name = "NeMo 2"

    def read(self, location: Location, checkpoint: Checkpoint) -> Companions | None:
        context = _context(location.path)
        if context is None:
            return None
        model = read_yaml(context / "model.yaml")
        nested = model.get("config")
        config = nested if isinstance(nested, dict) else model
        return Companions(
            self.name,
            {**arguments(config), **checkpoint.args},
            checkpoint.args_source if checkpoint.args else str(context / "model.yaml"),
            model_type=_model_type(config),
            tokenizers=(context / "nemo_tokenizer", context / "tokenizer", context),
            lora=_lora(location.path),
        )


def _lora(weights: Path) -> LoraTraining | None:
    """The base model of an adapter; its alpha is only in `io.json`, among the pickled
    (nemo/lightning/pytorch/callbacks/peft.py WrappedAdapterIO)."""
    found = read_json(weights / ADAPTER)
    if found is None:
        return None
    base = found.get("model_ckpt_path")
    named = base if isinstance(base, str) and base and "\0" not in base else None
    return LoraTraining(base=named, base_checkpoint=None if named is None else Path(named))


def _context(weights: Path) -> Path | None:
    """The context of the shards in `weights`, which is a directory of its own or not."""
    for place in (weights.parent, weights):
        if (place / CONTEXT / "model.yaml").is_file():
            return place / CONTEXT
    return None


def _model_type(config: Mapping[str, object]) -> str | None:
    target = str(config.get("_target_", "")).rpartition(".")[2]
    if target in _CONFIG_MOE:
        return "qwen3_moe"
    return next((kind for begin, kind in _CONFIGS if target.startswith(begin)), None)
