"""The vocabulary of Megatron's TikTokenizer as a tokenizer.json that gives the same ids.

It is a JSON list of {"rank", "token_bytes", "token_str"}; ids are ranks behind the special tokens
(Megatron-LM:megatron/core/tokenizers/text/libraries/tiktoken_tokenizer.py, and
megatron/training/tokenizer/tokenizer.py up to megatron-core 0.14).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping

from mcorefs.mapping.sentencepiece import MAX_LETTERS, added_token, merges

SPECIAL = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
OLD_SPECIAL = SPECIAL[:3]
DEFAULT_SPECIAL, DEFAULT_SIZE = 1000, 1 << 17
PATTERNS = {
    "v1": (r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"),
    "v2": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_OLD_ARGUMENTS = ("tiktoken_special_tokens",)
_ARGUMENTS = ("tokenizer_special_tokens", "special_tokens", *_OLD_ARGUMENTS)


def is_newer(args: Mapping[str, object]) -> bool:
    """Whether the run used the tokenizers of megatron-core, which came with 0.15."""
    if "legacy_tokenizer" in args:  # 0.15 and 0.16 had both
        return not args["legacy_tokenizer"]
    return "tokenizer_sentencepiece_legacy" in args


def is_vocabulary(data: bytes | None) -> bool:
    return data is not None and data[:64].lstrip()[:1] == b"["


def special_tokens(args: Mapping[str, object]) -> list[str]:
    """All of them, by id: those with names, then <SPECIAL_7> and so on. Raises ValueError."""
    needed = SPECIAL if is_newer(args) else OLD_SPECIAL
    arguments = _ARGUMENTS if is_newer(args) else _OLD_ARGUMENTS
    given = next((v for name in arguments if (v := args.get(name))), None)
    names = [str(name) for name in given] if isinstance(given, list | tuple) else list(needed)
    count = args.get("tiktoken_num_special_tokens", DEFAULT_SPECIAL)
    if type(count) is not int or not len(names) <= count <= 1 << 20:
        raise ValueError(f"was used with tiktoken_num_special_tokens {count!r}")
    names += [f"<SPECIAL_{number}>" for number in range(len(names), count)]
    if len(set(names)) != len(names) or not set(needed) <= set(names):
        raise ValueError(
            f"was used with special tokens that are not unique, or lack one of {', '.join(needed)}"
        )
    return names


def tokenizer_json(data: bytes, args: Mapping[str, object]) -> dict[str, object]:
    """The tokenizer.json of the vocabulary `data`. Raises ValueError, with words."""
    specials = special_tokens(args)
    size = args.get("vocab_size") or DEFAULT_SIZE
    pattern = args.get("tiktoken_pattern") or "v2"
    if type(size) is not int or size <= len(specials) or pattern not in PATTERNS:
        raise ValueError(
            f"was used with vocab_size {size!r} and tiktoken_pattern {pattern!r}, which do not fit "
            f"{len(specials)} special tokens"
        )
    ranks = _ranks(data, size - len(specials))
    vocab = {name: number for number, name in enumerate(specials)}
    if shared := sorted(vocab.keys() & ranks.keys()):
        raise ValueError(f"has {shared[0]!r} both as a special token and as one of text")
    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERNS[str(pattern)]},
        "behavior": "Isolated",
        "invert": False,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    as_bytes = {**level, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(number, name) for number, name in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, as_bytes]},
        "post_processor": None,
        "decoder": as_bytes,
        "model": {
            "type": "BPE",
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # tiktoken looks a whole word up first
            "vocab": vocab | {token: rank + len(specials) for token, rank in ranks.items()},
            "merges": merges(ranks),
        },
    }


def _ranks(data: bytes, count: int) -> dict[str, int]:
    """Rank of each token in GPT-2's spelling of bytes, of the first `count`."""
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if len(entries) < count:
        raise ValueError(
            f"has {len(entries):,} tokens, but the run used {count:,} of them: it is another one"
        )
    ranks: dict[str, int] = {}
    letters = 0
    for rank, entry in enumerate(entries[:count]):
        coded = entry.get("token_bytes") if isinstance(entry, dict) else None
        if not isinstance(coded, str) or entry.get("rank") != rank:
            raise ValueError(f"is damaged: entry {rank} is no token of rank {rank}")
        try:
            token = base64.b64decode(coded, validate=True)
        except ValueError:
            raise ValueError(f"is damaged: the bytes of token {rank} are not base64") from None
        if not token or (rank < 256 and token != bytes([rank])):
            raise ValueError(f"is damaged: token {rank} is {token!r}")
        letters += len(token)
        ranks["".join(_LETTERS[byte] for byte in token)] = rank
    if len(ranks) != count or letters > MAX_LETTERS:
        raise ValueError(f"has tokens twice, or more than {MAX_LETTERS:,} bytes of them")
    return ranks


def _letters() -> list[str]:
    """GPT-2's letter for each byte: itself where it is printed, else one from 256 on."""
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


_LETTERS = _letters()
