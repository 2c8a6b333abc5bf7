"""Pickles made to crash, to hang or to fill the memory of the process that reads them.

`python -m tests.pickle_bombs` reads them all, and ends with "all harmless". A process of its own,
because Python's unpickler does not survive some of them.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

from mcorefs.errors import CheckpointError
from mcorefs.unpickle import describe, loads, plain

DEEP = 300_000
MANY = 30_000
GIB = (1 << 30).to_bytes(4, "little")
HUGE = (1 << 62).to_bytes(8, "little")
MAX_SECONDS = 20.0
MAX_MEMORY = 1 << 30

NAMESPACE = b"cargparse\nNamespace\nq\0"
PATH = b"cpathlib\nPosixPath\nq\0"
DICT_OF_MANY = b"}q\1(" + b"".join(b"J%sN" % i.to_bytes(4, "little") for i in range(MANY)) + b"u"


def pickled(body: bytes) -> bytes:
    return b"\x80\4" + body + b"."


REFUSED = {
    "tuples, nested deeply, as a key": b"})" + b"\x85" * DEEP + b"Ns",
    "tuples, nested deeply, in a set": b"\x8f()" + b"\x85" * DEEP + b"\x90",
    "tuples, nested deeply, in a frozenset": b"()" + b"\x85" * DEEP + b"\x91",
    "frozensets, nested deeply": b"(" * DEEP + b"N" + b"\x91" * DEEP,
    "tuples that double, as a key": b"})q\0"
    + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    + b"Ns",
    "a long tuple as a key": b"}(" + b"N" * DEEP + b"tNs",
    "paths that double": PATH
    + b"\x8c\x09aaaaaaaaaq\1"
    + b"".join(b"h\0h%ch%c\x86Rq%c" % (i, i, i + 1) for i in range(1, 60)),
    "a path of no strings": PATH + b"](" + b"N" * 1000 + b"e\x85R",
    "a dict copied again and again": b"(ccollections\nOrderedDict\nq\0"
    + DICT_OF_MANY
    + b"h\0h\1\x85R" * MANY
    + b"t",
    "a function of very many arguments": b"(ctorch._utils\n_rebuild_parameter\nq\0("
    + b"N" * MANY
    + b"tq\1"
    + b"h\0h\1R" * MANY
    + b"t",
    "a memo far away": b"Nr\xff\xff\xff\x7f",
    "a memo twice": b"Nq\0Nq\0",
    "marks": b"(" * DEEP,
    "bytes that are not there": b"\x8e" + HUGE,
    "text that is not there": b"\x8d" + HUGE,
    "a gibibyte of text that is not there": b"X" + GIB,
    "a gibibyte of bytes that are not there": b"B" + GIB,
    "a bytearray that is not there": b"\x96" + HUGE,
    "a number of a gibibyte": b"\x8b" + GIB,
    "a number that is not there": b"\x8a\xff",
    "a frame that is not there": b"\x95" + HUGE + b"N",
}
READ = {
    "lists, nested deeply": b"]" * DEEP + b"a" * (DEEP - 1),
    "tuples, nested deeply": b")" + b"\x85" * DEEP,
    "dicts, nested deeply": b"}K\1" * DEEP + b"}" + b"s" * DEEP,
    "objects, nested deeply": b"cos\nx\nq\0" + b"h\0" * DEEP + b")" + b"R\x85" * DEEP + b"R",
    "states, nested deeply": NAMESPACE
    + b")\x81}K\1"
    + b"h\0)\x81}K\1" * DEEP
    + b"N"
    + b"sb" * (DEEP + 1),
    "one state for many objects": b"(" + NAMESPACE + DICT_OF_MANY + b"h\0)\x81h\1b" * MANY + b"t",
    "one torch.Size again and again": b"(ctorch\nSize\nq\0("
    + b"N" * MANY
    + b"tq\1"
    + b"h\0h\1\x85R" * MANY
    + b"t",
    "objects with one list of arguments": b"(cos\nx\nq\0("
    + b"N" * MANY
    + b"tq\1"
    + b"h\0h\1R" * MANY
    + b"t",
    "lists that double": b"(]q\0"
    + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))
    + b"t",
}


def read(data: bytes, *, refused: bool) -> None:
    try:
        found = loads(data, "bomb")
    except CheckpointError:
        if not refused:
            raise
        return
    if refused:
        raise AssertionError("was not refused")
    describe(found)
    with contextlib.suppress(CheckpointError):
        plain(found)


def peak() -> int:
    """Bytes in use at most by this program: what getrusage says begins with its parent's."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def main() -> None:
    for name, body in {**REFUSED, **READ}.items():
        sys.stdout.write(f"{name}\n")
        sys.stdout.flush()
        start = time.process_time()
        read(pickled(body), refused=name in REFUSED)
        seconds = time.process_time() - start
        memory = peak()
        assert seconds < MAX_SECONDS, seconds
        assert memory < MAX_MEMORY, memory
    sys.stdout.write("all harmless\n")


if __name__ == "__main__":
    main()
