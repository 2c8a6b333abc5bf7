"""The model's tensors from what its ranks hold: global layer and expert numbers, joined parts.

- pipeline: layers are numbered through virtual stage by virtual stage, and in each through the
  pipeline ranks (Megatron-LM:megatron/core/transformer/transformer_layer.py
  get_transformer_layer_offset). Every way of dividing them, even or not, keeps that order, so the
  number of layers before a stage follows from counting them in the files.
- experts: expert-parallel rank e holds experts [e * n, (e + 1) * n) (moe/moe_layer.py).
- everything else is the same for all expert-parallel ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from mcorefs.formats.torch_legacy.experts import experts_of
from mcorefs.formats.torch_legacy.files import RankFile
from mcorefs.formats.torch_legacy.ranks import Ranks
from mcorefs.formats.torch_legacy.tensor_parallel import Part, how_cut, joined
from mcorefs.index import StoredTensor
from mcorefs.names import Expert

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def stages(ranks: Ranks, problems: list[str]) -> list[tuple[int, int, int]]:
    """(pipeline rank, virtual stage, number of its first layer) of every stage, in layer order."""
    found: list[tuple[int, int, int]] = []
    layers = 0
    for stage in range(ranks.virtual):
        for pp in range(ranks.pp):
            found.append((pp, stage, layers))
            names = ranks.dense[0, pp].stages[stage]
            numbers = (int(match[1]) for name in names if (match := _LAYER.match(name)))
            layers += max(numbers, default=-1) + 1
    expected = ranks.args.get("num_layers")
    # Of a model that has no decoder, mapping says what it is.
    if type(expected) is int and layers not in (0, expected):
        problems.append(
            f"the pipeline stages hold {layers} layers in all but the training arguments say "
            f"num_layers {expected}"
        )
    return found


def stage_tensors(
    ranks: Ranks, pp: int, stage: int, first_layer: int, problems: list[str]
) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of one virtual pipeline stage, under their global names."""

    def parts(file: RankFile) -> tuple[dict[str, Part], dict[Expert, Part]]:
        return experts_of(file.stages[stage], ranks.ep, ranks.args, problems)

    dense = [(file, parts(file)[0]) for file in (ranks.dense[t, pp] for t in range(ranks.tp))]
    yield from _joined(dense, lambda name: global_name(name, first_layer), ranks.args, problems)
    counts: dict[str, int] = {}
    for ep in range(ranks.ep if ranks.experts else 0):
        holders = [ranks.experts[t, pp, ep] for t in range(ranks.etp)]
        held = [(file, parts(file)[1]) for file in holders]
        for module, count in expert_counts(held[0][1]).items():
            if counts.setdefault(module, count) != count:
                problems.append(
                    f"{global_name(module, first_layer)}: {holders[0].directory} holds {count} "
                    f"experts but expert-parallel rank 0 holds {counts[module]}"
                )
        local = [(file, numbered(experts, counts, ep)) for file, experts in held]
        yield from _joined(local, lambda name: global_name(name, first_layer), ranks.args, problems)


def expert_counts(experts: Iterable[Expert]) -> dict[str, int]:
    """How many experts each module holds."""
    counts: dict[str, int] = {}
    for module, number, _ in experts:
        counts[module] = max(counts.get(module, 0), number + 1)
    return counts


def numbered(experts: Mapping[Expert, Part], counts: Mapping[str, int], ep: int) -> dict[str, Part]:
    """The experts of expert-parallel rank `ep` by canonical name."""
    return {
        f"{module}.{ep * counts.get(module, 0) + number}.{name}": part
        for (module, number, name), part in experts.items()
    }


def _joined(
    held: Sequence[tuple[RankFile, Mapping[str, Part]]],
    named: Callable[[str], str],
    args: Mapping[str, object],
    problems: list[str],
) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors whose parts are `held` by ranks, in rank order."""
    file, parts = held[0]
    for other, others in held[1:]:
        for one, two, more in (
            (file, other, parts.keys() - others.keys()),
            (other, file, others.keys() - parts.keys()),
        ):
            if more:
                problems.append(
                    f"{one.directory} holds {len(more)} tensors that {two.directory} does not, "
                    f"such as {min(more)}"
                )
    for name in parts:
        cut, problem = how_cut(name, parts, len(held), args)
        if problem is None:
            found = [(f.directory, p[name]) for f, p in held if name in p]
            tensor, problem = joined(named(name), cut, found)
            if tensor is not None:
                yield tensor.fqn, tensor
        problems.extend([problem] if problem else [])


def global_name(name: str, first_layer: int) -> str:
    """`name` with the number that its layer has in the whole model."""
    match = _LAYER.match(name)
    if match is None:
        return name
    return f"decoder.layers.{first_layer + int(match[1])}.{name[match.end() :]}"
