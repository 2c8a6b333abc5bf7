"""config.json and generation_config.json, from the facts of a checkpoint and a reference.

config = what the reference says <- what the checkpoint proves. Where both speak of something that
changes what the model computes and they differ, that is a problem that names both values. Keys are
written in the hub's style, which transformers 4 and 5, vLLM and SGLang all read; rope also as
`rope_parameters`, the only place where some readers of transformers 5 configs look.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mcorefs.mapping.family import LEFT_OUT, REQUIRED, Facts, Family, Key, Proven, Soft
from mcorefs.mapping.reference import TEXT, Reference

NOT_COPIED = ("auto_map", "quantization_config", "transformers_version", "_name_or_path")
"""Reference keys that do not describe the bytes served here."""

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def synthesise(
    family: Family,
    facts: Facts,
    reference: Reference,
    token_ids: Mapping[str, object],
    dtype: str,
) -> tuple[dict[str, object], list[str], list[str]]:
    """(config.json, remarks on what was assumed or overruled, problems)."""
    config, settled = _settled(family.config, facts, reference)
    config["architectures"], config["model_type"] = [family.architecture], family.name
    if family.has_own_code and "auto_map" in reference.config:
        config["auto_map"] = reference.config["auto_map"]
    config["torch_dtype"] = config["dtype"] = dtype
    speaks = config
    for name, section in family.sections.items():
        stated = replace(reference, config=reference.section(name))
        inner, found = _settled(section.keys, facts, stated)
        inner["model_type"], inner["torch_dtype"] = section.model_type, dtype
        inner["dtype"] = dtype
        config[name] = inner
        settled |= {f"{name}.{key}": one for key, one in found.items()}
        speaks = inner if name == TEXT else speaks
    for name in TOKEN_IDS:
        if speaks.get(name) is None:  # left out, it would be the class's default, some other token
            speaks[name] = token_ids.get(name)
    remarks = [f"{name} {found.remark}" for name, found in settled.items() if found.remark]
    assumed = [
        f"{name}={_show(found.value)}" for name, found in settled.items() if found.is_assumed
    ]
    if assumed:
        remarks.append(
            "assumed, since neither the checkpoint nor --hf-config says: " + ", ".join(assumed)
        )
    problems = [f"{name} {found.problem}" for name, found in settled.items() if found.problem]
    return config, remarks, problems


def _settled(
    keys: Mapping[str, Key], facts: Facts, reference: Reference
) -> tuple[dict[str, object], dict[str, _Settled]]:
    """(a config of `keys` and what else the reference says, how each of them was found)."""
    config = {name: value for name, value in reference.config.items() if name not in NOT_COPIED}
    settled = {name: _settle(name, key, facts, reference) for name, key in keys.items()}
    for name, found in settled.items():
        for alias in keys[name].aliases:
            config.pop(alias, None)
        if not found.problem and found.value is not LEFT_OUT:
            config[name] = found.value
    _add_rope_parameters(config)
    return config, settled


@dataclass(frozen=True)
class _Settled:
    """What config.json says under one key, and what there is to say about that."""

    value: object
    remark: str = ""
    problem: str = ""
    is_assumed: bool = False


def _settle(name: str, key: Key, facts: Facts, reference: Reference) -> _Settled:
    """The value of one key, from what the checkpoint and the reference say."""
    stated = _stated(reference.config, (name, *key.aliases))
    if stated is not None:
        stated = key.read(stated)
    found = key.value(facts)
    if found is LEFT_OUT:
        return _Settled(LEFT_OUT if stated is None else stated)
    if found is None:
        if stated is not None and key.only and stated not in key.only:
            wanted = " or ".join(map(_show, key.only))
            where = f"{_show(stated)} in {reference.where}"
            problem = f"is {where}, where the model computes with {wanted}"
            return _Settled(stated, problem=problem)
        if stated is not None:
            return _Settled(stated)
        if key.default is REQUIRED:
            return _Settled(None, problem=_unknown(facts))
        return _Settled(key.default, is_assumed=key.default not in (None, LEFT_OUT))
    value = found.value if isinstance(found, Soft | Proven) else found
    if _agree(stated, value):
        return _Settled(value if stated is None else stated)
    ours, theirs = _show(value), _show(stated)
    if isinstance(found, Soft):
        return _Settled(stated, f"is {theirs} as in {reference.where} (training used {ours})")
    if isinstance(found, Proven):
        return _Settled(value, f"is {ours} as in the checkpoint ({reference.where} says {theirs})")
    problem = (
        f"is {ours} in the checkpoint but {theirs} in {reference.where}: this is not the "
        "config of the model that was trained"
    )
    return _Settled(value, problem=problem)


def generation_config(
    config: Mapping[str, object], reference: Reference, token_ids: Mapping[str, object]
) -> bytes:
    """generation_config.json: the reference's own file, else the token ids that are known."""
    if (own := reference.beside("generation_config.json")) is not None:
        return own
    generation: dict[str, object] = {"_from_model_config": True}
    text = config.get(TEXT)
    speaks = text if isinstance(text, dict) else config
    for name in TOKEN_IDS:
        value = speaks.get(name, token_ids.get(name))
        if value is not None:
            generation[name] = value
    return dump(generation)


def dump(value: Mapping[str, object]) -> bytes:
    """JSON as transformers writes it: indented by two, sorted, one newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _stated(reference: Mapping[str, object], names: tuple[str, ...]) -> object | None:
    """What the reference says under any of `names`; null says nothing."""
    return next((v for name in names if (v := reference.get(name)) is not None), None)


def _agree(stated: object | None, value: object) -> bool:
    """Whether a reference does not contradict `value`; numbers to the precision of a float32,
    since args and configs round differently."""
    if stated is None:
        return True
    if isinstance(stated, int | float) and isinstance(value, int | float):
        return bool(stated == value or abs(stated - value) <= 1e-7 * max(abs(stated), abs(value)))
    return stated == value


def _add_rope_parameters(config: dict[str, object]) -> None:
    """The transformers 5 spelling of rope_theta and rope_scaling, beside the hub's."""
    if "rope_theta" not in config or isinstance(config["rope_theta"], list):
        return  # of each layer, which is not said in such words
    scaling = config.get("rope_scaling")
    if (section := config.pop("mrope_section", None)) is not None:
        stated = scaling if isinstance(scaling, dict) else {"rope_type": "default"}
        interleaved = config.pop("mrope_interleaved", None)
        named = {} if interleaved is None else {"mrope_interleaved": interleaved}
        scaling = config["rope_scaling"] = {**stated, "mrope_section": section, **named}
    described = dict(scaling) if isinstance(scaling, dict) else {"rope_type": "default"}
    if (part := config.get("partial_rotary_factor")) is not None:
        described["partial_rotary_factor"] = part
    described["rope_theta"] = config["rope_theta"]
    local: dict[str, object] | None = None
    if "rope_local_base_freq" in config:  # of the layers with a window, which are not scaled
        local = {"rope_type": "default", "rope_theta": config["rope_local_base_freq"]}
    elif "swa_rope_theta" in config:  # likewise, and of as much of each head
        local = {**described, "rope_theta": config["swa_rope_theta"]}
        del config["rope_scaling"]  # null would stand for all of it (rope_scaling.setter)
    if local is not None:
        described = {"full_attention": described, "sliding_attention": local}
    config["rope_parameters"] = described


def _unknown(facts: Facts) -> str:
    why = "the checkpoint records no training arguments" if not facts.args else "no argument says"
    return (
        f"is unknown: {why}, and tensor shapes cannot show it; pass --hf-config with the "
        "directory of the model it was trained from"
    )


def _show(value: object) -> str:
    return json.dumps(value, default=str)
