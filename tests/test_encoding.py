"""Compressed bytes come out whole, or not at all, and never larger than they should."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from numcodecs import LZ4, Blosc, Zstd

from mcorefs.encoding import CODECS, MAX_NBYTES, Encoding, EncodingError, decode, encoding

DATA = bytes(range(256)) * 40
ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "blosc": Blosc("zstd", 5, Blosc.SHUFFLE).encode,
    "gzip": gzip.compress,
    "lz4": LZ4().encode,
    "zlib": zlib.compress,
    "zstd": Zstd(3).encode,
}


def test_every_codec_is_tested() -> None:
    assert tuple(ENCODERS) == CODECS


@pytest.mark.parametrize("codec", ENCODERS)
@pytest.mark.parametrize("length", [1, 255, 256, 300, 10_240, 70_000])
def test_decoding(codec: str, length: int) -> None:
    data = (DATA * 7)[:length]
    encoded = bytes(ENCODERS[codec](data))
    assert bytes(decode(encoded, Encoding(codec, length))) == data
    for other in (length - 1, length + 1):
        with pytest.raises(EncodingError):
            decode(encoded, Encoding(codec, other))


@pytest.mark.parametrize("codec", ENCODERS)
def test_decoding_what_is_cut_short(codec: str) -> None:
    encoded = bytes(ENCODERS[codec](DATA))
    for length in (*range(20), len(encoded) // 2, len(encoded) - 1):
        with pytest.raises(EncodingError):
            decode(encoded[:length], Encoding(codec, len(DATA)))


@pytest.mark.parametrize("codec", ENCODERS)
def test_a_bomb_gets_no_more_than_a_chunk(codec: str) -> None:
    encoded = bytes(ENCODERS[codec](bytes(1 << 28)))
    tracemalloc.start()
    with pytest.raises(EncodingError):
        decode(encoded, Encoding(codec, 1000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_zstd_that_does_not_say_how_long_it_becomes() -> None:
    with pytest.raises(EncodingError, match="states None"):
        decode(b"\x28\xb5\x2f\xfd\x00\x58\x01\x00\x00", Encoding("zstd", 4))


def test_without_numcodecs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcorefs.encoding.find_spec", lambda name: None)
    assert encoding({"id": "gzip"}, 10) == (Encoding("gzip", 10), None)
    found, why = encoding({"id": "zstd"}, 10)
    assert found is None
    assert why is not None
    assert "pip install numcodecs" in why


@pytest.mark.parametrize("config", [None, 7, "zlib9", {}, {"id": ["zlib"]}, {"id": "pickle"}])
def test_what_is_no_codec(config: object) -> None:
    found, why = encoding(config, 10)
    assert found is None
    assert why is not None
    assert "read are blosc, gzip, lz4, zlib, zstd" in why


def test_what_is_too_large_to_decode() -> None:
    assert encoding({"id": "zlib"}, MAX_NBYTES) == (Encoding("zlib", MAX_NBYTES), None)
    found, why = encoding({"id": "zlib"}, MAX_NBYTES + 1)
    assert found is None
    assert why is not None
    assert "in chunks of at most 64 MiB" in why
