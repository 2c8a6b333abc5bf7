"""A SentencePiece model as a tokenizer.json that gives the same ids for the same text.

transformers 5.23 makes another tokenizer of nearly all of them: it passes over their scores, rules
for white space and normalisation, and its SpmConverter fails for BPE. So the model is read here
(sentencepiece: src/sentencepiece_model.proto) and written in the terms of `tokenizers`, whose
algorithms are the same. What cannot be written in them is refused. As everywhere in Hugging Face,
text that reads like a control symbol ("</s>") is that token; SentencePiece itself spells it out.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
MAX_LETTERS = 4 << 20
"""Of all pieces together: twice those of the largest vocabularies known, of 262,144 pieces."""
MAX_LENGTH = 1000
MAX_MERGES = 4 << 20

_EMPTY = memoryview(b"")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_APART, *_PLACEHOLDERS = map(chr, range(0xFDD0, 0xFDF0))
"""Codes that Unicode keeps for such use; no text has them."""
_EXTENDING = r"\p{M}\x{200c}\x{200d}\x{1f3fb}-\x{1f3ff}\x{ff9e}\x{ff9f}\n"
_TRAINER = {"model_type": 3, "suffix": 24, "byte_fallback": 35, "bos": 46, "eos": 47, "pad": 48}
_NORMALIZER = {"name": 1, "charsmap": 2, "dummy_prefix": 3, "extra_spaces": 4, "escape": 5}


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePiece:
    """What a .model file says, as far as it matters to encoding and decoding."""

    pieces: tuple[Piece, ...]
    is_bpe: bool
    byte_fallback: bool
    charsmap: bytes
    """How characters are normalised: a map made from Unicode's NFKC, or nothing."""
    dummy_prefix: bool
    """A space is put before a text."""
    remove_extra_spaces: bool
    names: Mapping[str, str]
    """Which pieces are bos, eos and pad, as far as there are such."""

    @property
    def unknown(self) -> int:
        return next(i for i, piece in enumerate(self.pieces) if piece.type == UNKNOWN)

    @property
    def symbols(self) -> list[str]:
        """Text that is always one piece: the user-defined symbols."""
        return [piece.text for piece in self.pieces if piece.type == USER_DEFINED]

    def special_tokens(self) -> dict[str, str]:
        """bos_token, eos_token, pad_token and unk_token: those pieces that there are.

        sentencepiece: src/sentencepiece_processor.cc bos_id(): the control symbol of that name.
        """
        control = {piece.text for piece in self.pieces if piece.type == CONTROL}
        found = {f"{name}_token": text for name, text in self.names.items() if text in control}
        return {**found, "unk_token": self.pieces[self.unknown].text}


def is_model(data: bytes) -> bool:
    """Whether this begins as one: with a piece (field 1), which begins with its text (field 1)."""
    return data[:1] == data[2:3] == b"\n"


def parse(data: bytes) -> SentencePiece:
    """Raises ValueError, with words, for what is damaged or not to be expressed."""
    if not is_model(data):
        raise ValueError("is no SentencePiece model")
    pieces: list[Piece] = []
    trainer: dict[int, object] = {}
    normalizer: dict[int, object] = {}
    denormalizer: dict[int, object] = {}
    letters = 0
    for number, value in _fields(memoryview(data)):
        if number == 1:
            pieces.append(_piece(value))
            letters += len(pieces[-1].text)
            if letters > MAX_LETTERS:
                raise ValueError(f"is a SentencePiece model of more than {MAX_LETTERS:,} letters")
        elif number in (2, 3, 5):
            (trainer, normalizer, trainer, denormalizer)[number - 2].update(_fields(_view(value)))
    kind = trainer.get(_TRAINER["model_type"], UNIGRAM)
    if not trainer or not normalizer:
        raise ValueError("is a damaged SentencePiece model: its end is missing")
    charsmap = bytes(_view(normalizer.get(_NORMALIZER["charsmap"], _EMPTY)))
    rule = _text(normalizer.get(_NORMALIZER["name"], _EMPTY))
    unexpressed = {
        "its algorithm is neither BPE nor Unigram": kind not in (UNIGRAM, BPE),
        "it puts spaces behind words": trainer.get(_TRAINER["suffix"]),
        "it does not mark spaces": not normalizer.get(_NORMALIZER["escape"], 1),
        "it changes text when it decodes": len(_view(denormalizer.get(2, _EMPTY))) > 0,
        "it normalises text by rules of its own": charsmap and "nfkc" not in rule,
        "it has unused pieces": any(piece.type == UNUSED for piece in pieces),
        "pieces of equal score compete": kind == BPE and _has_ties(pieces),
    }
    for reason, holds in unexpressed.items():
        if holds:
            raise ValueError(f"is a SentencePiece model for which no tokenizer.json is: {reason}")
    _check(pieces, bool(trainer.get(_TRAINER["byte_fallback"])))
    names = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
    return SentencePiece(
        tuple(pieces),
        kind == BPE,
        bool(trainer.get(_TRAINER["byte_fallback"])),
        charsmap,
        bool(normalizer.get(_NORMALIZER["dummy_prefix"], 1)),
        bool(normalizer.get(_NORMALIZER["extra_spaces"], 1)),
        {k: _text(v) if (v := trainer.get(_TRAINER[k])) else name for k, name in names.items()},
    )


def _check(pieces: Sequence[Piece], byte_fallback: bool) -> None:
    """What the library itself demands of a model (src/model_interface.cc)."""
    damaged = "is a damaged SentencePiece model: "
    if len({piece.text for piece in pieces}) != len(pieces) or any(not p.text for p in pieces):
        raise ValueError(damaged + "pieces are empty or there twice")
    if sum(piece.type == UNKNOWN for piece in pieces) != 1:
        raise ValueError(damaged + "it has not one piece for what is unknown")
    given = {piece.text for piece in pieces if piece.type == BYTE}
    if given != ({f"<0x{byte:02X}>" for byte in range(256)} if byte_fallback else set()):
        raise ValueError(damaged + "its pieces for bytes are not 256")


def _has_ties(pieces: Sequence[Piece]) -> bool:
    """Whether merges of equal score can overlap in a way that `merges` does not put in order: all
    but those of one letter, such as the spaces of Llama 2."""
    scores: dict[float, list[str]] = {}
    for piece in pieces:
        if piece.type == NORMAL and len(piece.text) > 1:
            scores.setdefault(piece.score, []).append(piece.text)
    equal = [texts for texts in scores.values() if len(texts) > 1]
    return any(len(set(text)) > 1 for texts in equal for text in texts)


# -- the file -------------------------------------------------------------------------------------


def _fields(data: memoryview) -> Iterator[tuple[int, object]]:
    """Number and value of each field of a protobuf message: an int, or its bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError("is a damaged SentencePiece model: a field of an unknown kind")
        if at + size > len(data):
            raise ValueError("is a damaged SentencePiece model: it ends within a field")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError("is a damaged SentencePiece model: it ends within a number")


def _piece(value: object) -> Piece:
    said = dict(_fields(_view(value)))
    score = _view(said.get(2, memoryview(bytes(4))))
    kind = said.get(3, NORMAL)
    if len(score) != 4 or not isinstance(kind, int) or not NORMAL <= kind <= BYTE:
        raise ValueError("is a damaged SentencePiece model: a piece without sense")
    (number,) = struct.unpack("<f", score)
    if not -1e30 < number < 1e30:
        raise ValueError("is a damaged SentencePiece model: a score that is no number")
    return Piece(_text(said.get(1, _EMPTY)), number, kind)


def _view(value: object) -> memoryview:
    if not isinstance(value, memoryview):
        raise ValueError("is a damaged SentencePiece model: a number instead of bytes")
    return value


def _text(value: object) -> str:
    try:
        return str(_view(value), "utf-8")
    except UnicodeDecodeError:
        raise ValueError("is a damaged SentencePiece model: text that is not UTF-8") from None


# -- tokenizer.json -------------------------------------------------------------------------------


def tokenizer_json(
    model: SentencePiece, adds_bos: bool, extra: Sequence[str] = ()
) -> dict[str, object]:
    """The tokenizer.json of `model`; `extra` are special tokens numbered after its pieces."""
    symbols = model.symbols
    specials = {i: p.text for i, p in enumerate(model.pieces) if p.type in (CONTROL, UNKNOWN)}
    specials |= dict(enumerate(extra, len(model.pieces)))
    splits = [_split(_any_of(symbols))] if symbols else []
    if model.byte_fallback and (symbols or not model.is_bpe):
        # Text that reads like a piece for a byte is text, and not that byte.
        splits.append(_split("<(?=0x[0-9A-F]{2}>)"))
    bos = model.special_tokens().get("bos_token") if adds_bos else None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(number, text) for number, text in specials.items()],
        "normalizer": {"type": "Sequence", "normalizers": list(_normalizers(model))},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits} if splits else None,
        "post_processor": None if bos is None else _begins_with(bos, _number(model, bos)),
        "decoder": {"type": "Sequence", "decoders": list(_decoders(model))},
        "model": _bpe(model, bool(symbols)) if model.is_bpe else _unigram(model),
    }


def added_token(number: int, text: str) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, "special": True, **flags}


def _number(model: SentencePiece, text: str) -> int:
    return next(i for i, piece in enumerate(model.pieces) if piece.text == text)


def _bpe(model: SentencePiece, has_symbols: bool) -> dict[str, object]:
    vocab = {piece.text: number for number, piece in enumerate(model.pieces)}
    return {
        "type": "BPE",
        "unk_token": model.pieces[model.unknown].text,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        # A symbol is cut out whole; no merges make it.
        "ignore_merges": has_symbols,
        "vocab": vocab,
        "merges": merges({p.text: -p.score for p in model.pieces if p.type == NORMAL}),
    }


def merges(order: Mapping[str, float]) -> list[list[str]]:
    """All pairs that make a token together, those of the token first in `order` first.

    SentencePiece (src/bpe_model.cc) and tiktoken (src/lib.rs) know tokens only, and join the pair
    that makes the best of them, of equals the leftmost. `tokenizers` wants the pairs in one order:
    with the longest left half first, a run of one letter grows from its left, as it does there.
    """
    if max(map(len, order), default=0) > MAX_LENGTH:
        raise ValueError(f"has a token of more than {MAX_LENGTH:,} letters")
    found: list[tuple[float, str, str]] = []
    for token, rank in order.items():
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        found += [(rank, a, b) for a, b in halves if a in order and b in order]
        if len(found) > MAX_MERGES:
            raise ValueError(f"has more than {MAX_MERGES:,} ways to make a token of two")
    found.sort(key=lambda merge: (merge[0], -len(merge[1]), -len(merge[2])))
    return [[a, b] for _, a, b in found]


def _unigram(model: SentencePiece) -> dict[str, object]:
    return {
        "type": "Unigram",
        "unk_id": model.unknown,
        "byte_fallback": model.byte_fallback,
        "vocab": [[piece.text, piece.score] for piece in model.pieces],
    }


def _normalizers(model: SentencePiece) -> Iterator[dict[str, object]]:
    """sentencepiece: src/normalizer.cc Normalize(), but for combining marks that are not in
    Unicode's order, which are put into it, and those on ligatures, which join the last letter."""
    if model.charsmap:
        kept = dict(zip(_kept(model), _PLACEHOLDERS, strict=False))
        yield from (_replace({"String": text}, held) for text, held in kept.items())
        # `tokenizers` looks graphemes shorter than six bytes up whole, and replaces them by what it
        # finds for their beginning. So letters are kept apart, and composed when all are replaced.
        yield _replace({"Regex": rf"(?<=[^{_APART}])(?=[{_EXTENDING}])"}, _APART)
        coded = base64.b64encode(model.charsmap).decode()
        yield {"type": "Precompiled", "precompiled_charsmap": coded}
        yield _replace({"String": _APART}, "")
        yield {"type": "NFC"}
        yield from (_replace({"String": held}, text) for text, held in kept.items())
    if model.remove_extra_spaces:
        yield _replace({"Regex": rf"\A +|[ {SPACE}]+\z"}, "")
        yield _replace({"Regex": " {2,}"}, " ")
    if model.dummy_prefix:
        yield {"type": "Prepend", "prepend": SPACE}
    yield _replace({"String": " "}, SPACE)


def _kept(model: SentencePiece) -> list[str]:
    """The symbols that normalising would change, which it must not; the longest first."""
    import tokenizers

    precompiled = tokenizers.normalizers.Precompiled(model.charsmap)
    normal = tokenizers.normalizers.Sequence([precompiled, tokenizers.normalizers.NFC()])
    symbols = sorted(model.symbols, key=len, reverse=True)
    changed = [text for text in symbols if normal.normalize_str(text) != text]
    if len(changed) > len(_PLACEHOLDERS):
        raise ValueError("is a SentencePiece model with too many symbols that are never normalised")
    return changed


def _decoders(model: SentencePiece) -> Iterator[dict[str, object]]:
    yield _replace({"String": SPACE}, " ")
    if model.byte_fallback:
        yield {"type": "ByteFallback"}
    yield {"type": "Fuse"}
    if model.dummy_prefix or model.remove_extra_spaces:
        spaces = 1 << 16 if model.remove_extra_spaces else 1
        yield {"type": "Strip", "content": " ", "start": spaces, "stop": 0}


def _replace(pattern: Mapping[str, str], content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _split(pattern: str) -> dict[str, object]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _any_of(symbols: Iterable[str]) -> str:
    """The longest of `symbols` that begins where one does."""
    by_first: dict[str, list[str]] = {}
    for symbol in sorted(symbols, key=len, reverse=True):
        by_first.setdefault(symbol[0], []).append(_quoted(symbol[1:]))
    return "|".join(f"{_quoted(first)}(?:{'|'.join(r)})" for first, r in by_first.items())


def _quoted(text: str) -> str:
    return "".join(f"\\x{{{ord(letter):x}}}" for letter in text)


def _begins_with(token: str, number: int) -> dict[str, object]:
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
