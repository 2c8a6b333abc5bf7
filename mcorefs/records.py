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
from mcorefs.opcodes import (
    CALL,
    CHUNKS,
    NAME,
    NEW,
    OBJECT,
    SET,
    SHAPE,
    TUPLE,
    integers,
)
from mcorefs.pickle_objects import SKIPPED, SPENT, Built, Name, PickleError, Without, recalled


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


MAX_CHUNK = 512
"""More bytes than one is pickled as."""
Filled = tuple[object, int] | None


class RecordClass(Name):
    """The class of a record, in one pickle."""

    __slots__ = ("_known", "_series", "_shapes")

    kind: type[Built]

    def __init__(self, shapes: dict[bytes, Shape]) -> None:
        self._known: set[tuple[bytes | None, ...]] = set()
        """References to names, of which it is known that they are to the right ones: what is in a
        memo does not change."""
        self._shapes = shapes
        """Tuples of the pickle by their opcodes: each is there more than once."""
        self._series: re.Pattern[bytes] | None = None
        """What follows one of them, if more of the kind do; it refers to the right names."""

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
            shape = integers(code if short is None else code[:-1])
            self._shapes[code] = shape
        return shape


class ChunkClass(RecordClass):
    __slots__ = ()
    kind = ChunkStorageMetadata
    _spelling = re.compile(NEW + SHAPE + SHAPE + SET, re.DOTALL)

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

    def gathered(
        self,
        data: bytes,
        start: int,
        at: int,
        memo: list[object],
        items: list[object],
        without: Without | None,
    ) -> int:
        if self._series is None:
            match = self._spelling.match(data, at)
            if match is None or match[4] is None or match[8] is None:
                return start
            if not self._names_are(("offsets", "sizes"), match.group(1, 4, 5, 8), memo):
                return start
            self._series = re.compile(
                re.escape(data[start:at])
                + (NEW + re.escape(match[1]) + TUPLE + CALL)
                + (re.escape(match[5]) + TUPLE + CALL + SET),
                re.DOTALL,
            )
        following, shapes, shape = self._series.match, self._shapes, self._shape
        at = start
        while (match := following(data, at)) is not None:
            long, short, other_long, other_short = match.groups()
            offsets = shapes.get(short or long or b"") or shape(long, short)
            sizes = shapes.get(other_short or other_long or b"") or shape(other_long, other_short)
            made = ChunkStorageMetadata(offsets, sizes)
            items.append(made)
            memo += (made, SPENT, offsets, SPENT, offsets, sizes, SPENT, sizes)
            at = match.end()
        return at


_PROPERTIES = (  # dtype, layout, requires_grad, memory format, pin_memory as the state
    rb"\)\x81\x94\(" + NAME + NAME + rb"[\x88\x89]" + NAME + rb"[\x88\x89]t\x94b"
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
        NEW + NAME + NAME + b"(?:" + _PROPERTIES + b")?" + SHAPE + NAME + rb"]\x94(\(?)",
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

    _chunks = re.compile(CHUNKS, re.DOTALL)

    def skipped(self, data: bytes, at: int, memo: list[object]) -> int | None:
        if (match := self._spelling.match(data, at)) is None:
            return None
        *_, call, _, many = match.groups()
        count = 3 + (2 if match[3] is not None else 0) + (3 if call else 1)
        at = match.end()
        while True:  # for each list of up to a thousand that is added
            if (found := self._passed(data, at)) is None:
                return None
            chunks, at = found
            count += 8 * chunks
            if data[at] != (0x65 if many else 0x61):  # APPENDS, APPEND
                return None
            at += 1
            if data.startswith(b"ub", at):
                memo += (SKIPPED,) * count
                return at + 2
            if many := data[at : at + 1] == b"(":
                at += 1

    def _passed(self, data: bytes, at: int) -> tuple[int, int] | None:
        """How many chunks there are from `at` on, and where they end. Each 64 KiB there is an
        opcode (FRAME, nine bytes) between any two others."""
        count = 0
        while True:
            if (series := self._chunks.match(data, at)) is not None:
                count += data.count(OBJECT, at, series.end())
                at = series.end()
            frame = data.find(b"\x95", at, at + MAX_CHUNK)
            length = int.from_bytes(data[frame + 1 : frame + 9], "little")
            if frame < 0 or length > len(data):
                return (count, at) if count else None
            around = data[at:frame] + data[frame + 9 : frame + 9 + MAX_CHUNK]
            interrupted = self._chunks.match(around)
            if interrupted is None:
                return (count, at + 9 if frame == at else at) if count else None
            count += around.count(OBJECT, 0, interrupted.end())
            at += interrupted.end() + 9


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


def is_whole(text: bytes | None, count: bytes | None) -> bool:
    """Whether a string that is spelled has the length that is said before it."""
    return text is None or count is None or len(text) == count[0]


def string(reference: bytes | None, text: bytes | None, memo: list[object]) -> object:
    """The string that is referred to, or that is spelled, which goes into the memo."""
    if text is None:
        assert reference is not None
        return recalled(memo[int.from_bytes(reference[1:], "little")])
    memo.append(value := str(text, "utf-8", "backslashreplace"))
    return value
