"""Hugging Face tensors with an adapter in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from mcorefs.adapters import Pair, Problems, scale_of
from mcorefs.arithmetic import Add, Addmm, Nothing
from mcorefs.dtypes import F32
from mcorefs.mapping.plan import HfTensor
from mcorefs.peft.files import CONFIG, PeftAdapter
from mcorefs.views import View, to

_FUSED = re.compile(r"\.experts(?:\.base_layer)*$")
_NOT_HELD = "the base model does not hold"
_TIED = re.compile(r"(?:^|\.)(?:lm_head|embed_tokens|wte|word_embeddings)\.weight$")


@dataclass(frozen=True)
class Base:
    """What is known of the model that an adapter is merged into."""

    tied: bool
    """Its output layer is its embedding."""
    sees: bool
    """It is a language model and a vision model, for which transformers' modules and files have
    different prefixes."""


def merge(
    tensors: Sequence[HfTensor], adapter: PeftAdapter, scale: float | None, base: Base
) -> tuple[list[HfTensor], list[str]]:
    """(`tensors` with the adapter's in them, every problem); `scale` replaces alpha / r."""
    problems = Problems()
    views = {tensor.name: tensor.view for tensor in tensors}
    targets = _Targets(frozenset(views), base.sees, problems)
    for parameter, trained in adapter.whole.items():
        if (name := targets.of(parameter)) is not None:
            try:
                views[name] = _in_place_of(views[name], trained)
            except ValueError as problem:
                problems.add(f"{name}, which was trained whole, does not fit: {problem}")
    for module, pair in adapter.pairs.items():
        if (name := targets.of_module(module)) is not None:
            try:
                used = _scale(adapter, module, pair) if scale is None else scale
                views[name] = _added(views[name], pair, used, module in adapter.rounded)
            except ValueError as problem:
                problems.add(f"the adapter of {name} does not fit: {problem}")
    unfit = untied(targets.found) if base.tied else []
    merged = [replace(tensor, view=views[tensor.name]) for tensor in tensors]
    return merged, [*adapter.problems, *problems, *unfit]


def untied(changed: Iterable[str]) -> list[str]:
    """What is wrong if those tensors are changed of a model whose output layer is its embedding."""
    both = sorted(name for name in changed if _TIED.search(name))
    return [
        f"the adapter changes {name}, but the output layer of the base model is its embedding: "
        "with it they would be two"
        for name in both[:1]
    ]


def _in_place_of(view: View, trained: View) -> View:
    if trained.shape != view.shape:
        raise ValueError(f"it has shape {list(trained.shape)}, in the model {list(view.shape)}")
    return to(trained, view.dtype)


def _added(weight: View, pair: Pair, scale: float, is_rounded: bool) -> View:
    if pair.a.dtype != pair.b.dtype:
        raise ValueError(f"A and B are {pair.a.dtype.torch} and {pair.b.dtype.torch}")
    if not is_rounded or weight.dtype == F32:
        return Addmm(weight, pair.b, pair.a, scale, F32)
    product = Addmm(Nothing(weight.shape), pair.b, pair.a, scale, F32)
    return Add(weight, to(product, weight.dtype))


def _scale(adapter: PeftAdapter, module: str, pair: Pair) -> float:
    stated = adapter.ranks.value(module)
    stated = adapter.training.rank if stated is None else stated
    if stated != pair.rank:
        raise ValueError(f"its rank is {pair.rank}, {CONFIG} says {stated}")
    alpha = adapter.alphas.value(module)
    training = adapter.training
    return scale_of(pair.rank, training if alpha is None else replace(training, alpha=alpha))


_PLACES = (
    "model.language_model.",
    "language_model.model.",
    "model.visual.",
    "language_model.",
    "visual.",
    "model.",
    "",
)
"""Where modules and files have the parts of a model that sees, the longest first (transformers:
src/transformers/conversion_mapping.py)."""


@dataclass(frozen=True)
class _Targets:
    """Finds the tensors of the base model that names of an adapter mean."""

    held: frozenset[str]
    sees: bool
    problems: Problems
    found: dict[str, str] = field(default_factory=dict)
    """By tensor, the name that meant it."""

    def of_module(self, module: str) -> str | None:
        """The weight of `module`."""
        if _FUSED.search(module):
            self.problems.add(
                f"the adapter changes the fused experts of {module} (target_parameters), whose "
                "columns PEFT and Megatron-Bridge write in different orders: let the framework "
                "that trained it merge it"
            )
            return None
        return self.of(f"{module}.weight")

    def of(self, name: str) -> str | None:
        """The tensor `name`; None, and a problem, where there is none."""
        found = self.held & {name}
        if not found and self.sees:
            found = self.held & set(_spellings(name))
        if len(found) != 1:
            why = f"could be any of {', '.join(sorted(found))}" if found else _NOT_HELD
            self.problems.add(f"the adapter changes {name}, which {why}")
            return None
        (target,) = found
        if self.found.setdefault(target, name) != name:
            self.problems.add(f"the adapter changes {target} by two names")
        return target


def _spellings(name: str) -> Iterator[str]:
    place = next(place for place in _PLACES if name.startswith(place))
    sees = "visual" in place
    for other in _PLACES:
        if ("visual" in other) == sees:
            yield other + name.removeprefix(place)
