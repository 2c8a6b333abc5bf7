"""LoRA adapters, merged into the weights that they were trained on top of.

    X.lora_A.default.weight  [r, in]    X.lora_B.default.weight  [out, r]       ms-swift, by PEFT
    X.adapter.linear_in.weight          X.adapter.linear_out.weight             Megatron-Bridge
    X.adapter.adapter_q.linear_in.weight, ... for q, k, v, gate and up          its CanonicalLoRA
    X.modules_to_save.default.weight    trained whole, instead of X.weight      PEFT

X.weight becomes X.weight + scale * (B @ A), with scale = alpha / r. The framework that trained the
adapter decides how that is rounded: Megatron-Bridge merges in float32, ms-swift in the dtype of the
adapter, to which it rounds product and scaled product before the sum.

Rows of B lie as those of the weight, but for what is cut over tensor-parallel ranks by sections. Of
linear_fc1 ms-swift keeps the gate, then the up rows of one rank after the other; Megatron-Bridge's
rows of a gate alone (or an up alone) lie as if the first half of each rank's were a gate. Of the
in_proj of megatron-core's gated delta nets all sections of one rank come before the next. Sources:
mcore-bridge:src/mcore_bridge/tuners/lora.py,
Megatron-Bridge:src/megatron/bridge/peft/{lora,canonical_lora,utils}.py and
models/conversion/peft_bridge.py _merge_single_adapter_weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from mcorefs.arithmetic import Addmm
from mcorefs.catalog import gate_above_up
from mcorefs.dtypes import F32
from mcorefs.trainers import LoraTraining
from mcorefs.views import Cat, Flatten, Narrow, Permute, Unflatten, View, leaves

_PEFT = re.compile(r"(.+)\.lora_([AB])\.([^.]+)\.weight$")
_PEFT_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])\.([^.]+)$")
_PEFT_WHOLE = re.compile(r"(.+)\.modules_to_save\.([^.]+)\.(.+)$")
_BRIDGE = re.compile(r"(.+)\.adapter\.(?:adapter_(q|k|v|gate|up)\.)?linear_(in|out)\.weight$")
_DORA = re.compile(r"\.(lora_magnitude_vector|adapter\.weight_magnitude)\b")
_EXPERT = re.compile(r"(.+\.mlp\.experts\.)(\d+)(\..+)\.weight$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
TORCH_DIST = "torch_dist"
_DEFAULT = "default"
"""PEFT's name of an adapter that is given none."""


@dataclass(frozen=True)
class Pair:
    """A and B of one weight, or of a part of it."""

    a: View
    b: View

    @property
    def rank(self) -> int:
        return self.a.shape[0] if self.a.shape else 0


@dataclass(frozen=True)
class Adapter:
    """The tensors of an adapter, sorted out."""

    kind: Literal["peft", "bridge"]
    pairs: Mapping[str, Mapping[str, Pair]]
    """By module ("decoder.layers.0.mlp.linear_fc2"), then by the part of its weight that they are
    for: "q", "k", "v", "gate", "up", "embedding", or "" for all of it."""
    whole: Mapping[str, View]
    """Tensors of the model that were trained whole, by their names."""
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outline:
    """What there is to say about an adapter, by its tensors."""

    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    """Names of the modules that it changes, without where they are."""
    whole: tuple[str, ...]
    """Names of those that were trained whole."""


@dataclass(frozen=True)
class Saved:
    """How the run that saved an adapter was cut; None where that is not known."""

    tp: int | None
    etp: int | None
    format: str = TORCH_DIST

    @classmethod
    def of(cls, args: Mapping[str, object], format_: str) -> Saved:
        tp, etp = (
            size if type(size := args.get(name)) is int and size > 0 else None
            for name in ("tensor_model_parallel_size", "expert_tensor_parallel_size")
        )
        return cls(tp, tp if etp is None else etp, format_)


# -- what there is ---------------------------------------------------------------------------


def sort_out(tensors: Mapping[str, View], base: Mapping[str, View]) -> Adapter:
    """The adapter that `tensors` (by canonical names) are; what all experts share is that of each
    expert in `base`."""
    problems = Problems()
    bridge = [name for name in tensors if _BRIDGE.match(name)]
    named, remarks = _chosen(tensors, problems)
    factors: dict[tuple[str, str], dict[str, View]] = {}
    whole: dict[str, View] = {}
    for name, view in _for_each_expert(named, base):
        if match := _PEFT.match(name):
            factors.setdefault((match[1], ""), {})[match[2]] = view
        elif match := _PEFT_EMBEDDING.match(name):
            factors.setdefault((match[1], "embedding"), {})[match[2]] = view
        elif match := _BRIDGE.match(name):
            side = {"in": "A", "out": "B"}[match[3]]
            factors.setdefault((match[1], match[2] or ""), {})[side] = view
        elif match := _PEFT_WHOLE.match(name):
            whole[f"{match[1]}.{match[3]}"] = view
        elif _DORA.search(name):
            problems.add(
                f"the adapter is a DoRA ({name}), which cannot be merged on read; let the "
                "framework that trained it do that"
            )
        else:
            problems.add(f"the adapter holds {name}, which is not known")
    if bridge and any(_PEFT.match(name) for name in tensors):
        problems.add("it holds adapters of two frameworks, which round differently")
    pairs: dict[str, dict[str, Pair]] = {}
    for (module, part), sides in factors.items():
        if set(sides) != {"A", "B"}:
            problems.add(f"the adapter of {module} has only its {''.join(sides)} matrix")
        else:
            pairs.setdefault(module, {})[part] = Pair(sides["A"], sides["B"])
    return Adapter("bridge" if bridge else "peft", pairs, whole, tuple(problems), remarks)


def outline(tensors: Mapping[str, View]) -> Outline:
    """Of an adapter, by canonical names."""
    ranks: set[int] = set()
    targets: set[str] = set()
    whole: set[str] = set()
    for name, view in tensors.items():
        if match := _PEFT_WHOLE.match(name):
            whole.add(match[1].rpartition(".")[2])
        elif match := _PEFT.match(name) or _PEFT_EMBEDDING.match(name) or _BRIDGE.match(name):
            targets.add(match[1].rpartition(".")[2])
            if "A" in match.groups() or "in" in match.groups():
                ranks.add(view.shape[0] if view.shape else 0)
    return Outline(tuple(sorted(ranks)), tuple(sorted(targets)), tuple(sorted(whole)))


def _chosen(
    tensors: Mapping[str, View], problems: Problems
) -> tuple[Mapping[str, View], tuple[str, ...]]:
    """Those of one of PEFT's adapters: runs with a reference policy keep a second one."""
    of: dict[str, str] = {}
    for name in tensors:
        for pattern, group in ((_PEFT, 3), (_PEFT_EMBEDDING, 3), (_PEFT_WHOLE, 2)):
            if match := pattern.match(name):
                of[name] = match[group]
    names = set(of.values())
    if len(names) < 2:
        return tensors, ()
    if _DEFAULT not in names:
        problems.add(f"it holds several adapters: {', '.join(sorted(names))}")
    others = ", ".join(sorted(names - {_DEFAULT}))
    kept = {name: view for name, view in tensors.items() if of.get(name, _DEFAULT) == _DEFAULT}
    return kept, (f"of the adapters that it holds, {others} is left aside",)


def _for_each_expert(
    tensors: Mapping[str, View], base: Mapping[str, View]
) -> Iterator[tuple[str, View]]:
    experts: dict[str, dict[str, None]] = {}
    for name in base if tensors else ():
        if match := _EXPERT.match(name):
            experts.setdefault(match[1], {})[match[2]] = None
    for name, view in tensors.items():
        before, shared, rest = name.partition(".mlp.experts.*.")
        if not shared:
            yield name, view
        for expert in experts.get(f"{before}.mlp.experts.", ()) if shared else ():
            yield f"{before}.mlp.experts.{expert}.{rest}", view


# -- what becomes of it ----------------------------------------------------------------------


@dataclass(frozen=True)
class Terms:
    """What merging needs to know beside the tensors."""

    training: LoraTraining
    scale: float | None
    """What the user gives in place of alpha / r."""
    dims: Mapping[str, int]
    """Sizes of the model (`mapping.facts`): the parts of CanonicalLoRA are cut by them."""
    saved: Saved


def merge(
    adapter: Adapter, base: Mapping[str, View], terms: Terms
) -> tuple[dict[str, View], list[str]]:
    """(the tensors that those of `base` become, every problem)."""
    tensors = dict(base)
    problems = Problems()
    if adapter.pairs and terms.scale is None and terms.training.alpha is None:
        problems.add(
            "nothing says how the adapter is scaled (alpha / r): give it with --adapter PATH:SCALE"
        )
        return tensors, list(problems)
    for module, parts in adapter.pairs.items():
        name = next((n for n in _names(module) if n in base), None)
        if name is None:
            problems.add(f"the adapter changes {module}.weight, which the base model does not hold")
            continue
        try:
            tensors[name] = _Merger(adapter.kind, module, base[name], base, terms).merged(parts)
        except ValueError as problem:
            problems.add(f"the adapter of {name} does not fit: {problem}")
    return tensors, list(problems)


def _names(module: str) -> tuple[str, str]:
    """What the weight of a module may be called (`catalog`)."""
    return f"{module}.weight", f"{module}.weight.joined"


def scale_of(rank: int, training: LoraTraining) -> float:
    """What B @ A of that rank is multiplied with, as in training."""
    if training.alpha is None or rank <= 0:
        raise ValueError(f"alpha {training.alpha} over rank {rank}")
    return training.alpha / (math.sqrt(rank) if training.is_rank_stabilised else rank)


@dataclass(frozen=True)
class _Merger:
    """Merges the pairs of one module. Methods raise ValueError where something does not fit."""

    kind: Literal["peft", "bridge"]
    module: str
    weight: View
    base: Mapping[str, View]
    terms: Terms

    def merged(self, parts: Mapping[str, Pair]) -> View:
        """The module's weight with `parts` added."""
        views = [self.weight, *(view for pair in parts.values() for view in (pair.a, pair.b))]
        if any(len(view.shape) != 2 for view in views):
            raise ValueError(f"not all are matrices: {[list(view.shape) for view in views]}")
        if "embedding" in parts:
            pair = parts["embedding"]
            transposed = Pair(Permute(pair.b, (1, 0)), Permute(pair.a, (1, 0)))
            return self._added(self.weight, transposed)
        if "" in parts:
            return self._added(self.weight, self._in_order(parts[""]))
        if "gate" in parts or "up" in parts:
            return self._gate_and_up(parts)
        return self._queries_and_keys(parts)

    def _added(self, weight: View, pair: Pair) -> View:
        if pair.a.dtype != pair.b.dtype:
            raise ValueError(f"A is {pair.a.dtype.torch} but B is {pair.b.dtype.torch}")
        product = F32 if self.kind == "bridge" else pair.a.dtype
        return Addmm(weight, pair.b, pair.a, self._scale(pair), product)

    def _scale(self, pair: Pair) -> float:
        """Of a pair whose rank is what training says; experts may have a smaller one
        (normalize_moe_lora)."""
        training = self.terms.training
        if self.terms.scale is not None:
            return self.terms.scale
        stated = training.rank
        if stated not in (None, pair.rank) and ".experts." not in self.module:
            raise ValueError(f"its rank is {pair.rank}, that of the run was {stated}")
        return scale_of(pair.rank, training)

    def _in_order(self, pair: Pair) -> Pair:
        """With the rows of B as those of the weight."""
        if f"{self.module}.weight.joined" in self.base:
            return replace(pair, b=self._sections_joined(pair.b))
        if not self.module.endswith(".linear_fc1"):
            return pair
        ranks = self._ranks(pair.b)
        if ranks == 1:
            return pair
        if not self._is_gated():
            if self.kind == "peft":
                return pair
            # Releases of Megatron-Bridge differ in whether they cut it as if it were gated.
            raise ValueError(f"how {ranks} ranks cut a linear_fc1 that is not gated cannot be told")
        return replace(pair, b=gate_above_up(pair.b, ranks)) if self.kind == "peft" else pair

    def _sections_joined(self, b: View) -> View:
        """Each section of a gated delta net's in_proj, of what has all of a rank's together."""
        if self.kind == "peft":
            raise ValueError("ms-swift's gated delta nets have their rows in another order")
        ranks, dims = self._ranks(b), self.terms.dims
        mixed, values = dims.get("linear_mixed", 0), dims.get("linear_values", 0)
        keys, heads = (mixed - values) // 2, dims.get("linear_value_heads", 0)
        sections = (keys, keys, values, values, heads, heads)
        if sum(sections) != b.shape[0] or any(size % ranks for size in sections):
            raise ValueError(
                f"{ranks} ranks and the sizes {list(sections)} do not explain its rows"
            )
        by_rank = Unflatten(b, 0, (ranks, b.shape[0] // ranks))
        start, found = 0, []
        for size in (size // ranks for size in sections):
            found.append(Flatten(Narrow(by_rank, 1, start, size), 0, 2))
            start += size
        return Cat(tuple(found), 0)

    def _is_gated(self) -> bool:
        """Its rows are twice what linear_fc2 takes in."""
        down = self.base.get(f"{self.module.removesuffix('1')}2.weight")
        return down is None or self.weight.shape[0] == 2 * down.shape[-1]

    def _ranks(self, b: View, pieces: int = 1) -> int:
        """Over how many ranks the rows of the module were cut, each saved in so many pieces."""
        saved = self.terms.saved
        stated = saved.etp if ".experts." in self.module else saved.tp
        if saved.format != TORCH_DIST and stated != 1:
            name = self.module.rpartition(".")[2]
            raise ValueError(f"how ranks cut {name} in format {saved.format} is not known")
        return stated or max(1, _row_pieces(b) // pieces)

    def _gate_and_up(self, parts: Mapping[str, Pair]) -> View:
        rows = self.weight.shape[0] // 2
        halves: list[View] = []
        for number, part in enumerate(("gate", "up")):
            half: View = Narrow(self.weight, 0, number * rows, rows)
            if pair := parts.get(part):
                b = _halves_of_ranks(pair.b, self._ranks(pair.b, 2))
                half = self._added(half, replace(pair, b=b))
            halves.append(half)
        return Cat(tuple(halves), 0)

    def _queries_and_keys(self, parts: Mapping[str, Pair]) -> View:
        dims = self.terms.dims
        groups, queries, keys = (dims.get(name) for name in ("groups", "q_rows", "kv_rows"))
        if not (groups and queries and keys):
            raise ValueError("the number of heads is not known")
        proj = self.base.get(f"{self.module.removesuffix('qkv')}proj.weight")
        if proj is not None and proj.shape[-1] != queries:
            raise ValueError(
                f"it has other heads than those of other layers, {queries} rows in all"
            )
        sizes = (queries // groups, keys // groups, keys // groups)
        grouped = Unflatten(self.weight, 0, (groups, sum(sizes)))
        start, found = 0, []
        for part, size in zip("qkv", sizes, strict=True):
            rows: View = Flatten(Narrow(grouped, 1, start, size), 0, 2)
            if pair := parts.get(part):
                rows = self._added(rows, pair)
            found.append(Unflatten(rows, 0, (groups, size)))
            start += size
        return Flatten(Cat(tuple(found), 1), 0, 2)


def _halves_of_ranks(b: View, ranks: int) -> View:
    """Rows rank by rank, of what holds the first half of each rank's, then the second halves."""
    if ranks == 1:
        return b
    parts = Unflatten(b, 0, (2, ranks, b.shape[0] // (2 * ranks)))
    return Flatten(Permute(parts, (1, 0, *range(2, len(parts.shape)))), 0, 3)


def _row_pieces(view: View) -> int:
    """In how many pieces the rows of a matrix were saved."""
    tensor = next(leaves(view))
    return len({chunk.box.offsets[-2] for chunk in tensor.chunks})


class Problems:
    """Problems, with the many of one kind folded into one line."""

    def __init__(self) -> None:
        self._by_kind: dict[str, list[str]] = {}

    def add(self, text: str) -> None:
        self._by_kind.setdefault(_NUMBER.sub("*", text), []).append(text)

    def __iter__(self) -> Iterator[str]:
        for texts in self._by_kind.values():
            more = f" (and {len(texts) - 1} more like it)" if len(texts) > 1 else ""
            yield texts[0] + more
