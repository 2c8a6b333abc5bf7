"""The tokenizer files: found, served byte for byte, and loudly missing where there are none.

With a config.json alone, transformers 5 builds an empty tokenizer for some models, which encodes
every text to nothing, and blames a missing library for others. So where no tokenizer is found the
tree says so, and carries a tokenizer.json that makes loading one fail with the reason.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mcorefs.errors import CheckpointError
from mcorefs.formats.huggingface import resolved
from mcorefs.mapping import chat_templates, converted
from mcorefs.mapping.config import dump
from mcorefs.mapping.sentencepiece import is_model
from mcorefs.mapping.tiktoken import is_vocabulary
from mcorefs.storage import read_file

MISSING_FILE = "TOKENIZER_MISSING.txt"

VOCABULARIES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("spiece.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
)
"""A directory that holds the files of one of these holds a tokenizer."""

PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""How images become what the vision model of a model that sees takes in."""
COMPANIONS = (
    *(name for names in VOCABULARIES for name in names),
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tiktoken.model",
    *PROCESSOR,
)
_UNUSABLE = "cannot be used"
TEMPLATES = "additional_chat_templates"
MAX_BYTES = 256 << 20

HUGGING_FACE = frozenset(
    ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
)
"""Beside these a SentencePiece model is part of a tokenizer of Hugging Face's."""

OF_THE_TOKENIZER = ("default", "llama3", "chatml", "nemotron6-moe")
"""Prompt formats of SFTTokenizer and MultimodalTokenizer that use the tokenizer's own template
(Megatron-LM:megatron/core/tokenizers/{text/libraries/sft,vision/libraries/multimodal}_tokenizer.py).
"""

GPT2_CONFIG: Mapping[str, object] = {
    "tokenizer_class": "GPT2Tokenizer",
    **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer files of a model by name; none found: `files` explain, `found` is False."""

    files: Mapping[str, bytes]
    source: str
    """Where they came from, or where they were looked for."""
    found: bool
    token_ids: Mapping[str, object]
    """bos_token_id, eos_token_id and pad_token_id as far as the files say."""
    largest_id: int | None = None
    """The largest token id that the files name."""
    remarks: tuple[str, ...] = ()


def find(
    given: Path | None,
    checkpoint: Path,
    reference: Path | None,
    args: Mapping[str, object],
    beside: Sequence[Path] = (),
) -> Tokenizer:
    """The tokenizer files, looked for in this order: `given` (--tokenizer), the checkpoint tree,
    `reference` (--hf-config), `beside` (what the trainer left), the paths named in the training
    arguments if they exist here.

    Raises CheckpointError where `given` holds none.
    """
    if given is not None:
        found = _open(given, args, is_given=True)
        if isinstance(found, Tokenizer):
            return found
        raise CheckpointError(f"--tokenizer {given}: {found}")
    looked: dict[str, str] = {}
    unusable: list[str] = []
    near = os.path.join(os.path.abspath(str(checkpoint.parent.parent)), "")
    for place in _places(checkpoint, reference, args, beside):
        if str(place) not in looked:
            is_named = reference is not None and place == _directory(reference)
            elsewhere = not os.path.abspath(str(place)).startswith(near)
            found = _open(place, args, is_named=is_named or elsewhere)
            if isinstance(found, Tokenizer):
                return replace(found, remarks=(*unusable, *found.remarks))
            looked[str(place)] = found
            if found.startswith(_UNUSABLE):
                unusable.append(f"the tokenizer in {place} {found}")
    return _vocab_and_merges(args) or _missing(looked, args)


def with_processor(
    found: Tokenizer, places: Sequence[Path], given: Path | None = None
) -> Tokenizer:
    """`found`, of a model that sees: with the files of its processor, where they are beside the
    tokenizer's or in one of `places`; a remark where they are not."""
    if not set(PROCESSOR).isdisjoint(found.files):
        return found
    for place in places:
        names = [name for name in PROCESSOR if (place / name).is_file()]
        if names:
            try:
                files = {name: _read(place / name, place == given) for name in names}
            except OSError as problem:
                raise CheckpointError(f"{place} cannot be read: {problem.strerror}") from None
            return replace(found, files={**found.files, **files})
    looked = "".join(f" or in {place}" for place in dict.fromkeys(places))
    remark = (
        f"no {PROCESSOR[0]} was found beside a tokenizer{looked}: AutoProcessor cannot make pixels "
        "of images; --hf-config DIR says where the model lies that it was trained from"
    )
    return replace(found, remarks=(*found.remarks, remark))


def within(directory: Path) -> Tokenizer:
    """Whether `directory` itself holds a tokenizer, whose files are served from there."""
    try:
        files = _of_directory(directory, follows=True)
    except OSError as problem:
        files = f"cannot be read ({problem.strerror})"
    return Tokenizer({}, str(directory), not isinstance(files, str), {})


def _places(
    checkpoint: Path, reference: Path | None, args: Mapping[str, object], beside: Sequence[Path]
) -> Iterator[Path]:
    """Megatron-LM saves into `tokenizer`, ms-swift beside the iterations, verl into `huggingface`
    beside them."""
    root = checkpoint.parent
    for place in (checkpoint, root):
        yield place
        yield place / "tokenizer"
    yield root / "huggingface"
    if reference is not None:
        yield _directory(reference)
    yield from beside
    named = args.get("tokenizer_model")
    if isinstance(named, str) and named:
        yield Path(named)


def _directory(reference: Path) -> Path:
    return reference if reference.is_dir() else reference.parent


def _open(
    place: Path, args: Mapping[str, object], is_given: bool = False, is_named: bool = False
) -> Tokenizer | str:
    """The tokenizer in directory `place` or of the file `place`, or why there is none. With the
    run's own chat template, unless the tokenizer `is_given` by the user and has one.

    Links out of a directory are followed only where the user named it, or it came with no
    checkpoint: a checkpoint must not make mcorefs show other files of this machine.
    """
    follows = is_given or is_named
    try:
        if place.is_file():
            files = _of_file(place, follows)
        elif place.is_dir():
            files = _of_directory(place, follows)
        else:
            return "does not exist"
    except CheckpointError as problem:
        return f"{_UNUSABLE}: {problem}"
    except OSError as problem:
        return f"cannot be read ({problem.strerror})"
    if isinstance(files, str):
        return files
    is_gpt2 = args.get("tokenizer_type") == "GPT2BPETokenizer" and "merges.txt" in files
    if is_gpt2 and not {"tokenizer.json", "tokenizer_config.json"} & set(files):
        files["tokenizer_config.json"] = dump(GPT2_CONFIG)
    try:
        made = _converted(files, args)
    except ValueError as problem:
        return str(problem)
    found = _tokenizer({**files, **made}, str(place))
    if isinstance(found, str):
        return found
    served = _with_template(found, args, is_given)
    return replace(served, remarks=tuple(_remarks(served, args, bool(made))))


def _with_template(found: Tokenizer, args: Mapping[str, object], keeps_own: bool) -> Tokenizer:
    template = chat_templates.of_run(args)
    config = _json(found.files.get("tokenizer_config.json"))
    if template is None or (keeps_own and chat_templates.has_own(found.files, config)):
        return found
    return replace(found, files={**found.files, chat_templates.NAME: template})


def _converted(files: Mapping[str, bytes], args: Mapping[str, object]) -> Mapping[str, bytes]:
    """Hugging Face's files where there are only Megatron's. Raises ValueError if they make none."""
    is_tiktoken = args.get("tokenizer_type") == converted.TIKTOKEN
    if is_tiktoken and is_vocabulary(files.get("tokenizer.json")):
        return converted.of_tiktoken(files["tokenizer.json"], args)
    model = files.get("tokenizer.model", files.get("spiece.model"))
    if model is None or not HUGGING_FACE.isdisjoint(files):
        return {}
    return converted.of_sentencepiece(model, args)


def _remarks(found: Tokenizer, args: Mapping[str, object], is_converted: bool) -> Iterator[str]:
    """What a user of this tokenizer should know of the one that was trained with."""
    if is_converted:
        config = _json(found.files["tokenizer_config.json"])
        bos = f"{config['bos_token']!r}" if config["add_bos_token"] else "nothing"
        yield f"tokenizer.json was made from {found.source}; it puts {bos} before a text"
    kind, prompt = args.get("tokenizer_type"), None
    if kind == "SFTTokenizer":
        prompt = args.get("sft_tokenizer_prompt_format")
    elif kind == "MultimodalTokenizer":
        prompt = args.get("tokenizer_prompt_format")
    template = chat_templates.of_run(args)
    if template is not None and found.files.get(chat_templates.NAME) == template:
        yield f"{chat_templates.NAME} is that of the run: {kind} wrote chats as {prompt!r}"
    elif isinstance(prompt, str) and prompt not in OF_THE_TOKENIZER:
        yield (
            f"{kind} wrote chats by a template of Megatron's own, {prompt!r}; a chat template "
            f"served is that of the tokenizer in {found.source}"
        )


def _of_directory(directory: Path, follows: bool) -> dict[str, bytes] | str:
    if (directory / MISSING_FILE).exists():  # written by mcorefs: its tokenizer.json is a refusal
        return f"is a directory that mcorefs made, without a tokenizer (see its {MISSING_FILE})"
    names = [name for name in COMPANIONS if (directory / name).is_file()]
    if not any(set(names).issuperset(vocabulary) for vocabulary in VOCABULARIES):
        return "holds no " + ", ".join(" with ".join(names) for names in VOCABULARIES)
    files = {name: _read(directory / name, follows) for name in names}
    for file in sorted((directory / TEMPLATES).glob("*.jinja")):
        files[f"{TEMPLATES}/{file.name}"] = _read(file, follows)
    return files


def _of_file(file: Path, follows: bool) -> dict[str, bytes] | str:
    """A file with a usual name and those beside it, or one vocabulary with a name of its own."""
    for names in VOCABULARIES:
        if file.name in names and all((file.parent / name).is_file() for name in names):
            return _of_directory(file.parent, follows)
    if file.suffix == ".json":
        return {"tokenizer.json": _read(file, follows)}
    if file.suffix == ".model":
        data = _read(file, follows)
        return {"tokenizer.model": data} if is_model(data) else "is no SentencePiece model"
    return "is not a tokenizer file"


def _read(file: Path, follows: bool = True) -> bytes:
    """Raises CheckpointError where it is a link that leads elsewhere, and not `follows`."""
    return read_file(file if follows else resolved(file), MAX_BYTES)


def _vocab_and_merges(args: Mapping[str, object]) -> Tokenizer | None:
    """GPT2BPETokenizer names its two files one by one (Megatron-LM --vocab-file, --merge-file).

    The names come from the checkpoint, so what they lead to is served only if it is what it should
    be: a checkpoint must not make mcorefs show other files of this machine.
    """
    vocab, merges = args.get("vocab_file"), args.get("merge_file")
    if not (isinstance(vocab, str) and isinstance(merges, str)):
        return None
    try:
        if not (Path(vocab).is_file() and Path(merges).is_file()):
            return None
        files = {"vocab.json": _read(Path(vocab)), "merges.txt": _read(Path(merges))}
    except OSError:
        return None
    if not _belong_together(_json(files["vocab.json"]), files["merges.txt"]):
        return None
    found = _tokenizer({**files, "tokenizer_config.json": dump(GPT2_CONFIG)}, vocab)
    return found if isinstance(found, Tokenizer) else None


def _belong_together(vocab: Mapping[str, object], merges: bytes) -> bool:
    """Whether these are a BPE vocabulary and its merges, each of which makes a token of it."""
    if not vocab or any(type(number) is not int for number in vocab.values()):
        return False
    lines = merges.decode(errors="replace").split("\n")
    pairs = [line.rstrip("\r") for line in lines if not line.startswith("#version")]
    return all(pair.count(" ") == 1 and pair.replace(" ", "") in vocab for pair in pairs if pair)


def _tokenizer(files: Mapping[str, bytes], source: str) -> Tokenizer | str:
    """The tokenizer that `files` make, or why they make none."""
    tokenizer = _json(files.get("tokenizer.json"))
    model = tokenizer.get("model")
    if "tokenizer.json" in files and not (isinstance(model, dict) and "vocab" in model):
        return (
            "its tokenizer.json is not one of Hugging Face's (Megatron's TikTokenizer saves its "
            "vocabulary under that name)"
        )
    config = _json(files.get("tokenizer_config.json"))
    vocabulary = _vocabulary(tokenizer, config, _json(files.get("vocab.json")))
    largest = max(vocabulary.values(), default=None)
    specials = _json(files.get("special_tokens_map.json"))
    return Tokenizer(files, source, True, _token_ids(config, specials, vocabulary), largest)


def _vocabulary(
    tokenizer: Mapping[str, object], config: Mapping[str, object], vocab: Mapping[str, object]
) -> dict[str, int]:
    """Token -> id, from tokenizer.json, tokenizer_config.json and vocab.json."""
    found: dict[str, object] = dict(vocab)
    model = tokenizer.get("model")
    if isinstance(model, dict):
        pieces = model.get("vocab")
        if isinstance(pieces, dict):
            found.update(pieces)
        elif isinstance(pieces, list):  # Unigram: [[piece, score], ...]
            found.update({str(p[0]): i for i, p in enumerate(pieces) if isinstance(p, list) and p})
    decoder = config.get("added_tokens_decoder")
    for number, token in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(token, dict) and str(number).isdecimal():
            found[str(token.get("content"))] = int(number)
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            found[str(token.get("content"))] = token.get("id")
    return {token: number for token, number in found.items() if type(number) is int}


def _token_ids(
    config: Mapping[str, object], specials: Mapping[str, object], vocabulary: Mapping[str, int]
) -> dict[str, object]:
    """Ids of the special tokens that tokenizer_config.json or special_tokens_map.json names."""
    ids: dict[str, object] = {}
    for name in ("bos", "eos", "pad"):
        key = f"{name}_token"
        token = config[key] if key in config else specials.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content in vocabulary:
            ids[f"{key}_id"] = vocabulary[content]
    return ids


def _json(data: bytes | None) -> dict[str, object]:
    try:
        value = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _missing(looked: Mapping[str, str], args: Mapping[str, object]) -> Tokenizer:
    named, kind = args.get("tokenizer_model"), args.get("tokenizer_type")
    hint = ""
    if isinstance(kind, str) and kind.startswith("Null"):
        hint = f"The run used {kind}: its data were token ids, made elsewhere.\n"
    elif isinstance(named, str) and named:
        hint = (
            f"The checkpoint was trained with the tokenizer {named!r} "
            f"({kind or 'type not recorded'}), which is not on this machine.\n"
        )
    places = "".join(f"  {place}: {why}\n" for place, why in looked.items())
    text = (
        "This model has no tokenizer: a Megatron checkpoint does not hold one, and none was found "
        f"in\n{places}{hint}"
        "Weights load and are complete. To read or write text, give the tokenizer of the model "
        "that was trained:\n"
        "  mcorefs mount CKPT MNT --tokenizer DIR     (a directory with tokenizer.json), or\n"
        "  mcorefs mount CKPT MNT --hf-config DIR     (the Hugging Face model it came from)\n"
    )
    files = {
        MISSING_FILE: text.encode(),
        "tokenizer.json": dump(_REFUSAL),
        "tokenizer_config.json": dump({"tokenizer_class": f"NoTokenizer: {_REASON}"}),
    }
    return Tokenizer(files, ", ".join(looked), False, {})


_REASON = f"read {MISSING_FILE} beside this file"
_REFUSAL = {
    "version": f"no tokenizer: {_REASON}",
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}
"""A tokenizer.json that no version of `tokenizers` accepts, and whose refusal quotes the reason:
AutoTokenizer raises "Unknown tokenizer version 'no tokenizer: read ...'". transformers 4 asks for
the class first: "Tokenizer class NoTokenizer: read ... does not exist"."""
