"""YAML as plain data: whatever its tags ask to be constructed, only dicts, lists and scalars are.

Megatron-Bridge and NeMo write configs whose `_target_` (hydra, fiddle) names what to call; here
that is a word like any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mcorefs.errors import CheckpointError

if TYPE_CHECKING:
    import yaml

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
"""Values after aliases are followed: a few lines of YAML can mean billions."""
_MAX_DEPTH = 64


def read_yaml(path: Path) -> dict[str, object]:
    """The mapping in the YAML file at `path`.

    A function, dtype or class is its dotted name; an enum member is its value. Raises
    CheckpointError if it cannot be read, is no mapping, or means more than MAX_NODES values.
    """
    import yaml

    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
        found = _plain(yaml.load(data, _loader()), [MAX_NODES], 0)
    except Exception as problem:  # any bytes at all may come in
        why = getattr(problem, "strerror", None) or " ".join(str(problem).split())
        raise CheckpointError(f"{path} cannot be read: {why:.200}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no mapping")
    return found


def _loader() -> type[yaml.SafeLoader]:
    import yaml

    class PlainLoader(yaml.SafeLoader):
        """Takes no notice of tags that it does not know."""

    def plain(loader: yaml.SafeLoader, node: yaml.Node) -> object:
        if isinstance(node, yaml.MappingNode):
            return loader.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return loader.construct_sequence(node, deep=True)
        assert isinstance(node, yaml.ScalarNode)
        return loader.construct_scalar(node)

    PlainLoader.add_constructor(None, plain)
    return PlainLoader


def _plain(value: object, left: list[int], depth: int) -> object:
    left[0] -= 1
    if left[0] < 0 or depth > _MAX_DEPTH:
        raise ValueError("it is nested too deeply or means too many values")
    if isinstance(value, dict):
        found = {str(key): _plain(item, left, depth + 1) for key, item in value.items()}
        return _named(found)
    if isinstance(value, list | tuple | set):
        return [_plain(item, left, depth + 1) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _named(value: dict[str, object]) -> object:
    """A mapping that stands for a function, a dtype or an enum member, as what it stands for
    (Megatron-LM:megatron/training/config/yaml_utils.py)."""
    target, arguments = value.get("_target_"), value.get("_args_")
    if "_name_" in value and isinstance(arguments, list) and len(arguments) == 1:
        return arguments[0]
    if value.get("_call_") is False and isinstance(target, str):
        return target
    return value
