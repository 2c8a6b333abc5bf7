"""Where chunks lie in files, as `.metadata` says: the other half of what it holds by the hundred
thousand, made in one step each or passed over by the score. See `records`.

Classes: pytorch:torch/distributed/checkpoint/{metadata,filesystem}.py.
"""

from __future__ import annotations

import re

from mcorefs.boxes import Shape
from mcorefs.opcodes import (
    CALL,
    INT,
    NAME,
    NEW,
    OBJECT,
    OWN,
    PLAIN,
    PLAIN_SIZE,
    REF,
    SET,
    SHAPE,
    STR,
    TUPLE,
    integer,
)
from mcorefs.pickle_objects import SKIPPED, SPENT, Without
from mcorefs.records import Filled, MetadataIndex, RecordClass, StorageInfo, is_whole, string


class IndexClass(RecordClass):
    __slots__ = ("_needless", "_strings")
    kind = MetadataIndex
    _needless: re.Pattern[bytes]
    _strings: dict[bytes, tuple[object, bool]]
    """What references are to, and whether as an fqn it is not needed."""

    _spelling = re.compile(
        NEW + NAME + STR + NAME + b"(?:N|" + INT + b")(?:" + SHAPE + b")?" + SET, re.DOTALL
    )

    def filled(self, data: bytes, at: int, memo: list[object]) -> Filled:
        if (match := self._spelling.match(data, at)) is None:
            return None
        first, ref, count, text, second, third, long, short, call = match.groups()
        references = (first, None, second, None, third, call)
        if not (
            is_whole(text, count) and self._names_are(("fqn", "index", "offset"), references, memo)
        ):
            return None
        made = MetadataIndex()
        memo += (made, SPENT)
        made.fqn = string(ref, text, memo)
        if third is not None:
            made.offset = offset = self._shape(long, short)
            memo += (offset, SPENT, offset) if call else (offset,)
        return made, match.end()

    def gathered(  # noqa: C901  (one loop: a .metadata has 10^5 of them)
        self,
        data: bytes,
        start: int,
        at: int,
        memo: list[object],
        items: list[object],
        without: Without | None,
    ) -> int:
        """With each its StorageInfo, which is its value in a dict."""
        if self._series is None:
            if (patterns := self._pairs(data, start, at, memo)) is None:
                return start
            self._series, self._needless = patterns
            self._strings = {}
        following, strings = self._series.match, self._strings
        needless_series = self._needless.match
        at = start
        while (match := following(data, at)) is not None:
            ref, count, text, long, short, path_ref, path_count, path_text, offset, length = (
                match.groups()
            )
            if not (is_whole(text, count) and is_whole(path_text, path_count)):
                break
            if text is not None:
                fqn: object = str(text, "utf-8", "backslashreplace")
                needless = without is not None and without(str(fqn))
            elif (known := strings.get(ref)) is not None:
                fqn, needless = known
            else:
                fqn = string(ref, None, memo)
                needless = without is not None and type(fqn) is str and without(fqn)
                strings[ref] = fqn, needless
            end = match.end()
            if needless:
                if data[end] == 0x73:  # SETITEM: the one pair of its dict
                    break
                if text is None and (alike := needless_series(data, at)) is not None:
                    end = alike.end()
                    memo += (SKIPPED,) * (7 * (data.count(OBJECT, at, end) // 2))
                    at = end
                    continue
            index: object = SKIPPED
            info: object = SKIPPED
            place: Shape | None = None
            if not needless:
                if offset_code := short or long:
                    place = self._shapes.get(offset_code) or self._shape(long, short)
                elif long is not None:
                    place = ()
                index = MetadataIndex(fqn, place)
                info = made = StorageInfo(None, integer(offset), integer(length))
                items += (index, info)
            memo += (index, SPENT) if text is None else (index, SPENT, fqn)
            if long is not None or short is not None:
                memo += (SKIPPED, SPENT, SKIPPED) if needless else (place, SPENT, place)
            if path_text is not None:
                path: object = str(path_text, "utf-8", "backslashreplace")
                memo += (info, SPENT, path)
            else:
                memo += (info, SPENT)
                if (known := strings.get(path_ref)) is None:
                    strings[path_ref] = known = string(path_ref, None, memo), False
                path = known[0]
            if not needless:
                made.relative_path = path
            at = end
        return at

    def _pairs(
        self, data: bytes, start: int, at: int, memo: list[object]
    ) -> tuple[re.Pattern[bytes], re.Pattern[bytes]] | None:
        """What an index and its StorageInfo are in this pickle, if one with an offset comes now;
        and a series of those that have one fqn, spelled before, and each put seven things into the
        memo."""
        match = self._spelling.match(data, at)
        if match is None or match[9] is None or not is_whole(match[4], match[3]):
            return None
        first, second, third = match[1], match[5], match[6]
        if not self._names_are(
            ("fqn", "index", "offset"), (first, None, second, None, third, match[9]), memo
        ):
            return None
        width = 2 if data[match.end()] == 0x68 else 5
        end = match.end() + width
        if data[match.end()] not in b"hj":
            return None
        number = int.from_bytes(data[match.end() + 1 : end], "little")
        kind = memo[number] if number < len(memo) else None
        info = kind.names(data, end, memo) if isinstance(kind, InfoClass) else None
        if info is None:
            return None
        head, kind_of_info = (
            re.escape(data[start:at]) + NEW,
            re.escape(data[end - width : end]) + NEW,
        )
        fqn, index, place, path, offset, length = map(re.escape, (first, second, third, *info))
        hint, quantity = b"(?:N|" + INT + b")", b"(" + INT + b")"
        pair = (head + fqn + _STR + index + hint + b"(?:" + place + TUPLE + CALL + b")?" + SET) + (
            kind_of_info + path + _STR + offset + quantity + length + quantity + SET
        )
        hint = b"(?:N|" + PLAIN + b")"
        rest = (index + hint + place + PLAIN_SIZE + SET + kind_of_info + path + REF) + (
            offset + PLAIN + length + PLAIN + SET
        )
        alike = head + fqn + b"(" + REF + b")" + rest
        alike += b"(?:" + head + fqn + rb"\1" + rest + b")*" + OWN
        return re.compile(pair, re.DOTALL), re.compile(alike, re.DOTALL)


_STR = rb"(?:(h.|j.{4})|\x8c(.)([^\x94]{0,255}+)\x94)"


class InfoClass(RecordClass):
    __slots__ = ()
    kind = StorageInfo
    _spelling = re.compile(
        NEW + NAME + STR + NAME + b"(" + INT + b")" + NAME + b"(" + INT + b")" + SET,
        re.DOTALL,
    )

    def filled(self, data: bytes, at: int, memo: list[object]) -> Filled:
        if (match := self._spelling.match(data, at)) is None:
            return None
        first, ref, count, text, second, offset, third, length = match.groups()
        references = (first, None, second, None, third, None)
        names = ("relative_path", "offset", "length")
        if not (is_whole(text, count) and self._names_are(names, references, memo)):
            return None
        made = StorageInfo(None, integer(offset), integer(length))
        memo += (made, SPENT)
        made.relative_path = string(ref, text, memo)
        return made, match.end()

    def names(self, data: bytes, at: int, memo: list[object]) -> tuple[bytes, bytes, bytes] | None:
        """The references to the names of its attributes in an object of this class."""
        match = self._spelling.match(data, at)
        if match is None or not is_whole(match[4], match[3]):
            return None
        first, second, third = match.group(1, 5, 7)
        references = (first, None, second, None, third, None)
        if not self._names_are(("relative_path", "offset", "length"), references, memo):
            return None
        return first, second, third
