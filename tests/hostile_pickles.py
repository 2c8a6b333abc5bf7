"""Pickles that a stranger may put into a checkpoint, and the places that mcorefs reads them from.

`python -m tests.hostile_pickles VOCAB SHARD_SIZE RUN...` opens each run and prints what became of
it, as JSON lines; it ends with an error if anything in them was executed or written, or took long.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

CANARY = "mcorefs-was-here"
"""A file that the payloads would make in the directory that they run in."""
MAX_SECONDS = 20.0
MAX_MEMORY = 2 << 30
MARK = "@@ here the payload goes @@"

_MAKE = f"open({CANARY!r}, 'w').close()"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _call(module: str, name: str, *texts: str) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(map(_text, texts)) + b"tR"


_NESTED = b"\x80\2" + _call("builtins", "exec", _MAKE) + b"."
_SHORT = bytes([len(_NESTED)])

PAYLOADS: Mapping[str, bytes] = {
    # What scanners look for: functions that run what they are given.
    **{
        f"{module}.{name}": _call(module, name, f"touch {CANARY}")
        for module, name in [
            ("os", "system"),
            ("posix", "system"),
            ("nt", "system"),
            ("subprocess", "getoutput"),
            ("subprocess", "check_output"),
            ("pty", "spawn"),
            ("commands", "getoutput"),
            ("asyncio", "create_subprocess_shell"),
        ]
    },
    **{
        f"{module}.{name}": _call(module, name, _MAKE)
        for module, name in [
            ("builtins", "eval"),
            ("builtins", "exec"),
            ("__builtin__", "eval"),
            ("builtins", "compile"),
            ("code", "interact"),
            ("timeit", "timeit"),
            ("cProfile", "run"),
            ("bdb", "Bdb.run"),
            ("torch.jit.unsupported_tensor_ops", "execWrapper"),
            ("torch._inductor.codecache", "compile_file"),
            ("numpy.testing._private.utils", "runstring"),
        ]
    },
    # Functions that find other functions, or import.
    "importlib": _call("importlib", "import_module", "antigravity"),
    "__import__": _call("builtins", "__import__", "antigravity"),
    "runpy": _call("runpy", "run_module", "antigravity"),
    "resolve_name": b"cpkgutil\nresolve_name\n"
    + _text("os:system")
    + b"\x85R"
    + _text("id")
    + b"\x85R",
    "attrgetter": b"coperator\nattrgetter\n" + _text("system") + b"\x85Rcos\n__dict__\n\x85R",
    "methodcaller": _call("operator", "methodcaller", "system", "id") + b"cos\npath\n\x85R",
    "getattr": b"cbuiltins\ngetattr\ncos\nsystem\n"
    + _text("__call__")
    + b"\x86R"
    + _text("id")
    + b"\x85R",
    "partial": b"cfunctools\npartial\ncbuiltins\nexec\n" + _text(_MAKE) + b"\x86R)R",
    "partial with state": b"cfunctools\npartial\n)\x81(cbuiltins\nexec\n"
    + _text(_MAKE)
    + b"\x85}Ntb)R",
    "map": b"cbuiltins\nlist\ncbuiltins\nmap\ncbuiltins\nexec\n](" + _text(_MAKE) + b"e\x86R\x85R",
    "reduce": b"cfunctools\nreduce\ncbuiltins\nexec\n](" + _text(_MAKE) + b"}e\x86R",
    "a name within a class": b"\x8c\x08builtins\x8c\x0dstr.__class__\x93)R",
    "dunder names": b"\x8c\x05torch\x8c\x18storage.os.system.__call__\x93" + _text("id") + b"\x85R",
    # Loaders that read pickles again, or bytes as code.
    "pickle.loads": b"cpickle\nloads\nC" + _SHORT + _NESTED + b"\x85R",
    "_pickle.loads": b"c_pickle\nloads\nC" + _SHORT + _NESTED + b"\x85R",
    "dill": b"cdill\nloads\nC" + _SHORT + _NESTED + b"\x85R",
    "joblib": _call("joblib", "load", CANARY),
    "torch.load": _call("torch", "load", CANARY),
    "torch.serialization.load": _call("torch.serialization", "load", CANARY),
    "torch.hub.load": _call("torch.hub", "load", "a/b", "c"),
    "_load_from_bytes": b"ctorch.storage\n_load_from_bytes\nC" + _SHORT + _NESTED + b"\x85R",
    "marshal": b"cmarshal\nloads\nC\x01N\x85R",
    "FunctionType": b"ctypes\nFunctionType\nctypes\nCodeType\n}\x86R)R",
    "ctypes": _call("ctypes", "CDLL", "libc.so.6"),
    "yaml": _call("yaml", "unsafe_load", "!!python/object/apply:os.system [id]"),
    # Files and networks.
    "open": _call("builtins", "open", CANARY, "w"),
    "io.open": _call("_io", "open", CANARY, "w"),
    "Path": b"cpathlib\nPath.touch\n" + _call("pathlib", "PosixPath", CANARY) + b"\x85R",
    "mkdir": _call("os", "mkdir", CANARY),
    "shutil": _call("shutil", "copy", "/etc/passwd", CANARY),
    "urlopen": _call("urllib.request", "urlopen", "http://127.0.0.1:9/"),
    "socket": _call("socket", "create_connection", "127.0.0.1"),
    # Names that are put together while the pickle is read.
    "STACK_GLOBAL": b"\x8c\x02os\x8c\x06system\x93" + _text(f"touch {CANARY}") + b"\x85R",
    "STACK_GLOBAL from the memo": b"\x8c\x02os\x94\x8c\x06system\x94000\x8c\x01xh\x00h\x01\x93)R",
    "STACK_GLOBAL of a call": _call("builtins", "str", "os") + b"\x8c\x06system\x93)R",
    "STACK_GLOBAL of bytes": b"C\x02osC\x06system\x93)R",
    "STACK_GLOBAL behind DUP": b"\x8c\x02os2\x93)R",
    "GLOBAL of two lines": b"cos\r\nsystem\r\n)R",
    "INST": b"(" + _text(_MAKE) + b"ibuiltins\nexec\n",
    "OBJ": b"(cbuiltins\nexec\n" + _text(_MAKE) + b"o",
    "NEWOBJ": b"cbuiltins\nexec\n" + _text(_MAKE) + b"\x85\x81",
    "NEWOBJ_EX": b"cbuiltins\nexec\n" + _text(_MAKE) + b"\x85}\x92",
    "EXT1": b"\x82\x01" + _text("id") + b"\x85R",
    "EXT2": b"\x83\x01\x00)R",
    "EXT4": b"\x84\x01\x00\x00\x00)R",
    # State that would replace what an object does.
    "BUILD with __setstate__": b"cargparse\nNamespace\n)\x81}"
    + _text("__setstate__")
    + b"cos\nsystem\nsb"
    + _text("id")
    + b"b",
    "BUILD with __class__": b"cargparse\nNamespace\n)\x81}"
    + _text("__class__")
    + b"cos\nPathLike\nsb",
    "BUILD with __reduce__": b"cargparse\nNamespace\n)\x81}"
    + _text("__reduce__")
    + b"cos\nsystem\nsb",
    "BUILD of a module": b"ctorch\nserialization\n}" + _text("load") + b"cos\nsystem\nsb",
    "BUILD of a class": b"cargparse\nNamespace\n}" + _text("__init__") + b"cos\nsystem\nsb",
    "BUILD with slots": b"cargparse\nNamespace\n)\x81N}" + _text("__dict__") + b"]s\x86b",
    "a tensor by a class of its own": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\n"
    + b"ctorch\nTensor\n("
    + _text("id")
    + b"t}tR",
    "a tensor by any function": b"ctorch._utils\n_rebuild_parameter\ncos\nsystem\n"
    + _text("id")
    + b"\x86R\x89}\x87R",
    # Persistent ids that are none.
    "BINPERSID": _text("id") + b"Q",
    "BINPERSID of a function": b"cos\nsystem\nQ",
    "PERSID": b"Pos.system\n",
    "a storage of a class of its own": b"("
    + _text("storage")
    + b"cos\nsystem\n"
    + _text("0")
    + _text("cpu")
    + b"K\1tQ",
    "a storage elsewhere": b"("
    + _text("storage")
    + b"ctorch\nFloatStorage\n"
    + _text("../../../etc/passwd")
    + _text("cpu")
    + b"K\1tQ",
    # Numbers, memos, depth.
    "a huge number": b"\x8b\xff\xff\xff\x7f",
    "a number of 255 bytes": b"\x8a\xff" + b"\x7f" * 255,
    "a number in words": b"I" + b"9" * 100_000 + b"\n",
    "a long in words": b"L" + b"9" * 100_000 + b"L\n",
    "a memo far away": b"Nr\xff\xff\xff\x7f",
    "depth": b"]" * 100_000 + b"a" * 99_999,
    "tuples that double as a key": b"})"
    + b"q\x80" * 0
    + b"".join(b"2\x86" for _ in range(60))
    + b"Ns",
    "a frame of an exabyte": b"\x95" + b"\0" * 7 + b"\x10N",
    "text of an exabyte": b"\x8d" + b"\0" * 7 + b"\x10",
    "a bytearray of an exabyte": b"\x96" + b"\0" * 7 + b"\x10",
    "a second pickle": b"N." + _NESTED,
    "a stop at once": b".",
    "control characters": b"c\x1b]0;owned\x07\n\x1b[2J\n)R",
    "a name of a megabyte": b"c" + b"a" * (1 << 20) + b"\nb\n)R",
}


def as_text(value: object) -> bytes:
    """A pickle of `value` in protocol 2, which has no frames: opcodes can be put into it."""
    out = io.BytesIO()
    pickle._Pickler(out, 2).dump(value)
    return out.getvalue()


def spliced(data: bytes, payload: bytes, mark: str = MARK) -> bytes:
    """The pickle `data` (of protocol 2) with `payload` where it has the text `mark`."""
    assert data.count(_text(mark)) == 1, data.count(_text(mark))
    return data.replace(_text(mark), payload)


def rewritten(archive: bytes, payload: bytes, mark: str = MARK) -> bytes:
    """The same of the pickle in an archive of `torch.save`, which torch still loads."""
    source, out = zipfile.ZipFile(io.BytesIO(archive)), io.BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            is_pickle = name.endswith("/data.pkl")
            target.writestr(name, spliced(data, payload, mark) if is_pickle else data)
    return out.getvalue()


def archived(state: object, payload: bytes, mark: str = MARK) -> bytes:
    out = io.BytesIO()
    torch.save(state, out)
    return rewritten(out.getvalue(), payload, mark)


# -- the process that opens them ------------------------------------------------------------------

_happened: list[str] | None = None
_HARMLESS = ("object.__getattr__", "os.listdir", "os.scandir", "builtins.id", "pathlib.")


def _note(event: str, args: tuple[Any, ...]) -> None:
    if _happened is None or event.startswith(_HARMLESS):
        return
    if event == "open" and not (isinstance(args[2], int) and args[2] & 0o3):
        return  # to read
    if event == "mmap.__new__" and args[0] == -1:
        return  # memory
    _happened.append(f"{event} {args!r:.200}")


def peak() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def look(path: Path, vocab_size: int, shard_size: str) -> tuple[str, str]:
    """What is said of the run at `path`, and what became of it: "refused", "fault" or the digest
    of all that it serves as weights."""
    from mcorefs.errors import McorefsError, ReadFault
    from mcorefs.files import read_all
    from mcorefs.model import Options
    from mcorefs.tree import open_tree

    try:
        opened = open_tree(path, Options(vocab_size=vocab_size, shard_size=shard_size))
    except McorefsError as problem:
        return str(problem), "refused"
    digest = hashlib.sha256()
    try:
        for name, file in sorted(opened.tree.files.items()):
            if "safetensors" in name:
                digest.update(name.encode() + b"\0" + read_all(file))
    except ReadFault as fault:
        return str(fault), "fault"
    finally:
        opened.reader.close()
    return "", digest.hexdigest()


def main() -> None:
    global _happened
    vocab_size, shard_size, first, *rest = sys.argv[1:]
    look(Path(first), int(vocab_size), shard_size)  # which imports all that is needed
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    sys.addaudithook(_note)
    for name in (first, *rest):
        start = time.process_time()
        events: list[str] = []
        _happened = events
        said, outcome = look(Path(name), int(vocab_size), shard_size)
        _happened = None
        seconds = time.process_time() - start
        assert not events, (name, events)
        assert seconds < MAX_SECONDS, (name, seconds)
        assert peak() < MAX_MEMORY, (name, peak())
        sys.stdout.write(json.dumps([name, said, outcome]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
