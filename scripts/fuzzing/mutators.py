"""Changes that keep what a file is made of whole: opcodes, records, blocks, JSON.

Bytes changed at random seldom come past the first check of a format that has lengths and sums.
"""

from __future__ import annotations

import io
import json
import pickletools
import random
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

Mutate = Callable[[random.Random, bytes], bytes]
"""Another file that is much like the one given, or the same; raises nothing."""

_OPCODES = tuple(
    code.encode("latin-1")
    for code in (
        *("N", "\x88", "\x89", ")", "}", "]", "\x8f", "(", "t", "\x85", "\x86", "\x87", "a", "e"),
        *("s", "u", "b", "R", "\x81", "\x92", "\x93", "Q", "\x94", "\x90", "\x91", "0", "2", "."),
        *("K\0", "K\1", "K\7", "M\xff\xff", "J\xff\xff\xff\xff", "\x8a\x08\0\0\0\0\0\0\0\x80"),
        *("\x8a\0", "G\x7f\xf0\0\0\0\0\0\0", "\x8c\0", "\x8c\1a", "C\0", "h\0", "h\1", "h\5"),
        *("cbuiltins\neval\n", "ctorch\nSize\n", "ccollections\nOrderedDict\n"),
        *("ctorch._utils\n_rebuild_tensor_v2\n", "cargparse\nNamespace\n"),
    )
)


def pickled(rng: random.Random, data: bytes) -> bytes:
    """One to four opcodes taken out, doubled, moved, put in, or given another argument."""
    ops = opcodes(data)
    if len(ops) < 3:
        return data
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(1, len(ops))
        match rng.randrange(6):
            case 0:
                del ops[at : at + rng.choice((1, 1, 3))]
            case 1:
                ops[at:at] = ops[at : at + rng.choice((1, 4, 12))]
            case 2:
                ops.insert(at, ops.pop(rng.randrange(1, len(ops))))
            case 3:
                ops.insert(at, rng.choice(_OPCODES))
            case 4:
                ops[at] = rng.choice(_OPCODES)
            case 5:
                ops[at] = ops[at][:1] + damaged(rng, ops[at][1:])
        if len(ops) < 3:
            break
    return b"".join(ops)


def opcodes(data: bytes, frames: bool = False) -> list[bytes]:
    """The pickle, opcode by opcode, as far as it is one; with or without its frames."""
    found: list[bytes] = []
    starts: list[int] = []
    ends = 0
    try:
        for code, _, place in pickletools.genops(data):
            starts.append(place or 0)
            ends = len(data) if code.name == "STOP" else ends
    except Exception:
        ends = len(data)
    for start, end in pairwise([*starts, ends]):
        if frames or data[start] != 0x95:
            found.append(data[start:end])
    return found


def damaged(rng: random.Random, data: bytes) -> bytes:
    """A byte or two changed, put in or taken away."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(4):
            case 0:
                changed[at : at + 1] = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF))])
            case 1:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                changed[at:at] = rng.choice((b"\0", b"/", b"..", b"\xff\xff\xff\xff", b"\n", b"9"))
            case 3:
                del changed[at : at + 1]
    return bytes(changed)


def zipped(rng: random.Random, data: bytes) -> bytes:
    """An archive with a record changed, renamed, doubled or left out, and whole otherwise."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            held = [(one.filename, archive.read(one)) for one in archive.infolist()]
    except Exception:
        return data
    if not held:
        return data
    pickles = [i for i, (name, _) in enumerate(held) if name.endswith(".pkl")]
    at = pickles[0] if pickles and rng.randrange(4) else rng.randrange(len(held))
    name, content = held[at]
    match rng.randrange(8):
        case 0:
            held.append((name.replace("/0", "/1"), content))
        case 1:
            del held[at]
        case 2:
            held[at] = damaged(rng, name.encode()).decode("latin-1").replace("\0", ""), content
        case _:
            is_pickle = name.endswith(".pkl")
            held[at] = name, (pickled if is_pickle else damaged)(rng, content)
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        warnings.simplefilter("ignore")  # a name may come twice
        for name, content in held:
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


_BLOCK = 512


def tarred(rng: random.Random, data: bytes) -> bytes:
    """A byte or two changed in a header or behind one, every sum of a header right again."""
    changed = bytearray(data)
    blocks = [
        at for at in range(0, len(changed), _BLOCK) if changed[at + 257 : at + 262] == b"ustar"
    ]
    if not blocks:
        return data
    at = rng.choice(blocks)
    fields = ((0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155), (512, 64))
    start, size = rng.choice(fields)
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = at + start + rng.randrange(size)
        if place < len(changed):
            changed[place] = rng.choice(
                (0, 0x80, 0xFF, *b"0123457/.LgxSK5 =\n", rng.randrange(256))
            )
    if rng.randrange(6) == 0:
        other = rng.choice(blocks)
        changed[at:at] = data[other : other + _BLOCK]
    for place in range(0, len(changed) - _BLOCK + 1, _BLOCK):
        if changed[place + 257 : place + 262] == b"ustar":
            changed[place + 148 : place + 156] = b" " * 8
            total = sum(changed[place : place + _BLOCK])
            changed[place + 148 : place + 156] = b"%06o\0 " % total
    return bytes(changed)


ODD: Sequence[object] = (
    *(None, True, False, 0, -1, 1, 2, 0.5, 1e400, 1 << 31, 1 << 63, 1 << 64, -(1 << 63), 10**30),
    *("", "a", "0", "../x", "/etc/passwd", "a\0b", "\udc80", "\x1b[31m", "x" * 300, "NaN"),
    *([], {}, [0], [[]], {"": 0}, [1, -1], [0, 0, 0, 0, 0, 0, 0, 0, 0], {"a": {"b": []}}),
    *("BF16", "F4", "<f4", "[1]", "float32", "torch.bfloat16", "sha256", "0" * 64),
)


def described(rng: random.Random, data: bytes) -> bytes:
    """JSON with one to three of its values, at any depth, replaced, moved, doubled or gone."""
    try:
        found = json.loads(data)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            found = _changed(rng, found)
        return json.dumps(found).encode()
    except (ValueError, RecursionError):
        return data


def _changed(rng: random.Random, value: object) -> object:
    places = list(_places(value, 0))
    if not places:
        return rng.choice(ODD)
    holder, key = rng.choice(places)
    other = rng.choice(places)
    borrowed: object = other[0][other[1]]
    match rng.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[str(rng.choice(ODD))] = holder.pop(key)
        case 1 | 2 if len(json.dumps(borrowed)) < 4000:
            holder[key] = json.loads(json.dumps(borrowed))
        case 3 if isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += rng.choice((1, -1, 8, -8, 1 << 32))
        case _:
            holder[key] = json.loads(json.dumps(rng.choice(ODD)))
    return value


def _places(value: object, depth: int) -> Iterator[tuple[Any, Any]]:
    """(the dict or list that holds it, its key there) of every value inside."""
    if depth > 30:
        return
    if isinstance(value, dict):
        items: list[tuple[Any, object]] = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, list) else []
    for key, item in items[:500]:
        yield value, key
        yield from _places(item, depth + 1)


def with_header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with its header changed, and its length right again."""
    (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    if length > len(data):
        return data
    header = described(rng, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


_YAML = (
    *(b"&a ", b"*a", b"!!python/name:os.system ''", b"!!float ", b"!!int ", b"!!timestamp ", b"!!"),
    *(b"!!binary ", b"!!set {a, b}", b"!!omap [a: 1]", b"!!str ", b"<<: ", b"<<: *a", b"? ", b"- "),
    *(b"{", b"}", b"[", b"]", b"|\n", b">-\n", b"2026-13-45", b"0o7", b"1:2:3", b"1_0", b".nan"),
    *(b"~", b"null", b"true", b"0x", b"1e999", b"9" * 70, b"a: ", b"---\n", b"...\n", b"#", b"\t"),
    *(b"_target_: ", b"_call_: true", b"_args_: [1]", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"${.a}"),
)


def written(rng: random.Random, data: bytes) -> bytes:
    """YAML with a line or two moved, doubled or gone, or a word of it put where one begins."""
    lines = data.split(b"\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        starts = [0, *(i + 1 for i, byte in enumerate(lines[at]) if byte in b" :,[{")]
        start = rng.choice(starts)
        match rng.randrange(6):
            case 0:
                lines[at:at] = lines[at : at + rng.choice((1, 1, 3))]
            case 1 if len(lines) > 1:
                del lines[at]
            case 2:
                lines.insert(at, lines.pop(rng.randrange(len(lines))))
            case 3:
                lines[at] = lines[at][:start] + rng.choice(_YAML)
            case 4:
                lines[at] = b" " * rng.randrange(5) + lines[at].lstrip()
            case _:
                lines[at] = lines[at][:start] + rng.choice(_YAML) + lines[at][start:]
    return b"\n".join(lines)
