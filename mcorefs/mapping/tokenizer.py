"""The tokenizer files: found, served byte for byte, and loudly missing where there are none.

With a config.json alone, transformers 5 builds an empty tokenizer for some models, which encodes
every text to nothing, and blames a missing library for others. So where no tokenizer is found the
tree says so, and carries a tokenizer.json that makes loading one fail with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mcorefs.errors import CheckpointError
from mcorefs.mapping.config import dump

MISSING_FILE = "TOKENIZER_MISSING.txt"

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""A directory that holds one of these holds a tokenizer."""

COMPANIONS = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tiktoken.model",
    "preprocessor_config.json",
    "processor_config.json",
)
FOLDERS = ("additional_chat_templates",)


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer files of a model by name; none found: `files` explain, `found` is False."""

    files: Mapping[str, bytes]
    source: str
    """Where they came from, or where they were looked for."""
    found: bool
    token_ids: Mapping[str, object]
    """bos_token_id, eos_token_id and pad_token_id as far as the files say."""


def find(
    given: Path | None,
    checkpoint: Path,
    reference: Path | None,
    args: Mapping[str, object],
) -> Tokenizer:
    """The tokenizer files, looked for in this order: `given` (--tokenizer), the checkpoint tree,
    `reference` (--hf-config), the paths named in the training arguments if they exist here.

    Raises CheckpointError where `given` holds none.
    """
    if given is not None:
        if files := _collect(given):
            return _found(files, str(given))
        raise CheckpointError(
            f"--tokenizer {given}: no tokenizer there; expected one of {', '.join(VOCABULARIES)}"
        )
    looked: list[str] = []
    for place in _places(checkpoint, reference, args):
        if str(place) in looked:
            continue
        looked.append(str(place))
        if files := _collect(place):
            return _found(files, str(place))
    gpt2 = _vocab_and_merges(args)
    if gpt2:
        return _found(gpt2, str(args.get("vocab_file")))
    return _missing(looked, args)


def _places(checkpoint: Path, reference: Path | None, args: Mapping[str, object]) -> Iterator[Path]:
    root = checkpoint.parent
    for place in (checkpoint, root):
        yield place
        yield place / "tokenizer"
    if reference is not None:
        yield reference if reference.is_dir() else reference.parent
    named = args.get("tokenizer_model")
    if isinstance(named, str) and named:
        yield Path(named)


def _collect(place: Path) -> dict[str, bytes]:
    """The tokenizer files in directory `place`, or of the file `place` and those beside it."""
    directory = place.parent if place.is_file() else place
    if (directory / MISSING_FILE).exists():  # written by mcorefs: the tokenizer.json is a refusal
        return {}
    names = [name for name in COMPANIONS if (directory / name).is_file()]
    if place.is_file():
        names = [place.name, *(name for name in names if name != place.name)]
        if place.suffix not in (".json", ".model", ".txt"):
            return {}
    elif not any(name in VOCABULARIES for name in names):
        return {}
    files = {name: (directory / name).read_bytes() for name in names}
    for folder in FOLDERS:
        for file in sorted((directory / folder).glob("*.jinja")):
            files[f"{folder}/{file.name}"] = file.read_bytes()
    return files


def _vocab_and_merges(args: Mapping[str, object]) -> dict[str, bytes]:
    """GPT2BPETokenizer names its two files one by one (Megatron-LM --vocab-file, --merge-file)."""
    vocab, merges = args.get("vocab_file"), args.get("merge_file")
    if isinstance(vocab, str) and isinstance(merges, str):
        pair = Path(vocab), Path(merges)
        if all(file.is_file() for file in pair):
            config = {"tokenizer_class": "GPT2Tokenizer"}
            return {
                "vocab.json": pair[0].read_bytes(),
                "merges.txt": pair[1].read_bytes(),
                "tokenizer_config.json": dump(config),
            }
    return {}


def _found(files: Mapping[str, bytes], source: str) -> Tokenizer:
    return Tokenizer(files, source, True, _token_ids(files))


def _token_ids(files: Mapping[str, bytes]) -> dict[str, object]:
    """Ids of the special tokens that tokenizer_config.json names."""
    config = _json(files.get("tokenizer_config.json"))
    vocabulary: dict[str, object] = {}
    tokenizer = _json(files.get("tokenizer.json"))
    model = tokenizer.get("model")
    if isinstance(model, dict) and isinstance(model.get("vocab"), dict):
        vocabulary.update(model["vocab"])
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            vocabulary[str(token.get("content"))] = token.get("id")
    decoder = config.get("added_tokens_decoder")
    for number, token in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(token, dict) and str(number).isdigit():
            vocabulary.setdefault(str(token.get("content")), int(number))
    ids: dict[str, object] = {}
    for name in ("bos", "eos", "pad"):
        token = config.get(f"{name}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content in vocabulary:
            ids[f"{name}_token_id"] = vocabulary[content]
    return ids


def _json(data: bytes | None) -> dict[str, object]:
    try:
        value = json.loads(data or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _missing(looked: list[str], args: Mapping[str, object]) -> Tokenizer:
    named = args.get("tokenizer_model")
    hint = (
        f"The checkpoint was trained with the tokenizer {named!r} "
        f"({args.get('tokenizer_type') or 'type not recorded'}), which is not on this machine.\n"
        if isinstance(named, str) and named
        else ""
    )
    places = "".join(f"  {place}\n" for place in looked)
    text = (
        "This model has no tokenizer: a Megatron checkpoint does not hold one, and none was found "
        f"in\n{places}{hint}"
        "Weights load and are complete. To read or write text, give the tokenizer of the model "
        "that was trained:\n"
        "  mcorefs mount CKPT MNT --tokenizer DIR     (a directory with tokenizer.json), or\n"
        "  mcorefs mount CKPT MNT --hf-config DIR     (the Hugging Face model it came from)\n"
    )
    return Tokenizer(
        {
            MISSING_FILE: text.encode(),
            "tokenizer.json": dump(_REFUSAL),
            "tokenizer_config.json": dump({"tokenizer_class": "PreTrainedTokenizerFast"}),
        },
        ", ".join(looked),
        False,
        {},
    )


_REFUSAL = {
    "version": f"no tokenizer: read {MISSING_FILE} beside this file",
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}
"""A tokenizer.json that no version of `tokenizers` accepts, and whose refusal quotes the reason:
AutoTokenizer raises "Unknown tokenizer version 'no tokenizer: read ...'"."""
