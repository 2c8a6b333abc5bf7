"""The pickle machine: carries out the opcodes of a pickle on values that cannot do anything.

Python's own unpickler is not used, because bytes alone can end the process that runs it: it hashes
tuples nested a million deep (a C stack overflow), or sharing each other thirty deep (2^30 steps),
and allocates a memo as long as any index it reads. Here an opcode costs what it adds to the
result, so time and memory are linear in the pickle; nothing recurses; and nothing is imported,
called or set except through `Name` and `Built`.

The opcodes are those that Python's picklers write in protocols 2 to 5 (cpython:Lib/pickle.py),
without what no checkpoint holds: buffers out of band, extension codes, numbers over 255 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from struct import Struct

from mcorefs.opcodes import OBJECT
from mcorefs.pickle_objects import (
    SKIPPED,
    Built,
    Find,
    Name,
    PickleError,
    Without,
    build,
    check_key,
    extend_with,
    recalled,
    set_items,
)

MAX_NAME = 1000


_BARE_OBJECT = b")\x81\x94"
"""EMPTY_TUPLE NEWOBJ MEMOIZE: one without, or at least not yet."""
_CALL = b"\x94\x85\x94R\x94"
"""MEMOIZE TUPLE1 MEMOIZE REDUCE MEMOIZE: how every torch.Size ends."""
_INT4, _UINT2, _UINT4, _UINT8 = Struct("<i"), Struct("<H"), Struct("<I"), Struct("<Q")
_FLOAT = Struct(">d")


def run(
    data: bytes,
    find: Find,
    persistent: Callable[[object], object],
    until: str | None = None,
    without: Without | None = None,
) -> object:
    """The object that the pickle `data` describes.

    `persistent` turns a persistent id into an object. `until` is an attribute of the object: where
    it comes, the object is taken as it is, and the rest of `data` is not looked at. What is named
    by a string that `without` is true of may be left out, or be SKIPPED. Raises an Exception if it
    is no pickle, of any kind: PickleError where what is wrong was foreseen, SkippedError where
    something that was left out is needed after all.
    """
    machine = _Machine(data, find, persistent, until, without)
    try:
        return machine.run()
    except (IndexError, struct.error):
        raise PickleError("it is cut short, or takes what it has not put") from None


class _Machine:
    def __init__(
        self,
        data: bytes,
        find: Find,
        persistent: Callable[[object], object],
        until: str | None,
        without: Without | None,
    ) -> None:
        self.data, self.until, self.without = data, until, without
        self.find, self.persistent = find, persistent
        self.stack: list[object] = []
        self.marked: list[list[object]] = []
        """The stacks below each open mark."""
        self.memo: list[object] = []

    def run(self) -> object:  # noqa: C901  (one loop: a .metadata has 10^7 opcodes)
        """The opcodes that `.metadata` is full of, two frequent series of them in one step."""
        data, memo, marked, until = self.data, self.memo, self.marked, self.until
        stack, without = self.stack, self.without
        starts, uint2, uint4, int4 = (
            data.startswith,
            _UINT2.unpack_from,
            _UINT4.unpack_from,
            _INT4.unpack_from,
        )
        at = self._header()
        while True:
            op = data[at]
            at += 1
            if op == 0x4B:  # BININT1
                stack.append(data[at])
                at += 1
            elif op == 0x94:  # MEMOIZE
                memo.append(stack[-1])
            elif op == 0x68 or op == 0x6A:  # BINGET, LONG_BINGET
                if op == 0x68:
                    value = memo[data[at]]
                    at += 1
                else:
                    value = memo[uint4(data, at)[0]]
                    at += 4
                if data[at] == 0x29 and isinstance(value, Name):
                    start = at - (2 if op == 0x68 else 5)
                    end = value.gathered(data, start, at, memo, stack, without)
                    if end != start:
                        at = end
                    elif (
                        without is not None
                        and stack
                        and type(stack[-1]) is str
                        and without(stack[-1])
                        and (after := value.skipped(data, at, memo)) is not None
                    ):
                        at = after
                        stack.append(SKIPPED)
                    elif (filled := value.filled(data, at, memo)) is not None:
                        value, at = filled
                        stack.append(value)
                    elif starts(OBJECT, at):
                        at += len(OBJECT)
                        value = value.call(())
                        attributes: dict[object, object] = {}
                        memo += (value, attributes)
                        stack += (value, attributes)
                        marked.append(stack)
                        stack = []
                    elif starts(_BARE_OBJECT, at):
                        at += len(_BARE_OBJECT)
                        value = value.call(())
                        memo.append(value)
                        stack.append(value)
                    else:
                        stack.append(value)
                else:
                    stack.append(recalled(value))
            elif op == 0x75:  # SETITEMS
                items = stack
                stack = marked.pop()
                target = stack[-1]
                set_items(target, items)
                if data[at] == 0x62 and len(stack) > 1 and isinstance(built := stack[-2], Built):
                    at += 1  # BUILD
                    stack.pop()
                    type(built).set_state(built, target)
            elif 0x85 <= op <= 0x87:  # TUPLE1, TUPLE2, TUPLE3
                count = op - 0x84
                if len(stack) < count:
                    raise IndexError
                value = tuple(stack[-count:])
                del stack[-count:]
                if starts(_CALL, at) and isinstance(called := stack[-1], Name):
                    at += len(_CALL)
                    args = (value,)
                    stack[-1] = value = called.call(args)
                    memo += (args[0], args, value)
                else:
                    stack.append(value)
            elif op == 0x28:  # MARK
                marked.append(stack)
                stack = []
            elif op == 0x8C:  # SHORT_BINUNICODE
                end = at + 1 + data[at]
                text = str(data[at + 1 : end], "utf-8", "backslashreplace")
                if text == until and (whole := self._so_far(stack)) is not None:
                    return whole
                stack.append(text)
                at = end
            elif op == 0x4D:  # BININT2
                stack.append(uint2(data, at)[0])
                at += 2
            elif op == 0x4A:  # BININT
                stack.append(int4(data, at)[0])
                at += 4
            elif op == 0x71:  # BINPUT
                self._put(data[at], stack)
                at += 1
            elif op == 0x2E:  # STOP
                return self._stop(at, stack)
            else:
                self.stack = stack
                at = self._others(op, at)
                stack = self.stack

    def _header(self) -> int:
        if len(self.data) < 2 or self.data[0] != 0x80 or not 2 <= self.data[1] <= 5:
            raise PickleError("it does not begin as a pickle of protocol 2 to 5 does")
        return 2

    def _stop(self, at: int, stack: list[object]) -> object:
        if len(stack) != 1 or self.marked:
            raise PickleError(f"it ends at byte {at} with an unfinished object")
        if at != len(self.data):
            raise PickleError(f"it ends at byte {at} but {len(self.data) - at} bytes follow")
        return stack[0]

    def _so_far(self, stack: list[object]) -> object:
        """The object whose attributes are on the stack, if the next of them is to come now: not
        where something is put into a dict or list that is the last of them so far."""
        if len(self.marked) != 1 or len(self.marked[0]) != 2 or len(stack) % 2:
            return None
        if stack and type(stack[-1]) in (dict, list) and not stack[-1]:
            return None
        whole, attributes = self.marked[0]
        set_items(attributes, stack)
        build(whole, attributes)
        return whole

    def _others(self, op: int, at: int) -> int:
        """Carry out any opcode that `run` does not; where the next one is."""
        if (constant := _CONSTANTS.get(op, _MISSING)) is not _MISSING:
            self.stack.append(constant)
        elif (empty := _EMPTY.get(op)) is not None:
            self.stack.append(empty())
        elif (counted := _COUNTED.get(op)) is not None:
            return self._counted(at, *counted)
        elif (act := _ACTS.get(op)) is not None:
            act(self)
        elif (read := _READS.get(op)) is not None:
            return read(self, at)
        else:
            raise PickleError(f"opcode {op:#04x} at byte {at - 1} is none that checkpoints hold")
        return at

    def _counted(self, at: int, head: Struct, make: Callable[[bytes], object]) -> int:
        """A string with its length before it."""
        (count,) = head.unpack_from(self.data, at)
        start = at + head.size
        end = start + int(count)
        if end > len(self.data):
            raise PickleError(f"{count} bytes are said to follow byte {start}, it ends before")
        self.stack.append(make(self.data[start:end]))
        return end

    def _put(self, index: int, stack: list[object]) -> None:
        if index != len(self.memo):
            raise PickleError(f"memo {index} comes after memo {len(self.memo) - 1}")
        self.memo.append(stack[-1])

    def _long_put(self, at: int) -> int:
        self._put(_UINT4.unpack_from(self.data, at)[0], self.stack)
        return at + 4

    def _frame(self, at: int) -> int:
        if _UINT8.unpack_from(self.data, at)[0] > len(self.data) - at - 8:
            raise PickleError(f"the frame at byte {at - 1} is longer than the pickle")
        return at + 8

    def _float(self, at: int) -> int:
        self.stack.append(_FLOAT.unpack_from(self.data, at)[0])
        return at + 8

    def _global(self, at: int) -> int:
        """GLOBAL: two lines of text."""
        names = self.data[at : at + 2 * MAX_NAME].split(b"\n", 2)
        if len(names) < 3:
            raise PickleError(f"the name at byte {at} does not end")
        module, name = (str(part, "utf-8", "backslashreplace") for part in names[:2])
        self.stack.append(self.find(module, name))
        return at + len(names[0]) + len(names[1]) + 2

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise PickleError("a global name is not a string")
        if len(name) > MAX_NAME or len(module) > MAX_NAME:
            raise PickleError("a global name is too long")
        self.stack.append(self.find(module, name))

    def _popped(self) -> list[object]:
        """The items above the last mark, which is taken away."""
        items = self.stack
        self.stack = self.marked.pop()
        return items

    def _tuple(self) -> None:
        items = self._popped()
        self.stack.append(tuple(items))

    def _append(self) -> None:
        item = self.stack.pop()
        extend_with(self.stack[-1], [item])

    def _appends(self) -> None:
        items = self._popped()
        extend_with(self.stack[-1], items)

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        set_items(self.stack[-1], [key, value])

    def _add_items(self) -> None:
        items = self._popped()
        target = self.stack[-1]
        if not isinstance(target, set):
            raise PickleError("items are added to what is not a set")
        for item in items:
            check_key(item)
        target.update(items)

    def _frozen_set(self) -> None:
        items = self._popped()
        for item in items:
            check_key(item)
        self.stack.append(frozenset(items))

    def _call(self) -> None:
        """REDUCE and NEWOBJ: to a pickle, making an object is a call."""
        args, called = self.stack.pop(), self.stack.pop()
        if not (isinstance(called, Name) and isinstance(args, tuple)):
            raise PickleError("something that is not a class is called")
        self.stack.append(called.call(args))

    def _call_with_keywords(self) -> None:
        """NEWOBJ_EX: the keywords come as a second argument."""
        keywords, args = self.stack.pop(), self.stack.pop()
        self.stack.append((args, keywords))
        self._call()

    def _build_object(self) -> None:
        state = self.stack.pop()
        build(self.stack[-1], state)

    def _persistent(self) -> None:
        self.stack.append(self.persistent(self.stack.pop()))


def _text(data: bytes) -> str:
    return str(data, "utf-8", "backslashreplace")


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


_MISSING = object()
_UINT1 = Struct("<B")
_CONSTANTS: dict[int, object] = {0x4E: None, 0x88: True, 0x89: False, 0x29: ()}
_EMPTY: dict[int, Callable[[], object]] = {0x7D: dict, 0x5D: list, 0x8F: set}
_COUNTED: dict[int, tuple[Struct, Callable[[bytes], object]]] = {
    0x58: (_UINT4, _text),  # BINUNICODE
    0x8D: (_UINT8, _text),  # BINUNICODE8
    0x43: (_UINT1, bytes),  # SHORT_BINBYTES
    0x42: (_UINT4, bytes),  # BINBYTES
    0x8E: (_UINT8, bytes),  # BINBYTES8
    0x96: (_UINT8, bytes),  # BYTEARRAY8
    0x8A: (_UINT1, _integer),  # LONG1
}
_ACTS: dict[int, Callable[[_Machine], None]] = {
    0x61: _Machine._append,
    0x62: _Machine._build_object,
    0x65: _Machine._appends,
    0x73: _Machine._set_item,
    0x74: _Machine._tuple,
    0x51: _Machine._persistent,
    0x52: _Machine._call,  # REDUCE
    0x81: _Machine._call,  # NEWOBJ
    0x90: _Machine._add_items,
    0x91: _Machine._frozen_set,
    0x92: _Machine._call_with_keywords,
    0x93: _Machine._stack_global,
}
_READS: dict[int, Callable[[_Machine, int], int]] = {
    0x47: _Machine._float,
    0x63: _Machine._global,
    0x72: _Machine._long_put,
    0x95: _Machine._frame,
}
