"""How Python's pickler spells what `.metadata` is full of: pieces of regular expressions.

Opcodes: cpython:Lib/pickle.py.
"""

from __future__ import annotations

import sys

from mcorefs.boxes import Shape

OWN = b"+" if sys.version_info >= (3, 11, 5) else b""
"""Makes a repetition possessive: it keeps nothing of its turns. Before that version `re` matches
some of them wrongly (cpython issue 106052); without it they match the same here, for what follows
one is never what it could give back."""

REF = rb"(?:h.|j.{4})"  # BINGET, LONG_BINGET: what was in the pickle before
INT = rb"(?:K.|M..|J.{4}|\x8a\x05.{5}|\x8a\x06.{6})"  # BININT1, BININT2, BININT, LONG1
TUPLE = (  # the last of its opcodes says how many there are
    rb"(?:\((" + INT + b"*" + OWN + rb")t|"
    rb"(" + INT + rb"\x85|" + INT + rb"{2}\x86|" + INT + rb"{3}\x87))\x94"
)
NEW, SET = rb"\)\x81\x94}\x94\(", rb"ub"  # an object and its attributes; they become its state
NAME = b"(" + REF + b")"  # of an attribute
STR = rb"(?:(h.|j.{4})|\x8c(.)(.{0,255}?)\x94)"  # or spelled: SHORT_BINUNICODE MEMOIZE
CALL = rb"\x85\x94R\x94"  # of a torch.Size
SHAPE = b"(" + REF + b"{1,2}" + OWN + b")" + TUPLE + b"(" + CALL + b")?"  # perhaps as a torch.Size

OBJECT = b")\x81\x94}\x94("
"""What NEW matches. EMPTY_TUPLE NEWOBJ MEMOIZE EMPTY_DICT MEMOIZE MARK: how every object with
attributes begins."""
PLAIN = rb"(?:K.|M..|J.{4}|\x8a\x05.{5})"  # no number in which OBJECT could be
PLAIN_SIZE = (rb"(?:\((?:%(n)s)*%(own)st|%(n)s(?:\x85|%(n)s(?:\x86|%(n)s\x87)))\x94") % {
    b"n": PLAIN, b"own": OWN,
} + CALL  # fmt: skip
CHUNKS = b"(?:" + REF + NEW + (REF + REF + PLAIN_SIZE) * 2 + SET + b")+" + OWN
"""A series of chunks, each of which puts eight things into the memo and has OBJECT once."""

_WIDTHS = {0x4B: 2, 0x4D: 3, 0x4A: 5}


def integers(code: bytes) -> Shape:
    if code[::2] == b"K" * (len(code) // 2):
        return tuple(code[1::2])
    numbers: list[int] = []
    at = 0
    while at < len(code):
        end = at + (_WIDTHS.get(code[at]) or 2 + code[at + 1])
        numbers.append(integer(code[at:end]))
        at = end
    return tuple(numbers)


def integer(code: bytes) -> int:
    if code[0] == 0x4B:
        return code[1]
    if code[0] == 0x4D:
        return code[1] | code[2] << 8
    return int.from_bytes(code[1 if code[0] == 0x4A else 2 :], "little", signed=True)
