"""Compressed bytes that have a known length, decoded to exactly that length or refused.

What is decoded is a stranger's. No decoder is given more room than the length that is expected, and
none may leave a part of it unwritten: zlib stops where it is told to, and the other formats state
in their first bytes how long they become.

Layout facts: numcodecs:src/numcodecs/lz4.pyx, c-blosc:README_CHUNK_FORMAT.rst, RFC 8878 3.1.1
(zstd's frame header).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

MAX_NBYTES = 64 << 20
"""Most bytes that are decoded at once."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How some bytes are compressed."""

    codec: str
    """As numcodecs calls it."""
    nbytes: int
    """How many bytes they decode to."""


class EncodingError(Exception):
    """The bytes do not decode to the length that they should have."""


def encoding(config: object, nbytes: int) -> tuple[Encoding | None, str | None]:
    """The encoding that `config` of numcodecs stands for, or why it is not read: one is None.

    The reason ends a sentence: "its chunks are compressed ...".
    """
    codec = config.get("id") if isinstance(config, dict) else config
    if not isinstance(codec, str) or codec not in CODECS:
        return None, f"with {codec!r:.80}; read are {', '.join(CODECS)}. Write it uncompressed"
    if nbytes > MAX_NBYTES:
        return None, (
            f"({codec}) and {nbytes} bytes each, all of which are needed to read one of them. "
            f"Write it uncompressed, or in chunks of at most {MAX_NBYTES >> 20} MiB"
        )
    if codec in _STATED and find_spec("numcodecs") is None:
        return None, f"with {codec}, which needs a package: pip install numcodecs"
    return Encoding(codec, nbytes), None


def decode(encoded: bytes, how: Encoding) -> bytes | bytearray:
    """The bytes that `encoded` stands for. Raises EncodingError if they are not `how.nbytes`."""
    try:
        if how.codec in _WINDOW_BITS:
            return _inflated(encoded, how)
        stated = _STATED[how.codec](encoded)
        if stated != how.nbytes:
            raise EncodingError(f"it should state {how.nbytes} bytes but states {stated}")
        from numcodecs.registry import get_codec

        out = bytearray(how.nbytes)
        get_codec({"id": how.codec}).decode(encoded, out)
    except EncodingError:
        raise
    except Exception as problem:  # each codec has its own
        raise EncodingError(f"{type(problem).__name__}: {problem!s:.200}") from None
    return out


def _inflated(encoded: bytes, how: Encoding) -> bytes:
    decoder = zlib.decompressobj(_WINDOW_BITS[how.codec])
    out = decoder.decompress(encoded, how.nbytes + 1)
    if len(out) != how.nbytes or not decoder.eof:
        raise EncodingError(f"it is not a whole stream of {how.nbytes} bytes")
    return out


def _blosc(encoded: bytes) -> int | None:
    if len(encoded) < 16 or int.from_bytes(encoded[12:16], "little") != len(encoded):
        return None
    return int.from_bytes(encoded[4:8], "little")


def _lz4(encoded: bytes) -> int | None:
    return int.from_bytes(encoded[:4], "little")


def _zstd(encoded: bytes) -> int | None:
    if encoded[:4] != b"\x28\xb5\x2f\xfd" or len(encoded) < 5:
        return None
    flags = encoded[4]
    is_single_segment = bool(flags & 0x20)
    width = (1 if is_single_segment else 0, 2, 4, 8)[flags >> 6]
    at = 5 + (not is_single_segment) + (0, 1, 2, 4)[flags & 3]
    stated = int.from_bytes(encoded[at : at + width], "little") + (256 if width == 2 else 0)
    return stated if width else None


_WINDOW_BITS: Mapping[str, int] = {"gzip": 31, "zlib": 15}
_STATED: Mapping[str, Callable[[bytes], int | None]] = {
    "blosc": _blosc,
    "lz4": _lz4,
    "zstd": _zstd,
}
"""How many bytes the encoded ones say that they become; None where they do not say."""
CODECS = tuple(sorted((*_WINDOW_BITS, *_STATED)))
