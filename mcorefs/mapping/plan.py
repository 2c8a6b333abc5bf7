"""A family applied to one checkpoint: the ordered Hugging Face tensors, or every problem found."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from mcorefs.boxes import Shape
from mcorefs.dtypes import DType
from mcorefs.mapping.family import STACKS, Facts, Family, Rule, is_in, kind
from mcorefs.names import is_of_mtp
from mcorefs.views import Stack, View, to


@dataclass(frozen=True, slots=True)
class HfTensor:
    """One tensor of the Hugging Face model."""

    name: str
    view: View
    storage: str = ""
    """Tensors of one storage are split among files as one, as save_pretrained does with tensors
    that share memory; empty: alone."""
    is_buffer: bool = False
    """save_pretrained does not count it among the model's parameters."""
    keeps_dtype: bool = False
    """--dtype leaves it as stored."""

    @property
    def shape(self) -> Shape:
        return self.view.shape

    @property
    def dtype(self) -> DType:
        return self.view.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.view.shape) * self.view.dtype.itemsize


def plan(
    family: Family, tensors: Mapping[str, View], facts: Facts, dtype: DType | None = None
) -> tuple[list[HfTensor], list[str]]:
    """The tensors of the model in the order of `save_pretrained`, and every problem.

    Problems: a rule whose source is missing, a shape that disagrees with the dims, a canonical
    tensor that no rule uses, an argument that the family cannot express. `dtype` casts on read.
    """
    problems = _Problems()
    used: set[str] = set()
    planned: list[tuple[object, list[HfTensor]]] = []
    for position, rule in enumerate(family.rules):
        layer = -1
        for place in _places(rule, facts):
            sources, missing = _sources(rule, place, facts, tensors)
            used.update(sources)
            if missing is not None:
                problems.missing(rule, missing)
                continue
            name = place.fill(rule.hf)
            view = _apply(rule, name, [tensors[s] for s in sources], facts, dtype, problems)
            if view is None:
                continue
            if not rule.sorts_as or place.layer != layer:
                layer = place.layer  # its experts sort as one, and are of one storage
                storage = _storage(rule, place)
                key = _sort_key(family, rule, name, place, position)
                alike: list[HfTensor] = []
                planned.append(((key, position, place.expert), alike))
            alike.append(HfTensor(name, view, storage, rule.is_buffer, rule.keeps_dtype))
    problems.unused(tensors.keys() - used)
    planned.sort(key=lambda item: item[0])  # type: ignore[arg-type,return-value]
    ordered = [tensor for _, alike in planned for tensor in alike]
    return ordered, [*problems, *_unexpressed(family, facts)]


def cast(tensors: Sequence[HfTensor], dtype: DType | None) -> list[HfTensor]:
    """`tensors` as `plan` casts them."""
    return [
        tensor
        if dtype is None or tensor.keeps_dtype or not tensor.dtype.is_float
        else replace(tensor, view=to(tensor.view, dtype))
        for tensor in tensors
    ]


class _Place(NamedTuple):
    """What the placeholders of a rule stand for; 0 where it has none."""

    layer: int = 0
    expert: int = 0
    mtp: int = 0

    def fill(self, pattern: str) -> str:
        return str(self.expert).join(_around_expert(pattern, self.layer, self.mtp))


@lru_cache(1024)  # all experts of a layer are asked for one after the other
def _around_expert(pattern: str, layer: int, mtp: int) -> list[str]:
    """`pattern` in that layer, in the pieces between which the number of an expert goes."""
    filled = pattern.replace("{layer}", str(layer)).replace("{mtp}", str(mtp))
    return filled.split("{expert}")


def _places(rule: Rule, facts: Facts) -> Iterator[_Place]:
    """The place of each tensor of the rule."""
    if rule.when and rule.when not in facts.kinds:
        return
    first, layers = 0, range(1)
    if rule.stack == "mtp":
        first, layers = facts.dims["layers"], facts.mtp_layers
    elif rule.stack != "decoder":
        layers = range(facts.dims.get(STACKS[rule.stack], 0))
    elif "{layer}" in rule.hf:
        layers = range(facts.dims["layers"])
    experts = range(facts.dims.get("experts", 0)) if "{expert}" in rule.hf else range(1)
    for layer in layers:
        if is_in(rule, layer, facts):
            for expert in experts:
                yield _Place(layer, expert, layer - first)


def _source(rule: Rule, place: _Place, tensors: Mapping[str, View]) -> str | None:
    for source in rule.sources:
        if (name := place.fill(source)) in tensors:
            return name
    return None


def _sources(
    rule: Rule, place: _Place, facts: Facts, tensors: Mapping[str, View]
) -> tuple[list[str], _Place | None]:
    """What one tensor of the rule is made from, and the first place where a part is missing."""
    if not rule.stacks_experts:
        name = _source(rule, place, tensors)
        return ([], place) if name is None else ([name], None)
    places = [place._replace(expert=expert) for expert in range(facts.dims.get("experts", 1))]
    names: list[str] = []
    missing: list[_Place] = []
    for one in places:
        if (name := _source(rule, one, tensors)) is None:
            missing.append(one)
        else:
            names.append(name)
    return names, next(iter(missing), None)


def _apply(
    rule: Rule,
    name: str,
    sources: Sequence[View],
    facts: Facts,
    dtype: DType | None,
    problems: _Problems,
) -> View | None:
    source = sources[0]
    try:
        made = [rule.block(source := view, facts) for view in sources]
        view = Stack(tuple(made), 0) if rule.stacks_experts else made[0]
        dims = facts.dims
        expected = [size if isinstance(size, int) else dims[size] for size in rule.shape]
        if dtype is not None and not rule.keeps_dtype:
            view = to(view, dtype)
    except (KeyError, ValueError, IndexError) as problem:
        why = f"the size {problem} is unknown" if isinstance(problem, KeyError) else str(problem)
        problems.add(rule.hf, f"{name} cannot be made from its source {list(source.shape)}: {why}")
        return None
    if list(view.shape) != expected:
        problems.add(
            rule.hf,
            f"{name} has shape {list(view.shape)}, expected {expected} "
            f"({' x '.join(map(str, rule.shape))})",
        )
    return view


def _sort_key(family: Family, rule: Rule, name: str, place: _Place, position: int) -> object:
    """Sort key that reproduces the order of save_pretrained, where it is followed by the position
    of the rule and the expert."""
    if family.natural_order:
        return natural_key(place.fill(rule.sorts_as) if rule.sorts_as else name)
    key: tuple[int, ...] = (position,)
    if "{expert}" in rule.hf:  # one after the other
        key = (_first(family, "{expert}", lambda other: other.stack == rule.stack), place.expert)
    for placeholder, number in (("{layer}", place.layer), ("{mtp}", place.mtp)):
        if placeholder in rule.hf:
            alike = _first(family, placeholder, lambda other: _stack(other) == _stack(rule))
            return (alike, number, *key)
    return key


def _first(family: Family, placeholder: str, is_alike: Callable[[Rule], bool]) -> int:
    """Position of the first rule that is alike and has the placeholder."""
    return next(i for i, r in enumerate(family.rules) if placeholder in r.hf and is_alike(r))


def _stack(rule: Rule) -> str:
    """Whose layers transformers has in one list: those for multi-token prediction are the last."""
    return "decoder" if rule.stack == "mtp" else rule.stack


def _storage(rule: Rule, place: _Place) -> str:
    """transformers splits what it holds fused into one tensor per projection, whose parts (the
    experts) share its memory (transformers/core_model_loading.py Chunk, SplitModulelist)."""
    return _Place(place.layer, mtp=place.mtp).fill(rule.hf) if rule.sorts_as else ""


@lru_cache(1024)  # all experts of a layer sort as one name
def natural_key(name: str) -> tuple[tuple[int, int, str, int], ...]:
    """Numbers sort as numbers, before words, and so do those at the end of a word
    (transformers/core_model_loading.py dot_natural_key)."""

    def key(part: str) -> tuple[int, int, str, int]:
        if part.isdigit():
            return (0, int(part), "", 0)
        word = part.rstrip("0123456789")
        return (1, 0, word, int(part[len(word) :] or -1))

    return tuple(map(key, name.split(".")))


class _Problems:
    """Problems, with the many of one kind folded into one line."""

    def __init__(self) -> None:
        self._by_rule: dict[str, list[str]] = {}

    def add(self, kind: str, text: str) -> None:
        self._by_rule.setdefault(kind, []).append(text)

    def missing(self, rule: Rule, place: _Place) -> None:
        wanted = " or ".join(map(place.fill, rule.sources))
        self.add(
            f"missing {rule.source}",
            f"{place.fill(rule.hf)} needs {wanted}, which the checkpoint does not hold",
        )

    def unused(self, names: Iterable[str]) -> None:
        for name in sorted(names, key=natural_key):
            hint = " (--no-mtp leaves it out)" if is_of_mtp(name) else ""
            self.add(
                f"unused {kind(name)}",
                f"the checkpoint holds {name}, which this family has no place for{hint}",
            )

    def __iter__(self) -> Iterator[str]:
        for texts in self._by_rule.values():
            more = f" (and {len(texts) - 1} more like it)" if len(texts) > 1 else ""
            yield texts[0] + more


def _unexpressed(family: Family, facts: Facts) -> Iterator[str]:
    for name, allowed in family.requires.items():
        value = facts.arg(name)
        if value is not None and value not in allowed:
            wanted = " or ".join(map(repr, allowed)) or "none"
            yield (
                f"the model was trained with {name}={value!r}, which {family.architecture} cannot "
                f"express (it needs {wanted}): its output would differ"
            )
    yield from (problem for check in family.checks if (problem := check(facts)) is not None)


def doubts(family: Family, tensors: Mapping[str, View], facts: Facts) -> list[str]:
    """What speaks against `family`, whose rules have a use for each kind of tensor there is:
    arguments, and shapes (of the first tensor of each rule)."""
    problems = _Problems()
    for rule in family.rules:
        for place in itertools.islice(_places(rule, facts), 1):
            sources, missing = _sources(rule, place, facts, tensors)
            if missing is None:
                name = place.fill(rule.hf)
                _apply(rule, name, [tensors[s] for s in sources], facts, None, problems)
    unset = [f"{name} is not set" for name in family.given if facts.arg(name) is None]
    if family.named_only:
        unset.append("only its name tells it apart (--family, --hf-config)")
    return [*unset, *_unexpressed(family, facts), *problems]


def against(family: Family, facts: Facts) -> list[str]:
    """Which kinds of tensors `family` lacks, and which it has no place for."""
    used: set[str] = set()
    reasons: list[str] = []
    for rule in family.rules:
        if rule.when and rule.when not in facts.kinds:
            continue
        sources = {kind(re.sub(r"\{\w+\}", "*", source)) for source in rule.sources}
        used |= sources
        is_needed = rule.layers != "dense" or bool(facts.dense_layers)
        if rule.stack != "decoder":
            is_needed = any(True for _ in _places(rule, facts))
        if is_needed and not sources & facts.kinds:
            reasons.append(f"lacks {' or '.join(sorted(sources))}")
    reasons += [f"has {name}" for name in sorted(facts.kinds - used)]
    return list(dict.fromkeys(reasons))
