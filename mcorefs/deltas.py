"""What an adapter in Megatron's format adds to each tensor of a Hugging Face model.

The product of its matrices lies as the Megatron weight that it was trained for: q, k and v in
groups, gate above up. A family says which rows of that weight are which Hugging Face tensor; the
same rows of the product are what that tensor gets. So the adapter is merged into a model of
nothings, whose canonical tensors have the shapes that the Hugging Face tensors and the adapter
prove, and the family makes of those what it makes of any. Where it does more than move elements
about (norms around zero), that is for weights, not for what is added to them, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mcorefs import adapters, catalog, interleaving
from mcorefs.adapters import Adapter, Problems, Saved, Terms
from mcorefs.arithmetic import FLOATS, Add, Addmm, Nothing
from mcorefs.boxes import Shape
from mcorefs.mapping import config as configs
from mcorefs.mapping.choose import by_name
from mcorefs.mapping.facts import gather
from mcorefs.mapping.family import Facts, Family, Rule, kind
from mcorefs.mapping.plan import HfTensor, plan
from mcorefs.mapping.reference import Reference
from mcorefs.names import VISION
from mcorefs.sources import Sources
from mcorefs.views import (
    Computed,
    Flatten,
    Narrow,
    Permute,
    Select,
    Stored,
    Unflatten,
    View,
    to,
)

_PLACEHOLDER = re.compile(r"\\\{(\w+)\\\}")
_NORM = re.compile(r"\.layer_norm_(?:weight|bias)$")
_OF_ITS_VOCABULARY = ("padded_vocab_size", "vocab_size", "make_vocab_size_divisible_by")
"""Arguments that say how many rows Megatron's embedding has: those of a Hugging Face model are not
padded."""


def add_to(
    tensors: Sequence[HfTensor], source: Sources, scale: float | None, reference: Reference
) -> tuple[list[HfTensor], list[str]]:
    """(`tensors` of the model with the config.json `reference`, with the adapter of `source` in
    them; every problem). `scale` replaces alpha / r.

    Raises MappingError where the model is of no family that is known.
    """
    assert source.adapted is not None
    family = by_name(str(reference.config.get("model_type")), f"model_type in {reference.where}")
    canonical = catalog.build(source.checkpoint.tensors)
    args = _arguments(source)
    outline = _outline(family, tensors, canonical.adapter, reference)
    adapter = adapters.sort_out(canonical.adapter, dict.fromkeys(outline.shapes, Nothing(())))
    model: dict[str, View] = {
        name: Nothing(shape) for name, shape in outline.with_pairs(adapter).items()
    }
    _, in_turns = interleaving.undone(model, args, source.companions.trainer, bool(adapter.pairs))
    changed = {**model, **adapter.whole}
    facts, _, problems = gather(changed, args, reference)
    bare, _, _ = gather(changed, {}, reference)
    adapted = source.adapted
    terms = Terms(adapted.training, scale, facts.dims, Saved.of(args, adapted.format))
    merged, faults = adapters.merge(adapter, changed, terms)
    planned, more = _planned(family, merged, facts, adapter, model)
    problems = [
        *(*canonical.problems, *in_turns, *problems, *adapter.problems, *faults, *more),
        *_contradictions(family, facts, bare, reference),
    ]
    return _added(tensors, planned, problems)


def _contradictions(family: Family, facts: Facts, bare: Facts, reference: Reference) -> list[str]:
    """Where the arguments of the run, which `bare` is without, speak against config.json. What the
    model of nothings does not hold says nothing."""
    said, unsaid = (
        configs.synthesise(family, known, reference, {}, facts.dtype)[2] for known in (facts, bare)
    )
    return [problem for problem in said if problem not in unsaid]


def _arguments(source: Sources) -> dict[str, object]:
    args = source.companions.args
    return {
        name: value
        for name, value in args.items()
        if name not in _OF_ITS_VOCABULARY and not name.startswith("mtp_")
    }


# -- the model of nothings -------------------------------------------------------------------------


@dataclass
class _Outline:
    """Canonical names and shapes of the tensors that a Hugging Face model would be saved from."""

    shapes: dict[str, Shape] = field(default_factory=dict)

    def add(self, name: str, shape: Shape) -> None:
        """A part of `name`: parts lie one above the other."""
        if name in self.shapes:
            before = self.shapes[name]
            shape = (before[0] + shape[0], *shape[1:]) if before and shape else shape
        self.shapes[name] = shape

    def with_pairs(self, adapter: Adapter) -> dict[str, Shape]:
        """Those of weights that the adapter has a pair for are shown by that."""
        shapes = dict(self.shapes)
        for module, parts in adapter.pairs.items():
            pair = parts.get("")
            for name in (f"{module}.weight", f"{module}.weight.joined"):
                if name in shapes and pair is not None and pair.b.shape and pair.a.shape:
                    shapes[name] = (pair.b.shape[0], pair.a.shape[-1])
        return shapes


def _outline(
    family: Family,
    tensors: Sequence[HfTensor],
    added: Mapping[str, View],
    reference: Reference,
) -> _Outline:
    """By the rules of `family`, each read backwards. Left out are norms that may be in several
    places, and what several rules may be about: of hybrids, what the layer is decides."""
    sees = any(name.startswith(VISION) for name in added)
    layers = reference.text.config.get("num_hidden_layers")
    meant: dict[str, list[tuple[Rule, dict[str, int]]]] = {}
    for rule in family.rules:
        if rule.stack == "mtp" or (rule.sources[0].startswith(VISION) and not sees):
            continue
        if len(rule.sources) > 1 and any(map(_NORM.search, rule.sources)):
            continue
        for name, place in _matches(rule, tensors):
            is_mtp = rule.stack == "decoder" and type(layers) is int and place["layer"] >= layers
            if not is_mtp:
                meant.setdefault(name, []).append((rule, place))
    found = _Outline()
    for tensor in tensors:
        if len(rules := meant.get(tensor.name, [])) == 1:
            _add(found, *rules[0], tensor.shape, added)
    return found


def _matches(rule: Rule, tensors: Iterable[HfTensor]) -> Iterator[tuple[str, dict[str, int]]]:
    """Tensors that `rule` may be about, and for what its placeholders stand there."""
    pattern = re.compile(_PLACEHOLDER.sub(r"(?P<\1>\\d+)", re.escape(rule.hf)))
    start = rule.hf.partition("{")[0]
    for tensor in tensors:
        if tensor.name.startswith(start) and (match := pattern.fullmatch(tensor.name)):
            numbers = {name: int(number) for name, number in match.groupdict().items()}
            yield tensor.name, {"layer": 0, "expert": 0, "mtp": 0, **numbers}


def _add(
    found: _Outline, rule: Rule, place: dict[str, int], shape: Shape, added: Mapping[str, View]
) -> None:
    if not rule.stacks_experts:
        found.add(_named(rule, place, added), shape)
    elif shape:
        for expert in range(shape[0]):
            # Which way it lies is shown by the adapter, if by anything.
            found.add(_named(rule, {**place, "expert": expert}, added), shape[1:])


def _named(rule: Rule, place: Mapping[str, int], added: Mapping[str, View]) -> str:
    """The source of `rule` that the adapter changes, or else the first."""
    names = [source.format(**place) for source in rule.sources]
    for name in names if len(names) > 1 else ():
        module = name.removesuffix(".joined").removesuffix(".weight")
        if any(key.startswith(f"{module}.") for key in added):
            return name
    return names[0]


# -- what is added ---------------------------------------------------------------------------------


def _planned(
    family: Family,
    merged: Mapping[str, View],
    facts: Facts,
    adapter: Adapter,
    model: Mapping[str, View],
) -> tuple[list[HfTensor], list[str]]:
    """The Hugging Face tensors of `merged` that may be changed, and every problem."""
    changed = {kind(name) for name, view in merged.items() if view is not model.get(name)}
    rules = tuple(rule for rule in family.rules if changed & set(_kinds(rule)))
    kinds = {one for rule in rules for one in _kinds(rule)}
    used = {
        name: view for name, view in merged.items() if kind(name) in kinds or name in adapter.whole
    }
    return plan(family.but(rules=rules), used, facts)


def _kinds(rule: Rule) -> Iterator[str]:
    return (kind(re.sub(r"\{\w+\}", "0", source)) for source in rule.sources)


def _added(
    tensors: Sequence[HfTensor], planned: Iterable[HfTensor], found: Iterable[str]
) -> tuple[list[HfTensor], list[str]]:
    """`tensors` with what is `planned` of them; `found`: the problems so far."""
    views = {tensor.name: tensor.view for tensor in tensors}
    problems = Problems()
    for tensor in planned:
        of = set(_bases(tensor.view))
        if of <= {_NOTHING}:
            continue
        if (view := views.get(tensor.name)) is None:
            problems.add(f"the adapter changes {tensor.name}, which the base model does not hold")
        elif view.shape != tensor.shape:
            problems.add(
                f"what the adapter makes of {tensor.name} has shape {list(tensor.shape)}, in the "
                f"base model it is {list(view.shape)}"
            )
        elif not {view.dtype, tensor.dtype} <= set(FLOATS):
            problems.add(f"the adapter changes {tensor.name}, which is {view.dtype.torch}")
        elif of == {_WHOLE}:
            views[tensor.name] = to(tensor.view, view.dtype)
        elif _WHOLE in of or not _is_sum(tensor.view):
            problems.add(f"what the adapter makes of {tensor.name} is no sum")
        else:
            views[tensor.name] = _sum(view, tensor.view)
    merged = [replace(tensor, view=views[tensor.name]) for tensor in tensors]
    return merged, [*found, *problems]


_NOTHING, _PRODUCT, _WHOLE = "nothing", "product", "whole"


def _bases(view: View) -> Iterator[str]:
    """What `view` is made of: nothing, products that are added to nothing, weights."""
    if isinstance(view, Nothing):
        yield _NOTHING
    elif isinstance(view, Addmm):
        yield from (_PRODUCT if base == _NOTHING else base for base in _bases(view.source))
    elif isinstance(view, Stored):
        yield _WHOLE
    for source in () if isinstance(view, Addmm) else view.sources:
        yield from _bases(source)


def _sum(view: View, delta: View) -> View:
    """`view` + `delta`. Of a product whose rows alone are moved about, in one step: those of its
    first factor are."""
    moves: list[View] = []
    inner = delta
    while _moves_rows(inner):
        moves.append(inner)
        (inner,) = inner.sources
    if not (isinstance(inner, Addmm) and isinstance(inner.source, Nothing)):
        return Add(view, delta)
    rows = inner.mat1
    for move in reversed(moves):
        rows = replace(move, source=rows)  # type: ignore[type-var]
    return Addmm(view, rows, inner.mat2, inner.alpha, inner.product)


def _moves_rows(view: View) -> bool:
    """Whether it moves about elements of its source, along other axes than the last."""
    match view:
        case Narrow(source=source, axis=axis) | Select(source=source, axis=axis):
            return axis < len(source.shape) - 1
        case Unflatten(source=source, axis=axis):
            return axis < len(source.shape) - 1
        case Flatten(source=source, axis=axis, count=count):
            return axis + count < len(source.shape)
        case Permute(dims=dims):
            return dims[-1] == len(dims) - 1
    return False


def _is_sum(view: View) -> bool:
    """Whether `view` only moves about the elements of products."""
    if isinstance(view, Addmm | Nothing):
        return True
    return not isinstance(view, Computed) and all(map(_is_sum, view.sources))
