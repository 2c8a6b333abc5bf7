"""config.json and generation_config.json, from the facts of a checkpoint and a reference.

config = what the reference says <- what the checkpoint proves. Where both speak of something that
changes what the model computes and they differ, that is a problem that names both values. Keys are
written in the hub's style, which transformers 4 and 5, vLLM and SGLang all read; rope also as
`rope_parameters`, the only place where some readers of transformers 5 configs look.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from mcorefs.errors import CheckpointError
from mcorefs.mapping.family import REQUIRED, Facts, Family, Soft

NOT_COPIED = ("quantization_config", "transformers_version", "_name_or_path")
"""Reference keys that do not describe the bytes served here."""

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_reference(directory: Path | None) -> Mapping[str, object]:
    """config.json of the `--hf-config` directory (or the file itself); empty without one."""
    if directory is None:
        return {}
    path = directory if directory.is_file() else directory / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"--hf-config {directory}: there is no config.json; pass the directory of a Hugging "
            "Face model"
        ) from None
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"--hf-config {path} cannot be read: {problem}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"--hf-config {path}: expected a JSON object")
    return cast(Mapping[str, object], config)


def synthesise(
    family: Family,
    facts: Facts,
    reference: Mapping[str, object],
    token_ids: Mapping[str, object],
    dtype: str,
) -> tuple[dict[str, object], list[str], list[str]]:
    """(config.json, remarks on what was assumed or overruled, problems)."""
    config: dict[str, object] = {"architectures": [family.architecture]}
    config.update({k: v for k, v in reference.items() if k not in NOT_COPIED})
    config["architectures"], config["model_type"] = [family.architecture], family.name
    assumed: list[str] = []
    remarks: list[str] = []
    problems: list[str] = []
    for name, key in family.config.items():
        stated = _stated(reference, (name, *key.aliases))
        found = key.value(facts)
        if isinstance(found, Soft):
            # The rows served were counted already: a reference cannot overrule vocab_size.
            overruled = _ABSENT if name == "vocab_size" else stated
            config[name], said = _soft(name, found.value, overruled)
            remarks += said
        elif found is not None:
            config[name] = found
            problems += _contradiction(name, found, stated)
        elif stated is not _ABSENT:
            config[name] = stated
        elif key.default is REQUIRED:
            problems.append(_unknown(name, facts))
        else:
            config[name] = key.default
            assumed += [] if key.default is None else [f"{name}={_show(key.default)}"]
    _add_rope_parameters(config)
    config["torch_dtype"] = config["dtype"] = dtype
    for name in TOKEN_IDS:
        if config.get(name) is None and token_ids.get(name) is not None:
            config[name] = token_ids[name]
    if assumed:
        remarks.append(
            "assumed, since neither the checkpoint nor --hf-config says: " + ", ".join(assumed)
        )
    return config, remarks, problems


def generation_config(
    config: Mapping[str, object], directory: Path | None, token_ids: Mapping[str, object]
) -> bytes:
    """generation_config.json: the reference's own file, else the token ids that are known."""
    if directory is not None and (file := directory / "generation_config.json").is_file():
        return file.read_bytes()
    generation: dict[str, object] = {"_from_model_config": True}
    for name in TOKEN_IDS:
        value = config.get(name, token_ids.get(name))
        if value is not None:
            generation[name] = value
    return dump(generation)


def dump(value: Mapping[str, object]) -> bytes:
    """JSON as transformers writes it: indented by two, sorted, one newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


_ABSENT = object()


def _stated(reference: Mapping[str, object], names: tuple[str, ...]) -> object:
    """What the reference says under any of `names`."""
    for name in names:
        outer, _, inner = name.partition(".")
        value = reference.get(outer, _ABSENT)
        if inner:
            value = value.get(inner, _ABSENT) if isinstance(value, dict) else _ABSENT
        if value is not _ABSENT:
            return value
    return _ABSENT


def _same(stated: object, value: object) -> bool:
    """Equal, numbers to the precision of a float32: args and configs round differently."""
    if isinstance(stated, int | float) and isinstance(value, int | float):
        return bool(stated == value or abs(stated - value) <= 1e-7 * max(abs(stated), abs(value)))
    return stated == value


def _add_rope_parameters(config: dict[str, object]) -> None:
    """The transformers 5 spelling of rope_theta and rope_scaling, beside the hub's."""
    if "rope_theta" not in config:
        return
    scaling = config.get("rope_scaling")
    described = dict(scaling) if isinstance(scaling, dict) else {"rope_type": "default"}
    config["rope_parameters"] = {**described, "rope_theta": config["rope_theta"]}


def _soft(name: str, value: object, stated: object) -> tuple[object, list[str]]:
    """(what config.json says, remarks) for a key on which a reference has the last word."""
    if stated is _ABSENT:
        return value, []
    if value is None or _same(stated, value):
        return stated, []
    remark = f"{name} is {_show(stated)} as in --hf-config (training used {_show(value)})"
    return stated, [remark]


def _contradiction(name: str, value: object, stated: object) -> list[str]:
    if stated is _ABSENT or _same(stated, value):
        return []
    return [
        f"{name} is {_show(value)} in the checkpoint but {_show(stated)} in --hf-config: "
        "this is not the config of the model that was trained"
    ]


def _unknown(name: str, facts: Facts) -> str:
    why = "the checkpoint records no training arguments" if not facts.args else "no argument says"
    return (
        f"{name} is unknown: {why}, and tensor shapes cannot show it; pass --hf-config with the "
        "directory of the model it was trained from"
    )


def _show(value: object) -> str:
    return json.dumps(value, default=str)
