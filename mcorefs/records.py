"""What `.metadata` holds by the hundred thousand, made in one step each while it is unpickled.

For each chunk of a tensor torch pickles three small objects, and Python's pickler spells all of a
kind alike: the class, then the names and values of its attributes. Such an object is recognised
here by its bytes and made at once, for a fifth of what its opcodes would cost one by one. What is
spelled otherwise is left to the pickle machine, which makes the same of it.

Classes: pytorch:torch/distributed/checkpoint/{metadata,filesystem}.py.
"""

from __future__ import annotations

import re

from mcorefs.boxes import Shape
from mcorefs.pickle_machine import SPENT, Built, Name, PickleError, recalled


class Record(Built):
    """A dataclass with its attributes in slots: None where a pickle gives none."""

    __slots__: tuple[str, ...] = ()

    def set_state(self, state: object) -> None:
        if type(state) is not dict:
            raise PickleError("attributes that are not a dict")
        for name in self.__slots__:
            setattr(self, name, state.get(name))


class ChunkStorageMetadata(Record):
    __slots__ = ("offsets", "sizes")

    def __init__(self, offsets: object = None, sizes: object = None) -> None:
        self.offsets, self.sizes = offsets, sizes


class TensorStorageMetadata(Record):
    __slots__ = ("chunks", "properties", "size")

    def __init__(self, properties: object = None, size: object = None) -> None:
        self.properties, self.size = properties, size
        self.chunks: object = None


class MetadataIndex(Record):
    """(fqn, offset); a key by identity here."""

    __slots__ = ("fqn", "offset")

    def __init__(self, fqn: object = None, offset: object = None) -> None:
        self.fqn, self.offset = fqn, offset


class StorageInfo(Record):
    __slots__ = ("length", "offset", "relative_path", "transform_descriptors")

    def __init__(
        self, relative_path: object = None, offset: object = None, length: object = None
    ) -> None:
        self.relative_path, self.offset, self.length = relative_path, offset, length
        self.transform_descriptors: object = None


class TensorProperties(Built):
    """Pickled as a tuple with the dtype first."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: object = None) -> None:
        self.dtype = dtype

    def set_state(self, state: object) -> None:
        if isinstance(state, tuple) and state:
            self.dtype = state[0]
        elif isinstance(state, dict):
            self.dtype = state.get("dtype")


class Size(Name):
    """torch.Size: its one argument, a tuple, is as good."""

    __slots__ = ()

    def call(self, args: tuple[object, ...]) -> object:
        if len(args) != 1 or type(args[0]) is not tuple:
            raise PickleError("a torch.Size that is not a tuple")
        return args[0]


# Opcodes, in the order in which Python's pickler puts them (cpython:Lib/pickle.py).
_REF = rb"(?:h.|j.{4})"  # BINGET, LONG_BINGET: what was in the pickle before
_INT = rb"(?:K.|M..|J.{4}|\x8a\x05.{5}|\x8a\x06.{6})"  # BININT1, BININT2, BININT, LONG1
_TUPLE = (  # the last of its opcodes says how many there are
    rb"(?:\((" + _INT + rb"*+)t|"
    rb"(" + _INT + rb"\x85|" + _INT + rb"{2}\x86|" + _INT + rb"{3}\x87))\x94"
)
_NEW, _SET = rb"\)\x81\x94}\x94\(", rb"ub"  # an object and its attributes; they become its state
_NAME = b"(" + _REF + b")"  # of an attribute
_STR = rb"(?:(h.|j.{4})|\x8c(.)(.{0,255}?)\x94)"  # or spelled: SHORT_BINUNICODE MEMOIZE
_SHAPE = b"(" + _REF + b"{1,2}+)" + _TUPLE + rb"(\x85\x94R\x94)?"  # perhaps as a torch.Size
Filled = tuple[object, int] | None


class RecordClass(Name):
    """The class of a record, in one pickle."""

    __slots__ = ("_known", "_shapes")

    kind: type[Built]

    def __init__(self) -> None:
        self._known: set[tuple[bytes | None, ...]] = set()
        """References to names, of which it is known that they are to the right ones: what is in a
        memo does not change."""
        self._shapes: dict[bytes, Shape] = {}
        """Tuples by their opcodes: there are few different ones."""

    def call(self, args: tuple[object, ...]) -> object:
        if args:
            raise PickleError(f"{self.kind.__name__} takes no arguments")
        return self.kind()

    def _names_are(
        self, names: tuple[str, ...], references: tuple[bytes | None, ...], memo: list[object]
    ) -> bool:
        """Whether `references` are to `names`. To each belong two: to the name, and what calls the
        torch.Size that the first refers to as well; None where there is none."""
        if references in self._known:
            return True
        for name, reference, call in zip(names, references[::2], references[1::2], strict=True):
            expected = (name,) if call is None else (name, Size)
            if reference is not None and _referred(reference, memo) != expected:
                return False
        self._known.add(references)
        return True

    def _properties(self, references: tuple[bytes, ...], memo: list[object]) -> TensorProperties:
        """From the references in their state, of which the first is to the dtype."""
        if references not in self._known:
            for reference in references:
                _referred(reference, memo)
            self._known.add(references)
        return TensorProperties(_referred(references[0], memo)[0])

    def _shape(self, long: bytes | None, short: bytes | None) -> Shape:
        """The tuple of integers: `short` has its last opcode with it."""
        code = long if short is None else short
        assert code is not None
        shape = self._shapes.get(code)
        if shape is None:
            shape = _integers(code if short is None else code[:-1])
            self._shapes[code] = shape
        return shape


class ChunkClass(RecordClass):
    __slots__ = ()
    kind = ChunkStorageMetadata
    _spelling = re.compile(_NEW + _SHAPE + _SHAPE + _SET, re.DOTALL)

    def filled(self, data: bytes, at: int, memo: list[object]) -> Filled:
        if (match := self._spelling.match(data, at)) is None:
            return None
        first, long, short, call, second, other_long, other_short, other_call = match.groups()
        if not self._names_are(("offsets", "sizes"), (first, call, second, other_call), memo):
            return None
        offsets, sizes = self._shape(long, short), self._shape(other_long, other_short)
        made = ChunkStorageMetadata(offsets, sizes)
        memo += (made, SPENT, offsets)
        memo += (SPENT, offsets, sizes) if call else (sizes,)
        if other_call:
            memo += (SPENT, sizes)
        return made, match.end()


_PROPERTIES = (  # dtype, layout, requires_grad, memory format, pin_memory as the state
    rb"\)\x81\x94\(" + _NAME + _NAME + rb"[\x88\x89]" + _NAME + rb"[\x88\x89]t\x94b"
)


class PropertiesClass(RecordClass):
    __slots__ = ()
    kind = TensorProperties
    _spelling = re.compile(_PROPERTIES, re.DOTALL)

    def filled(self, data: bytes, at: int, memo: list[object]) -> Filled:
        if (match := self._spelling.match(data, at)) is None:
            return None
        made = self._properties(match.groups(), memo)
        memo += (made, SPENT)
        return made, match.end()


class TensorClass(RecordClass):
    """Those of few chunks, whose opcodes are an object with others inside."""

    __slots__ = ()
    kind = TensorStorageMetadata
    _spelling = re.compile(
        _NEW + _NAME + _NAME + b"(?:" + _PROPERTIES + b")?" + _SHAPE + _NAME + rb"]\x94(\(?)",
        re.DOTALL,
    )

    def filled(self, data: bytes, at: int, memo: list[object]) -> Filled:
        if (match := self._spelling.match(data, at)) is None:
            return None
        first, kind, *state, second, long, short, call, third, many = match.groups()
        references = (first, None, second, call, third, None)
        if not self._names_are(("properties", "size", "chunks"), references, memo):
            return None
        begun = len(memo)
        size = self._shape(long, short)
        (properties,) = _referred(kind, memo)
        made = TensorStorageMetadata(properties, size)
        memo += (made, SPENT)
        if state[0] is not None:
            if not isinstance(properties, PropertiesClass):
                del memo[begun:]
                return None
            made.properties = self._properties(tuple(state), memo)
            memo += (made.properties, SPENT)
        memo += (size, SPENT, size) if call else (size,)
        chunks: list[object] = []
        made.chunks = chunks
        memo.append(chunks)
        at = match.end()
        while len(chunks) < (64 if many else 1) and data[at] in b"hj":
            end = at + (2 if data[at] == 0x68 else 5)
            part = memo[int.from_bytes(data[at + 1 : end], "little")]
            filled = part.filled(data, end, memo) if isinstance(part, ChunkClass) else None
            if filled is None:
                break
            chunk, at = filled
            chunks.append(chunk)
        if chunks and data.startswith(b"eub" if many else b"aub", at):
            return made, at + 3
        del memo[begun:]
        return None


class IndexClass(RecordClass):
    __slots__ = ()
    kind = MetadataIndex
    _spelling = re.compile(
        _NEW + _NAME + _STR + _NAME + b"(?:N|" + _INT + b")(?:" + _SHAPE + b")?" + _SET, re.DOTALL
    )

    def filled(self, data: bytes, at: int, memo: list[object]) -> Filled:
        if (match := self._spelling.match(data, at)) is None:
            return None
        first, ref, count, text, second, third, long, short, call = match.groups()
        references = (first, None, second, None, third, call)
        if not (
            _is_whole(text, count) and self._names_are(("fqn", "index", "offset"), references, memo)
        ):
            return None
        made = MetadataIndex()
        memo += (made, SPENT)
        made.fqn = _string(ref, text, memo)
        if third is not None:
            made.offset = offset = self._shape(long, short)
            memo += (offset, SPENT, offset) if call else (offset,)
        return made, match.end()


class InfoClass(RecordClass):
    __slots__ = ()
    kind = StorageInfo
    _spelling = re.compile(
        _NEW + _NAME + _STR + _NAME + b"(" + _INT + b")" + _NAME + b"(" + _INT + b")" + _SET,
        re.DOTALL,
    )

    def filled(self, data: bytes, at: int, memo: list[object]) -> Filled:
        if (match := self._spelling.match(data, at)) is None:
            return None
        first, ref, count, text, second, offset, third, length = match.groups()
        references = (first, None, second, None, third, None)
        names = ("relative_path", "offset", "length")
        if not (_is_whole(text, count) and self._names_are(names, references, memo)):
            return None
        made = StorageInfo(None, _integer(offset), _integer(length))
        memo += (made, SPENT)
        made.relative_path = _string(ref, text, memo)
        return made, match.end()


def _referred(references: bytes, memo: list[object]) -> tuple[object, ...]:
    """What `references` are to, with the class Size for what stands for torch.Size."""
    found: list[object] = []
    at = 0
    while at < len(references):
        end = at + (2 if references[at] == 0x68 else 5)
        value = recalled(memo[int.from_bytes(references[at + 1 : end], "little")])
        found.append(Size if isinstance(value, Size) else value)
        at = end
    return tuple(found)


def _is_whole(text: bytes | None, count: bytes | None) -> bool:
    """Whether a string that is spelled has the length that is said before it."""
    return text is None or count is None or len(text) == count[0]


def _string(reference: bytes | None, text: bytes | None, memo: list[object]) -> object:
    """The string that is referred to, or that is spelled, which goes into the memo."""
    if text is None:
        assert reference is not None
        return recalled(memo[int.from_bytes(reference[1:], "little")])
    memo.append(value := str(text, "utf-8", "backslashreplace"))
    return value


_WIDTHS = {0x4B: 2, 0x4D: 3, 0x4A: 5}


def _integers(code: bytes) -> Shape:
    if code[::2] == b"K" * (len(code) // 2):
        return tuple(code[1::2])
    numbers: list[int] = []
    at = 0
    while at < len(code):
        end = at + (_WIDTHS.get(code[at]) or 2 + code[at + 1])
        numbers.append(_integer(code[at:end]))
        at = end
    return tuple(numbers)


def _integer(code: bytes) -> int:
    if code[0] == 0x4B:
        return code[1]
    if code[0] == 0x4D:
        return code[1] | code[2] << 8
    return int.from_bytes(code[1 if code[0] == 0x4A else 2 :], "little", signed=True)
