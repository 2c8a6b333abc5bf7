"""Experts whose gate and up rows lie in turns: what --moe-mlp-glu-interleave-size makes of them.

Each tensor-parallel rank of an expert then has blocks of so many gate rows and up rows by turns, in
memory and so on disk, where the halves of its rows are taken apart as if they were gate and up
(Megatron-LM:megatron/core/transformer/moe/experts.py TEGroupedMLP._remove_glu_interleaving,
transformer/mlp.py apply_swiglu_sharded_factory). Only grouped experts know of it: one after the
other (SequentialMLP) they have their rows as ever. Megatron-Bridge undoes it when it saves, in some
versions and formats (Megatron-Bridge:src/megatron/bridge/training/checkpointing.py
_process_state_dict_for_glu_interleaving), and records neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mcorefs.views import Flatten, Permute, Unflatten, View

SIZE = "moe_mlp_glu_interleave_size"
CONVERTS = "Megatron-Bridge"
_FC1 = re.compile(r"(.+\.mlp\.experts\.(?:\d+|\*)\.linear_fc)1\.(?:weight|bias)$")


def undone(
    tensors: Mapping[str, View], args: Mapping[str, object], trainer: str, has_adapter: bool = False
) -> tuple[Mapping[str, View], list[str]]:
    """(canonical `tensors` of a run with `args`, with all gate rows of an expert above its up rows;
    what is wrong). `has_adapter`: there are tensors beside them whose rows lie alike."""
    if (size := args.get(SIZE)) is None or args.get("moe_grouped_gemm") is False:
        return tensors, []
    gated = [name for name in tensors if _is_gated(name, tensors)]
    if not gated:
        return tensors, []
    problem = _unknown(args, trainer, has_adapter)
    ranks = args.get("expert_tensor_parallel_size") or args.get("tensor_model_parallel_size")
    if problem is None and (type(size) is not int or type(ranks) is not int):
        problem = f"{SIZE} is {size!r} and the experts' tensor-parallel size {ranks!r}"
    if problem is not None or type(size) is not int or type(ranks) is not int:
        return tensors, [
            f"gate and up rows of experts lie in turns, which cannot be undone: {problem}"
        ]
    found = dict(tensors)
    uneven = [n for n in gated if size < 1 or ranks < 1 or tensors[n].shape[0] % (2 * size * ranks)]
    for name in set(gated) - set(uneven):
        found[name] = gate_above_up(tensors[name], size, ranks)
    return found, [
        f"{uneven[0]} has {tensors[uneven[0]].shape[0]} rows, which are no blocks of {SIZE} {size} "
        f"on each of {ranks} tensor-parallel ranks"
    ] if uneven else []


def gate_above_up(view: View, size: int, ranks: int) -> View:
    """All gate rows, then all up rows, of what has blocks of `size` by turns on each rank: the
    first half of the first rank's rows, of the second's, ..., then the second halves."""
    rest = range(4, 3 + len(view.shape))
    halves = Unflatten(view, 0, (2, ranks, view.shape[0] // (2 * ranks)))
    by_rank = Flatten(Permute(halves, (1, 0, *range(2, len(halves.shape)))), 0, 3)
    blocks = Unflatten(by_rank, 0, (ranks, view.shape[0] // (2 * ranks * size), 2, size))
    return Flatten(Permute(blocks, (2, 0, 1, 3, *rest)), 0, 4)


def _unknown(args: Mapping[str, object], trainer: str, has_adapter: bool) -> str | None:
    if args.get("moe_grouped_gemm") is None:
        return f"only grouped experts have it so, and nothing says whether they were ({SIZE})"
    if trainer == CONVERTS:
        return (
            f"{CONVERTS} undoes it when it saves, or does not, by its version and the format "
            f"({SIZE}): export the model with {CONVERTS} itself"
        )
    if has_adapter:
        return f"an adapter's matrices lie so, too ({SIZE}): merge it where it was trained"
    return None


def _is_gated(name: str, tensors: Mapping[str, View]) -> bool:
    match = _FC1.match(name)
    fc2 = tensors.get(f"{match[1]}2.weight") if match else None
    rows = tensors[name].shape[:1]
    return fc2 is not None and len(fc2.shape) == 2 and rows == (2 * fc2.shape[1],)
