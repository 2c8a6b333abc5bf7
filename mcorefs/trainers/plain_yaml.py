"""YAML as plain data: whatever its tags ask to be constructed, only dicts, lists and scalars are.

Megatron-Bridge and NeMo write configs whose `_target_` (hydra, fiddle) names what to call; here
that is a word like any other.
"""

from __future__ import annotations

from pathlib import Path

from mcorefs.errors import CheckpointError

MAX_BYTES = 1 << 20


def read_yaml(path: Path) -> dict[str, object]:
    """The mapping in the YAML file at `path`.

    A function, dtype or class is its dotted name; an enum member is its value. Raises
    CheckpointError if it cannot be read, is no mapping, or means too many values.
    """
    from mcorefs.trainers.plain_loader import PlainLoader

    try:
        if not path.is_file():  # opening a FIFO would wait for its writer
            raise FileNotFoundError(2, "No such file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
        loader = PlainLoader(data)
        try:
            found = _plain(loader.get_single_data())
        finally:
            loader.dispose()
    except Exception as problem:  # any bytes at all may come in
        why = getattr(problem, "strerror", None) or " ".join(str(problem).split())
        raise CheckpointError(f"{path} cannot be read: {why:.200}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no mapping")
    return found


def _plain(value: object) -> object:
    """`value` with text for every key and for every scalar that JSON does not have."""
    if isinstance(value, dict):
        return _named({str(key): _plain(item) for key, item in value.items()})
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _named(value: dict[str, object]) -> object:
    """A mapping that stands for a function, a dtype or an enum member, as what it stands for
    (Megatron-LM:megatron/training/config/yaml_utils.py)."""
    target, arguments, called = (value.get(key) for key in ("_target_", "_args_", "_call_"))
    if called is False and isinstance(target, str):
        return target
    is_enum = called is True and value.keys() <= {"_target_", "_args_", "_call_", "_name_"}
    if is_enum and isinstance(arguments, list) and len(arguments) == 1:
        return arguments[0]
    return value
