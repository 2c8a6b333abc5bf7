"""Megatron-Bridge: `run_config.yaml` in each iteration says how the model was built.

    iter_0000100/run_config.yaml    model: {_target_: ...Provider, num_layers: ..., ...}
    iter_0000100/tokenizer/         the tokenizer, if it was saved
    iter_0000100/hf/                the model in Hugging Face's format, if that was saved

Its common.pt records no arguments. Layout facts:
Megatron-Bridge:src/megatron/bridge/training/checkpointing.py save_checkpoint and
training/utils/checkpoint_utils.py get_hf_model_id_from_checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mcorefs.formats import Checkpoint
from mcorefs.locate import Location
from mcorefs.trainers.base import Companions, LoraTraining, is_model_directory, number
from mcorefs.trainers.hub import local_copies
from mcorefs.trainers.plain_yaml import read_yaml
from mcorefs.trainers.transformer_config import arguments

RUN_CONFIG = "run_config.yaml"
_PROVIDERS = (("Qwen3MoE", "qwen3_moe"), ("Qwen3Model", "qwen3"))
"""Providers of one family each, by how the names of their classes begin; GPTModelProvider, which
most families share today, says nothing."""


class MegatronBridge:
    """Known by its `run_config.yaml`."""

    name = "Megatron-Bridge"

    def read(self, location: Location, checkpoint: Checkpoint) -> Companions | None:
        path = location.path / RUN_CONFIG
        if not path.is_file():
            return None
        config = read_yaml(path)
        model = _section(config, "model")
        named = _names(config, model)
        directories = tuple(place for place in local_copies(named) if is_model_directory(place))
        remarks = []
        if named and not directories:
            remarks.append(
                f"Megatron-Bridge made it from {named[0]!r}, which is not on this machine; where "
                "config or tokenizer are wanting, give that model with --hf-config DIR"
            )
        if is_model_directory(location.path / "hf"):
            remarks.append(f"{location.path / 'hf'} holds what Megatron-Bridge itself exported")
        args = arguments({**_section(model, "transformer"), **model})
        return Companions(
            self.name,
            {**args, **checkpoint.args},
            checkpoint.args_source if checkpoint.args else str(path),
            model_type=_model_type(model),
            hf_directories=directories,
            tokenizers=tuple(local_copies(_tokenizers(config))),
            remarks=tuple(remarks),
            lora=_lora(config),
        )


def _section(config: Mapping[str, object], name: str) -> dict[str, object]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _lora(config: Mapping[str, object]) -> LoraTraining | None:
    """What was trained, if that was an adapter (peft/lora.py, peft/canonical_lora.py)."""
    peft = _section(config, "peft")
    if not peft:
        return None
    rank, alpha, targets = (peft.get(name) for name in ("dim", "alpha", "target_modules"))
    base = _section(config, "checkpoint").get("pretrained_checkpoint")
    named = base if isinstance(base, str) and base and "\0" not in base else None
    return LoraTraining(
        rank=rank if type(rank) is int else None,
        alpha=number(alpha),
        targets=tuple(map(str, targets)) if isinstance(targets, list) else (),
        base=named,
        base_checkpoint=None if named is None else Path(named),
    )


def _names(config: Mapping[str, object], model: Mapping[str, object]) -> list[str]:
    """What the model it was made from is called, the surest first."""
    stated = (
        _section(model, "extra_checkpoint_metadata").get("hf_model_id"),
        model.get("hf_model_id"),
        _section(config, "checkpoint").get("hf_source_path"),
    )
    return [name for name in stated if isinstance(name, str) and name]


def _tokenizers(config: Mapping[str, object]) -> list[str]:
    named = _section(config, "tokenizer").get("tokenizer_model")
    return [named] if isinstance(named, str) else []


def _model_type(model: Mapping[str, object]) -> str | None:
    target = str(model.get("_target_", "")).rpartition(".")[2]
    return next((kind for begin, kind in _PROVIDERS if target.startswith(begin)), None)
