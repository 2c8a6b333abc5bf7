"""What a pickle makes and fills as it is carried out: names, objects, and the rules of filling.

Nothing is imported, called or set by a pickle except through `Name` and `Built`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mcorefs.dtypes import DType

MAX_KEY = 64
"""Longest tuple that can be a key."""
_SCALARS = frozenset((str, int, float, bool, bytes, type(None)))


class PickleError(Exception):
    """Not a pickle that the machine carries out: what, and at which byte."""


class Name:
    """What a global name in a pickle stands for."""

    __slots__ = ()

    def call(self, args: tuple[object, ...]) -> object:
        """The object that a pickle makes by calling this with `args`, in constant time."""
        raise PickleError("something that is not a class is called")

    def filled(self, data: bytes, at: int, memo: list[object]) -> tuple[object, int] | None:
        """The object that the opcodes from `at` on make of this class and fill, and where they end;
        the memo is as they would have left it, but may have SPENT in it for the attributes and the
        arguments on the way. None, and an untouched memo, leaves it all to the machine."""
        return None

    def gathered(
        self,
        data: bytes,
        start: int,
        at: int,
        memo: list[object],
        items: list[object],
        without: Without | None,
    ) -> int:
        """Do what `filled` does for a series of objects: put them behind `items`, as the opcodes
        from `start` on would, and say where those end. `at` is behind the first, which refers to
        this. Pairs that `without` makes needless are left out. `start` leaves it all to others."""
        return start

    def skipped(self, data: bytes, at: int, memo: list[object]) -> int | None:
        """Where the opcodes end that `filled` would begin with, without making the object: the memo
        is as long as they would have left it, with SKIPPED in it. None: it has to be made."""
        return None


class Built:
    """An object that a pickle goes on to fill, with as much time as the filling is long.

    As a key it is only itself: no subclass defines equality.
    """

    __slots__ = ()

    def set_state(self, state: object) -> None:
        raise PickleError(f"an unexpected state for {type(self).__name__}")

    def extend(self, items: list[object]) -> None:
        raise PickleError(f"unexpected items for {type(self).__name__}")

    def update(self, pairs: Iterable[tuple[object, object]]) -> None:
        raise PickleError(f"unexpected items for {type(self).__name__}")


class SkippedError(PickleError):
    """What was skipped is referred to: all has to be read."""


SPENT = object()
"""Stands in a memo for what a pickler memoizes but never refers to again."""
SKIPPED = object()
"""Stands for what the caller does without."""


def recalled(value: object) -> object:
    """`value`, from a memo. Raises PickleError where it was not kept."""
    if value is SPENT:
        raise PickleError("it refers to attributes or arguments once more")
    if value is SKIPPED:
        raise SkippedError("it refers to what was skipped")
    return value


Without = Callable[[str], bool]
"""without(name): whether what a pickle keeps under `name` is not needed."""
Find = Callable[[str, str], object]
"""find(module, name): a Name, or a value that the name itself is (a dtype)."""


def set_items(target: object, items: list[object]) -> None:
    if len(items) % 2:
        raise PickleError("a key has no value")
    if type(target) is dict:
        pairs = iter(items)
        for key in pairs:
            if type(key) is not str:
                check_key(key)
            target[key] = next(pairs)
    elif isinstance(target, Built):
        type(target).update(target, zip(items[::2], items[1::2], strict=True))
    else:
        raise PickleError("items are set in what is not a dict")


def extend_with(target: object, items: list[object]) -> None:
    if type(target) is list:
        target.extend(items)
    elif isinstance(target, Built):
        type(target).extend(target, items)
    else:
        raise PickleError("items are added to what is not a list")


def build(target: object, state: object) -> None:
    if isinstance(target, Built):
        type(target).set_state(target, state)
    elif type(target) is not dict:  # an OrderedDict may have attributes (torch: _metadata)
        raise PickleError("attributes are set on what has none")


def check_key(key: object) -> None:
    """Raise unless hashing and comparing `key` take no time."""
    if _is_simple(key):
        return
    flat = type(key) is tuple and len(key) <= MAX_KEY
    if not (flat and all(_is_simple(part) for part in key)):  # type: ignore[attr-defined]
        raise PickleError(f"a {type(key).__name__} of this kind is no key")


def _is_simple(key: object) -> bool:
    return type(key) in _SCALARS or isinstance(key, _IDENTITIES)


_IDENTITIES = (Built, Name, DType)
