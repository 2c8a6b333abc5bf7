"""Tokenizers that Megatron uses and transformers does not read: made into Hugging Face's files."""

from __future__ import annotations

import json
from collections.abc import Mapping

from mcorefs.mapping import sentencepiece, tiktoken
from mcorefs.mapping.config import dump
from mcorefs.mapping.sentencepiece import SentencePiece

LLAMA2, SENTENCEPIECE, TIKTOKEN = "Llama2Tokenizer", "SentencePieceTokenizer", "TikTokenizer"
FILES = ("tokenizer.json", "tokenizer_config.json")
_PROBE = "Ein Text: 你好 \n 🌍 e\u0301 ½"


def of_sentencepiece(data: bytes, args: Mapping[str, object]) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json that encode as the model `data` did in training.

    Raises ValueError, saying what it is, if there are none.
    """
    newer = tiktoken.is_newer(args)
    if newer and args.get("tokenizer_sentencepiece_legacy") and _has_special_tokens(args):
        raise ValueError(
            "is a SentencePiece model that was used with special tokens of the run's own "
            "(tokenizer_sentencepiece_legacy), for which no tokenizer.json is"
        )
    model = sentencepiece.parse(data)
    ignores_extra_spaces = args.get("tokenizer_sentencepiece_ignore_extra_whitespaces")
    if model.remove_extra_spaces and ignores_extra_spaces is False:
        raise ValueError(
            "is a SentencePiece model that removes spaces, which the run made it keep "
            "(tokenizer_sentencepiece_ignore_extra_whitespaces), for which no tokenizer.json is"
        )
    kind = None if newer else args.get("tokenizer_type")
    tokens: dict[str, object] = dict(model.special_tokens())
    extra: list[str] = []
    if kind == SENTENCEPIECE:
        extra = _appended(model, args)
        tokens |= {"cls_token": "<CLS>", "sep_token": "<SEP>", "mask_token": "<MASK>"}
        tokens |= {"eos_token": "<EOD>"}  # what ends a document: MegatronTokenizer.eod
        tokens = {"pad_token": "<PAD>", "bos_token": "<BOS>"} | tokens
    adds_bos = kind == LLAMA2 and "bos_token" in tokens
    try:
        tokenizer = sentencepiece.tokenizer_json(model, adds_bos, extra)
    except (KeyboardInterrupt, SystemExit, MemoryError, ValueError):
        raise
    except BaseException as problem:  # what Rust panics with is no Exception
        raise ValueError(f"is a damaged SentencePiece model: {problem}") from None
    return _files(tokenizer, {**tokens, "add_bos_token": adds_bos})


def of_tiktoken(data: bytes, args: Mapping[str, object]) -> dict[str, bytes]:
    """The same of a vocabulary of Megatron's TikTokenizer."""
    tokenizer = tiktoken.tokenizer_json(data, args)
    names = set(tiktoken.special_tokens(args))
    roles = ("unk", "bos", "eos", "mask", "pad", "cls", "sep")
    known = dict(zip(roles, tiktoken.SPECIAL, strict=True))
    tokens = {f"{role}_token": name for role, name in known.items() if name in names}
    return _files(tokenizer, {**tokens, "add_bos_token": False})


def _appended(model: SentencePiece, args: Mapping[str, object]) -> list[str]:
    """What _SentencePieceTokenizer adds behind the pieces, up to megatron-core 0.14
    (Megatron-LM:megatron/training/tokenizer/tokenizer.py)."""
    own = model.special_tokens()
    wanted = ["<CLS>", "<SEP>", "<EOD>", "<MASK>"]
    wanted += [own.get(f"{name}_token", f"<{name.upper()}>") for name in ("pad", "bos", "eos")]
    count = args.get("vocab_extra_ids")
    wanted += [f"<extra_id_{i}>" for i in range(min(count, 1 << 16) if type(count) is int else 0)]
    there = {piece.text for piece in model.pieces}
    return [name for name in wanted if name not in there]


def _has_special_tokens(args: Mapping[str, object]) -> bool:
    return bool(args.get("special_tokens") or args.get("tokenizer_special_tokens"))


def _files(tokenizer: Mapping[str, object], config: Mapping[str, object]) -> dict[str, bytes]:
    """The files, once the library that will read them has read and used them."""
    import tokenizers

    text = json.dumps(tokenizer, ensure_ascii=False)
    try:
        tokenizers.Tokenizer.from_str(text).encode(_PROBE)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as problem:  # what Rust panics with is no Exception
        raise ValueError(f"makes a tokenizer that does not work: {problem}") from None
    common = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return {FILES[0]: text.encode(), FILES[1]: dump({**common, **config})}
