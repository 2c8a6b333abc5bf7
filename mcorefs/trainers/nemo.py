"""NeMo 2: `context/` beside `weights/` says how the model was built.

    <name>/weights/                 the shards; adapter_metadata.json if they are only an adapter
    <name>/context/model.yaml       config: {_target_: ...Qwen3Config600M, num_layers: ..., ...},
                                    tokenizer: {pretrained_model_name: ..., ...}
    <name>/context/io.json          the same and the trainer, as a graph of fiddle's
    <name>/context/nemo_tokenizer/  the tokenizer, as Hugging Face files; or a SentencePiece model

Files in `context/` with uuids for names are pickles made to be run: they are left alone. From
io.json only the names of classes are taken, where there is no model.yaml. Layout facts:
NeMo:nemo/lightning/io/mixin.py io_dump, io/registry.py, io/pl.py ckpt_to_weights_subdir.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from mcorefs.errors import CheckpointError
from mcorefs.formats import Checkpoint
from mcorefs.lightning import CONTEXT, WEIGHTS
from mcorefs.locate import Location
from mcorefs.steps import read_json
from mcorefs.storage import is_file_name
from mcorefs.trainers.base import Companions, LoraTraining
from mcorefs.trainers.class_names import model_type
from mcorefs.trainers.hub import local_copies
from mcorefs.trainers.plain_yaml import read_yaml
from mcorefs.trainers.transformer_config import arguments

MODEL, GRAPH, ADAPTER = "model.yaml", "io.json", "adapter_metadata.json"
_PREFIX = "module."


class NeMo:
    """Known by its `context/`, or by the names of its tensors where that was not saved."""

    name = "NeMo 2"

    def read(self, location: Location, checkpoint: Checkpoint) -> Companions | None:
        context = _context(location.path)
        if context is None:
            return self._without_context(location, checkpoint)
        path = context / MODEL
        model = read_yaml(path) if path.is_file() else {}
        source = str(path) if model else f"there is no {path}"
        named = _tokenizer_name(model.get("tokenizer"))
        args = _arguments(model)
        if named is not None and not is_file_name(named):  # a path there, or a hub's name
            args |= {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": named}
        kind = model_type(_config(model).get("_target_"))
        return Companions(
            self.name,
            {**args, **checkpoint.args},
            checkpoint.args_source if checkpoint.args else source,
            model_type=kind if model else _told_by_graph(context / GRAPH),
            tokenizers=tuple(_tokenizers(context, named)),
            lora=_lora(location.path),
        )

    def _without_context(self, location: Location, checkpoint: Checkpoint) -> Companions | None:
        is_nemo = all(name.startswith(_PREFIX) for name in checkpoint.tensors)
        if checkpoint.args or location.path.name != WEIGHTS or not is_nemo:
            return None
        why = f"there is no {location.path.with_name(CONTEXT)}"
        remark = (
            f"{why}: NeMo can save it at the end of training only; copy it from the last checkpoint"
        )
        return Companions(self.name, {}, why, remarks=(remark,), lora=_lora(location.path))


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
    for place in (weights.parent / CONTEXT, weights / CONTEXT):
        if (place / MODEL).is_file() or (place / GRAPH).is_file():
            return place
    return None


def _config(model: Mapping[str, object]) -> Mapping[str, object]:
    found = model.get("config")
    return found if isinstance(found, dict) else model


def _arguments(model: Mapping[str, object]) -> dict[str, object]:
    config = dict(_config(model))
    if config.get("vocab_size") is not None:
        config["should_pad_vocab"] = False  # where it is left to the tokenizer, rows are added
    return arguments(config)


def _tokenizer_name(tokenizer: object) -> str | None:
    """A file or directory in `context/`, or, inside a DirOrStringArtifact, a hub's name."""
    fields = tokenizer if isinstance(tokenizer, dict) else {}
    for key in ("pretrained_model_name", "model_path"):
        named = fields.get(key)
        if isinstance(named, dict):
            named = named.get("attr")
        if isinstance(named, str) and named:
            return named
    return None


def _tokenizers(context: Path, named: str | None) -> Iterator[Path]:
    if named is not None and is_file_name(named):
        yield context / named
    yield from (context / "nemo_tokenizer", context / "tokenizer", context)
    yield from sorted(context.glob("*.model"))
    yield from local_copies([] if named is None else [named])


def _told_by_graph(path: Path) -> str | None:
    """The family that the class of the model's config is for: the only one that is named."""
    try:
        graph = read_json(path)
    except CheckpointError:
        return None
    objects = graph.get("objects") if graph is not None else None
    found = {model_type(name) for name in _class_names(objects)} - {None}
    return found.pop() if len(found) == 1 else None


def _class_names(objects: object) -> Iterator[str]:
    """fiddle's Config of a class has its metadata in an object of its own, which names it."""
    for each in objects.values() if isinstance(objects, dict) else ():
        items = each.get("items") if isinstance(each, dict) else None
        for item in items if isinstance(items, list) else ():
            value = item[1] if isinstance(item, list) and len(item) == 2 else None
            if isinstance(value, dict) and value.get("type") == "pyref":
                yield str(value.get("name"))
