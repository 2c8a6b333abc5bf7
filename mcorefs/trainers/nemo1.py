"""NeMo 1: `model_config.yaml` in the `.nemo` archive, or the directory that one was unpacked to.

    <name>.nemo/model_config.yaml       the model's config, with NeMo's own names
    <name>.nemo/model_weights/          the shards
    <name>.nemo/<uuid>_tokenizer.model  files that the config names as nemo:<uuid>_tokenizer.model

What the config leaves out has NeMo's default, which is not always Megatron-LM's. Names and
defaults: NeMo 2.2:nemo/collections/nlp/models/language_modeling/megatron_base_model.py
build_transformer_config, megatron_gpt_model.py model_provider_func and mcore_model_customize.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from mcorefs.errors import CheckpointError
from mcorefs.formats import Checkpoint
from mcorefs.locate import NEMO_CONFIG, Location
from mcorefs.storage import is_file_name
from mcorefs.trainers.base import Companions, is_model_directory
from mcorefs.trainers.hub import local_copies
from mcorefs.trainers.plain_yaml import read_yaml
from mcorefs.trainers.transformer_config import arguments

_ARTIFACT = "nemo:"
_NORMS = {"layernorm": "LayerNorm", "layernorm1p": "LayerNorm", "rmsnorm": "RMSNorm"}
_SWIGLU = ("swiglu", "fast-swiglu")
_DEFAULTS: Mapping[str, object] = {
    "layernorm_epsilon": 1e-5,
    "position_embedding_type": "learned_absolute",
    "rotary_base": 10000,
    "share_embeddings_and_output_weights": True,
}


class NeMo1:
    """Known by `model_config.yaml`, if that is a language model's."""

    name = "NeMo 1"

    def read(self, location: Location, checkpoint: Checkpoint) -> Companions | None:
        top = _top(location.path)
        if top is None:
            return None
        config = _resolved(read_yaml(top / NEMO_CONFIG))
        if not {"num_layers", "hidden_size", "num_attention_heads"} <= config.keys():
            return None
        if not config.get("mcore_gpt") and any(".language_model." in f for f in checkpoint.tensors):
            raise CheckpointError(
                f"{location.path} holds a model of NeMo's own from before Megatron-Core (mcore_gpt "
                f"is not set in {top / NEMO_CONFIG}); convert it with NeMo 1's "
                "scripts/checkpoint_converters/convert_gpt_nemo_to_mcore.py first"
            )
        copies = tuple(local_copies(_hub_names(config)))
        return Companions(
            self.name,
            {**translated(config), **checkpoint.args},
            checkpoint.args_source if checkpoint.args else str(top / NEMO_CONFIG),
            hf_directories=tuple(place for place in copies if is_model_directory(place)),
            tokenizers=(*_artifacts(top, config), *copies),
        )


def _top(weights: Path) -> Path | None:
    """The archive or directory of the weights in `weights`."""
    return next((at for at in (weights, weights.parent) if (at / NEMO_CONFIG).is_file()), None)


def _resolved(config: Mapping[str, object]) -> dict[str, object]:
    """Without what OmegaConf would have looked up elsewhere (`${.encoder_seq_length}`)."""
    return {
        name: value
        for name, value in config.items()
        if value is not None and not (isinstance(value, str) and "${" in value)
    }


def translated(config: Mapping[str, object]) -> dict[str, object]:
    """NeMo 1's config in the names of Megatron-LM's arguments."""
    custom = config.get("mcore_customization_config")
    args = {**_DEFAULTS, **config}
    activation = str(args.pop("activation", "gelu"))
    norm = str(args.get("normalization", "layernorm")).lower()
    if norm == "layernorm1p":
        args["apply_layernorm_1p"] = True
    scaled = args.pop("scale_positional_embedding", False)
    if scaled:  # else these mean nothing
        args = {"scale_factor": 8, "old_context_len": 8192, **args}
    else:
        args.pop("scale_factor", None)
    args |= {
        "normalization": _NORMS.get(norm, norm),
        "add_bias_linear": args.pop("bias", True),
        "add_qkv_bias": args.pop("qkv_bias", False),
        "rotary_percent": args.pop("rotary_percentage", 1.0),
        "swiglu": activation in _SWIGLU,
    }
    args.setdefault("max_position_embeddings", args.get("encoder_seq_length"))
    if isinstance(size := args.pop("override_vocab_size", None), int):
        args["vocab_size"] = args["padded_vocab_size"] = size
    for name in ("tokenizer", "data", "optim", "precision"):
        args.pop(name, None)
    return arguments({**args, **(custom if isinstance(custom, dict) else {})})


def _tokenizer(config: Mapping[str, object]) -> Mapping[str, object]:
    found = config.get("tokenizer")
    return found if isinstance(found, dict) else {}


def _hub_names(config: Mapping[str, object]) -> list[str]:
    """What the Hugging Face tokenizer, which is that of the model it began with, goes by."""
    tokenizer = _tokenizer(config)
    name = tokenizer.get("type")
    is_hub = tokenizer.get("library") == "huggingface" and isinstance(name, str)
    return [str(name)] if is_hub else []


def _artifacts(top: Path, config: Mapping[str, object]) -> Iterator[Path]:
    """The tokenizer files that the config names: in the archive, or somewhere on this machine."""
    tokenizer = _tokenizer(config)
    for key in ("model", "vocab_file"):
        named = tokenizer.get(key)
        if not isinstance(named, str) or "\0" in named:
            continue
        name = named.removeprefix(_ARTIFACT)
        if name != named and is_file_name(name):
            yield top / name
        elif Path(named).is_absolute():
            yield Path(named)
