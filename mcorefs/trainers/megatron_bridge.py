"""Megatron-Bridge: `run_config.yaml` in each iteration says how the model was built.

    latest_train_state.pt           which iteration is the latest (`train_state`)
    iter_0000100/run_config.yaml    model: {_target_: ...Provider, num_layers: ..., ...}, or
                                    model: {transformer: {num_layers: ..., ...}, ...}
    iter_0000100/train_state.pt     written just before it
    iter_0000100/tokenizer/         the tokenizer, if it was saved
    iter_0000100/hf/                the model (or an adapter) for Hugging Face, if that was saved

Its common.pt records no arguments. Layout facts:
Megatron-Bridge:src/megatron/bridge/training/checkpointing.py save_checkpoint and
training/utils/checkpoint_utils.py get_hf_model_id_from_checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from mcorefs.formats import Checkpoint
from mcorefs.locate import Location
from mcorefs.trainers.base import Companions, LoraTraining, is_model_directory, number
from mcorefs.trainers.class_names import model_type
from mcorefs.trainers.hub import local_copies
from mcorefs.trainers.plain_yaml import read_yaml
from mcorefs.trainers.transformer_config import arguments

RUN_CONFIG, TRAIN_STATE, EXPORTED = "run_config.yaml", "train_state.pt", "hf"
_TOKENIZER_ARGUMENTS = (
    "tokenizer_type",
    "tokenizer_model",
    "vocab_file",
    "merge_file",
    "vocab_extra_ids",
    "special_tokens",
    "legacy_tokenizer",
    "tokenizer_prompt_format",
    "sft_tokenizer_prompt_format",
    "tiktoken_pattern",
    "tiktoken_num_special_tokens",
    "tiktoken_special_tokens",
)


class MegatronBridge:
    """Known by its `run_config.yaml`, or by the `train_state.pt` that it writes before it."""

    name = "Megatron-Bridge"

    def read(self, location: Location, checkpoint: Checkpoint) -> Companions | None:
        path = location.path / RUN_CONFIG
        if not path.is_file():
            return self._without_config(location, checkpoint)
        config = read_yaml(path)
        model, tokenizer = _section(config, "model"), _section(config, "tokenizer")
        args = _tokenizer_arguments(tokenizer)
        args |= arguments({**_section(model, "transformer"), **model})
        named = _names(config, model)
        directories = tuple(_directories(location.path, named))
        remarks = []
        if named and not directories:
            remarks.append(
                f"Megatron-Bridge made it from {named[0]!r}, which is not on this machine; where "
                "config or tokenizer are wanting, give that model with --hf-config DIR"
            )
        if (location.path / EXPORTED).is_dir() and location.huggingface is None:
            remarks.append(f"{location.path / EXPORTED} holds what Megatron-Bridge itself exported")
        return Companions(
            self.name,
            {**args, **checkpoint.args},
            checkpoint.args_source if checkpoint.args else str(path),
            model_type=model_type(model.get("_target_")),
            hf_directories=directories,
            config=_recorded(model, args),
            tokenizers=tuple(local_copies(_strings(args.get("tokenizer_model")))),
            remarks=tuple(remarks),
            lora=_lora(config),
        )

    def _without_config(self, location: Location, checkpoint: Checkpoint) -> Companions | None:
        if checkpoint.args or not (location.path / TRAIN_STATE).is_file():
            return None
        why = f"there is no {location.path / RUN_CONFIG}"
        remark = f"{why}: the save was interrupted, or not everything was copied"
        return Companions(self.name, {}, why, remarks=(remark,))


def _section(config: Mapping[str, object], name: str) -> dict[str, object]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _tokenizer_arguments(tokenizer: Mapping[str, object]) -> dict[str, object]:
    """Megatron-LM's arguments for the section `tokenizer`; sp_tokenizer_kwargs are those of
    Megatron-LM:megatron/core/tokenizers/text/libraries/sentencepiece_tokenizer.py."""
    args = {name: tokenizer[name] for name in _TOKENIZER_ARGUMENTS if name in tokenizer}
    for name, value in _section(tokenizer, "sp_tokenizer_kwargs").items():
        is_special = name == "special_tokens"
        args[name if is_special else f"tokenizer_sentencepiece_{name}"] = value
    return args


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


_TOKENS = (
    *(f"{what}_token_id" for what in ("image", "video")),
    *(
        f"{what}_{end}_token_id"
        for what in ("vision", "image", "video")
        for end in ("start", "end")
    ),
)


def _recorded(model: Mapping[str, object], args: Mapping[str, object]) -> dict[str, object]:
    """The config.json of a model that sees, of whose parts the provider keeps the configs, or at
    least that of what sees (models/qwen_vl/qwen3_vl_provider.py, qwen35_vl_provider.py,
    glm_vl/glm_45v_provider.py; utils/yaml_utils.py _pretrained_config_representer)."""
    text, vision = (
        _section(_section(model, name), "config_dict")
        for name in ("hf_text_config", "vision_config")
    )
    named = model_type(model.get("_target_"))
    if not vision or named is None:
        return {}
    if not text:
        text = {name: args[name] for name in ("bos_token_id", "eos_token_id") if name in args}
    config: dict[str, object] = {name: args[name] for name in _TOKENS if name in args}
    return {**config, "model_type": named, "text_config": text, "vision_config": vision}


def _strings(*values: object) -> list[str]:
    return [value for value in values if isinstance(value, str) and value]


def _names(config: Mapping[str, object], model: Mapping[str, object]) -> list[str]:
    """What the model it was made from is called, the surest first."""
    return _strings(
        _section(model, "extra_checkpoint_metadata").get("hf_model_id"),
        model.get("hf_model_id"),
        _section(config, "checkpoint").get("hf_source_path"),
    )


def _directories(iteration: Path, named: list[str]) -> Iterator[Path]:
    """Those with the config.json of this model, or of the one it was made from."""
    exported = iteration / EXPORTED
    if not (exported / "adapter_config.json").is_file() and is_model_directory(exported):
        yield exported
    yield from (place for place in local_copies(named) if is_model_directory(place))
