"""The config.json of the model that was trained from: it says what Megatron does not record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from mcorefs.errors import CheckpointError
from mcorefs.formats.huggingface import resolved
from mcorefs.mapping import step
from mcorefs.storage import read_file

HF_CONFIG = "--hf-config"
_MAX_BYTES = 16 << 20
"""Of a config, or of a file of code."""
TEXT, VISION = "text_config", "vision_config"
"""Where the config of a model that sees has those of its parts."""


@dataclass(frozen=True)
class Reference:
    """A Hugging Face config, and who brought it."""

    config: Mapping[str, object]
    """config.json in the hub's spelling; empty where there is no reference."""
    where: str
    """What it is called in messages: the option, or the file that was found."""
    directory: Path | None = None

    def section(self, name: str) -> Mapping[str, object]:
        """The config inside it under that key; empty where there is none."""
        found = self.config.get(name)
        if not isinstance(found, dict):
            return {}
        return _hub_rope(_with_mrope(found)) if name == TEXT else found

    def beside(self, name: str) -> bytes | None:
        """The file of that name beside config.json; None where there is none.

        Raises CheckpointError, also where it is a link out of a directory that the user did not
        name: a checkpoint must not make mcorefs show other files of this machine.
        """
        if self.directory is None or not (file := self.directory / name).is_file():
            return None
        try:
            return read_file(file if self.where == HF_CONFIG else resolved(file), _MAX_BYTES)
        except OSError as problem:
            raise CheckpointError(f"{file} cannot be read: {problem.strerror}") from None

    @property
    def text(self) -> Reference:
        """That of the language model, which is the whole unless the model also sees."""
        found = self.section(TEXT)
        return replace(self, config=found) if found else self


NO_REFERENCE = Reference({}, HF_CONFIG)


def read_reference(given: Path, where: str = HF_CONFIG) -> Reference:
    """The config.json in directory `given` (or the file itself).

    Raises CheckpointError where it is no config of a model.
    """
    path = given / "config.json" if given.is_dir() else given
    try:
        config = json.loads(read_file(path, _MAX_BYTES))
    except FileNotFoundError:
        raise CheckpointError(
            f"{where} {given}: there is no {path.name}; pass the directory of a Hugging Face model"
        ) from None
    except (OSError, ValueError, RecursionError) as problem:
        why = getattr(problem, "strerror", None) or f"is not JSON: {problem}"
        raise CheckpointError(f"{where} {path} cannot be read: {why}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{where} {path}: it names no model_type, so it is not the config.json of a model"
        )
    directory = given if given.is_dir() else given.parent
    whole = step.from_transformers(_nested(cast(dict[str, object], config)))
    return Reference(step.of_decoder(_hub_rope(whole)), where, directory)


_OF_THE_WHOLE = (
    "architectures",
    "model_type",
    "tie_word_embeddings",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "auto_map",
    "quantization_config",
)
_OF_SEEING = re.compile(r"vision_config|(?:image|video|vision)(?:_start|_end)?_token_id")


def _nested(config: dict[str, object]) -> dict[str, object]:
    """`config` with text_config, where a model that sees has its language model's keys beside
    vision_config (the hub's Qwen2.5-VL)."""
    if VISION not in config or TEXT in config or "hidden_size" not in config:
        return config
    whole = {
        name: value
        for name, value in config.items()
        if name in _OF_THE_WHOLE or _OF_SEEING.fullmatch(name)
    }
    return {**whole, TEXT: {name: v for name, v in config.items() if name not in whole}}


def own_code(reference: Reference) -> tuple[dict[str, bytes], list[str]]:
    """(the files of Python beside the reference that its auto_map names, remarks on what is not
    there). They are served as they are; nothing here runs them."""
    named = reference.config.get("auto_map")
    if not isinstance(named, dict) or reference.directory is None:
        return {}, [
            "transformers has no code of its own for this model, and no reference names any: pass "
            "--hf-config with the directory of the model it was trained from"
        ]
    modules = {m[1] for value in _texts(named) if (m := _MODULE.fullmatch(value))}
    files = {f"{module}.py": reference.beside(f"{module}.py") for module in sorted(modules)}
    missing = [name for name, data in files.items() if data is None]
    remarks = [f"auto_map names {name}, which is not beside {reference.where}" for name in missing]
    return {name: data for name, data in files.items() if data is not None}, remarks


_MODULE = re.compile(r"(\w+)\.\w+")
"""Of code beside the config: that of another repository has its name and -- before it."""


def _texts(named: Mapping[object, object]) -> Iterator[str]:
    for value in named.values():
        yield from (
            one
            for one in (value if isinstance(value, list | tuple) else [value])
            if isinstance(one, str)
        )


def _with_mrope(config: dict[str, object]) -> dict[str, object]:
    """`config` with mrope_section by itself: it divides the rotated elements among the three
    positions of an image, and is no scaling."""
    for name in ("rope_parameters", "rope_scaling"):
        described = config.get(name)
        if isinstance(described, dict) and "mrope_section" in described:
            rest = {k: v for k, v in described.items() if not k.startswith("mrope_")}
            for kind in ("type", "rope_type"):
                if rest.get(kind) == "mrope":  # what the first that had it called it
                    rest[kind] = "default"
            config = {**config, name: rest, "mrope_section": described["mrope_section"]}
    return config


_BESIDE = ("rope_theta", "partial_rotary_factor")
"""What the hub has beside rope_scaling."""


def _hub_rope(config: dict[str, object]) -> dict[str, object]:
    """`config` with rope_theta, rope_scaling and partial_rotary_factor where it has transformers
    5's rope_parameters."""
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and isinstance(parameters.get("full_attention"), dict):
        local = parameters.get("sliding_attention")
        config = {**config, "rope_parameters": parameters["full_attention"]}
        if isinstance(local, dict) and "rope_theta" in local:
            config["rope_local_base_freq"] = local["rope_theta"]
        return _hub_rope(config)
    scaling = config.get("rope_scaling") or parameters
    if not isinstance(scaling, dict) or any(isinstance(v, dict) for v in scaling.values()):
        return config
    rest = {name: value for name, value in scaling.items() if name not in (*_BESIDE, "type")}
    rest.setdefault("rope_type", scaling.get("type", "default"))
    found = {k: v for k, v in config.items() if k != "rope_parameters"}
    found["rope_scaling"] = None if rest["rope_type"] == "default" else rest
    for described in (parameters, scaling):
        if isinstance(described, dict):
            found |= {name: described[name] for name in _BESIDE if name in described}
    return found
