"""Tensors that several ranks saved: each rank's file holds all that its modules hold.

What is not cut over tensor-parallel ranks (norms, routers) is in the file of each, what is no
expert in that of each expert-parallel rank, and an expert in those of all tensor-parallel ranks
that share its expert-tensor rank. Two pipeline stages may hold the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mcorefs.formats.base import Replica
from mcorefs.formats.torch_legacy.experts import experts_of
from mcorefs.formats.torch_legacy.files import RankFile
from mcorefs.formats.torch_legacy.ranks import Ranks
from mcorefs.formats.torch_legacy.stages import expert_counts, global_name, numbered
from mcorefs.formats.torch_legacy.tensor_parallel import Cut, Part, how_cut
from mcorefs.index import stored_tensor
from mcorefs.names import Expert


def between_ranks(ranks: Ranks, first_layers: Mapping[tuple[int, int], int]) -> Iterator[Replica]:
    """The copies in all files but those that are served from.

    `first_layers`: number of the first layer of each (pipeline rank, virtual stage).
    """

    def parts(file: RankFile, stage: int) -> tuple[dict[str, Part], dict[Expert, Part]]:
        return experts_of(file.stages[stage], ranks.ep, ranks.args, [])

    for (tp, pp, ep), file in ranks.places.items():
        served = ranks.dense[tp, pp]
        holder = ranks.experts.get((tp % ranks.etp, pp, ep))
        for stage in range(ranks.virtual):
            first = first_layers[pp, stage]
            dense, experts = parts(file, stage)
            if file is not served:
                others = parts(served, stage)[0]
                yield from _copies(dense, file, others, served, first)
            elif tp > 0:
                others = parts(ranks.dense[0, pp], stage)[0]
                whole = _whole(dense, ranks.tp, ranks.args)
                yield from _copies(whole, file, others, ranks.dense[0, pp], first)
            if holder is not None and holder is not file:
                counts = expert_counts(experts)
                local = parts(holder, stage)[1]
                one, other = (numbered(held, counts, ep) for held in (experts, local))
                yield from _copies(one, file, other, holder, first)


def _whole(parts: Mapping[str, Part], ranks: int, args: Mapping[str, object]) -> dict[str, Part]:
    """Those that every tensor-parallel rank holds alike."""
    return {
        name: part
        for name, part in parts.items()
        if how_cut(name, parts, ranks, args) == (Cut.WHOLE, None)
    }


def _copies(
    parts: Mapping[str, Part],
    file: RankFile,
    served: Mapping[str, Part],
    holder: RankFile,
    first_layer: int,
) -> Iterator[Replica]:
    for name, part in parts.items():
        if name in served:
            known = global_name(name, first_layer)
            one, other = (
                stored_tensor(known, p.dtype, p.shape, (p.chunk((0,) * len(p.shape)),))[0]
                for p in (served[name], part)
            )
            if one is not None and other is not None:
                yield Replica(known, one, holder.directory, other, file.directory)
