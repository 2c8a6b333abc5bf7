"""The rank files of one `torch` iteration in their places, or all that is wrong with them.

Global rank r of a pipeline stage has tensor rank r % TP, expert-tensor rank r % ETP and expert
rank r // ETP % EP (Megatron-LM:megatron/core/parallel_state.py RankGenerator). So with ETP < TP
only some pairs (tensor rank, expert rank) exist, and tensor rank t has expert-tensor rank t % ETP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcorefs.formats.base import side_by_side
from mcorefs.formats.torch_legacy.files import NEMO_FILE, RankFile, rank_files, read
from mcorefs.formats.torch_legacy.tensor_parallel import EMBEDDING

_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
_SAME = (*_SIZES, "num_layers")
"""Arguments that all ranks of one save share; a file that differs is left from another save."""

Place = tuple[int, int, int]
"""(tensor-parallel, pipeline, expert-parallel) rank."""


@dataclass(frozen=True)
class Ranks:
    """The files of all ranks, one for each part of the model."""

    files: Sequence[RankFile]
    args: Mapping[str, object]
    tp: int
    pp: int
    ep: int
    etp: int
    virtual: int
    """Virtual pipeline stages in each file."""
    dense: Mapping[tuple[int, int], RankFile]
    """By (tensor, pipeline) rank: the file with all parameters but the experts'."""
    experts: Mapping[Place, RankFile]
    """By (expert-tensor, pipeline, expert) rank: the file with the experts; empty if there are
    none."""
    places: Mapping[Place, RankFile]
    """Every file in its place."""


def arrange(path: Path, problems: list[str]) -> Ranks | None:
    """The ranks in `path`; None, with everything that is wrong in `problems`."""
    named = rank_files(path)
    looked = side_by_side(path, _look, named)
    problems.extend(problem for _, wrong in looked for problem in wrong)
    found = [
        (numbers, name, file) for (name, numbers), (file, _) in zip(named, looked, strict=True)
    ]
    files = [file for _, _, file in found if file is not None]
    if not files:
        return None
    args = files[0].args
    _check_one_save(files, problems)
    width = len(found[0][0])
    if any(len(numbers) != width for numbers, _, _ in found):
        names = ", ".join(file.parent.name for _, file, _ in found)
        problems.append(f"the directories are not of one save: {names}")
        return None
    places = _places([numbers for numbers, _, _ in found], files, problems)
    if places is None:
        return None
    tp, pp, ep, etp = _sizes(places, args)
    has_experts = any(".experts." in name for f in files for stage in f.stages for name in stage)
    if has_experts:
        _check_expert_sizes(tp, etp, args, problems)
    else:
        etp = tp
    if tp % etp == 0:
        naming = _Naming(found[0][1].name, width, pp)
        _check_complete(path, places, naming, (tp, pp, ep, etp), has_experts, problems)
    if problems:
        return None
    ordered = dict(sorted(zip(places, files, strict=True), key=lambda item: item[0]))
    dense: dict[tuple[int, int], RankFile] = {}
    experts: dict[Place, RankFile] = {}
    for place, file in ordered.items():
        dense.setdefault(place[:2], file)
        if has_experts:
            experts.setdefault((place[0] % etp, place[1], place[2]), file)
    return Ranks(files, args, tp, pp, ep, etp, len(files[0].stages), dense, experts, ordered)


def _look(named: tuple[Path, tuple[int, ...]]) -> tuple[RankFile | None, list[str]]:
    wrong: list[str] = []
    return read(*named, wrong), wrong


def _check_one_save(files: Sequence[RankFile], problems: list[str]) -> None:
    first = files[0]
    for file in files[1:]:
        differing = [
            f"{name} {file.args.get(name)} instead of {first.args.get(name)}"
            for name in _SAME
            if file.args.get(name) != first.args.get(name)
        ]
        if file.iteration != first.iteration:
            differing.append(f"iteration {file.iteration} instead of {first.iteration}")
        if len(file.stages) != len(first.stages):
            differing.append(f"{len(file.stages)} virtual stages instead of {len(first.stages)}")
        if differing:
            problems.append(
                f"{file.directory} is of another save than {first.directory}: "
                f"{', '.join(differing)}"
            )


def _places(
    numbers: Sequence[tuple[int, ...]], files: Sequence[RankFile], problems: list[str]
) -> list[Place] | None:
    """What the numbers in the directories' names mean."""
    width = len(numbers[0])
    if width == 3:
        return [(n[0], n[1], n[2]) for n in numbers]
    if width == 1:
        return [(n[0], 0, 0) for n in numbers]
    args = files[0].args
    pp, ep = (_size(args, name) for name in _SIZES[1:3])
    if pp is not None and ep is not None and (pp > 1) == (ep > 1):
        problems.append(
            f"the directories name one number besides the tensor rank, but the training arguments "
            f"say pipeline_model_parallel_size {pp} and expert_model_parallel_size {ep}"
        )
        return None
    if pp is not None or ep is not None:
        staged = (pp or 1) > 1
    else:  # only the first pipeline stage has an embedding, every expert-parallel rank has
        staged = not all(any(EMBEDDING in stage for stage in file.stages) for file in files)
    return [(n[0], n[1], 0) if staged else (n[0], 0, n[1]) for n in numbers]


def _sizes(places: Sequence[Place], args: Mapping[str, object]) -> tuple[int, int, int, int]:
    """TP, PP, EP, ETP: as the arguments say, else as many as there are."""
    seen = [max(place[axis] for place in places) + 1 for axis in range(3)]
    tp, pp, ep = (_size(args, name) or n for name, n in zip(_SIZES, seen, strict=False))
    return tp, pp, ep, _size(args, _SIZES[3]) or tp


def _size(args: Mapping[str, object], name: str) -> int | None:
    value = args.get(name)
    return value if type(value) is int and value > 0 else None


def _check_expert_sizes(tp: int, etp: int, args: Mapping[str, object], problems: list[str]) -> None:
    if not args and tp > 1:
        problems.append(
            "no rank file holds training args, so whether the experts are cut over the "
            f"{tp} tensor-parallel ranks (expert_tensor_parallel_size) cannot be told"
        )
    if tp % etp:
        problems.append(
            f"expert_tensor_parallel_size {etp} does not divide tensor_model_parallel_size {tp}: "
            "such ranks overwrite each other's files in this format"
        )
    if args.get("moe_extended_tp"):
        problems.append("experts are cut over TP x EP ranks (moe_extended_tp), which is not read")


def _check_complete(
    path: Path,
    places: Sequence[Place],
    naming: _Naming,
    sizes: tuple[int, int, int, int],
    has_experts: bool,
    problems: list[str],
) -> None:
    """Every part of the model must be in some file, and no file may lie outside of the run."""
    tp, pp, ep, etp = sizes
    outside = [p for p in places if p[0] >= tp or p[1] >= pp or p[2] >= ep]
    if outside:
        names = ", ".join(map(naming.directory, outside))
        problems.append(
            f"{names} cannot be of this save: its training arguments say TP {tp}, PP {pp}, EP {ep}"
        )
    dense = {place[:2] for place in places}
    experts = {(place[0] % etp, *place[1:]) for place in places}
    missing: list[str] = []
    for stage in range(pp):
        for rank in range(max(tp, etp * ep)):
            place = (rank % tp, stage, rank // etp % ep)
            if place[:2] in dense and (not has_experts or (place[0] % etp, *place[1:]) in experts):
                continue
            missing.append(naming.directory(place))
    if missing:
        problems.append(
            f"{len(missing)} of the ranks' directories are missing: {', '.join(missing[:64])}"
            f"{', ...' if len(missing) > 64 else ''} (each with {naming.file}; TP {tp}, PP {pp}, "
            f"EP {ep}, expert TP {etp}); copy them into {path}"
        )


@dataclass(frozen=True)
class _Naming:
    """What the files of a save are called."""

    file: str
    width: int
    """How many numbers are in the name of a directory."""
    pp: int

    def directory(self, place: Place) -> str:
        tp, stage, expert = place
        if self.file == NEMO_FILE and self.width == 2:
            return f"tp_rank_{tp:02d}_pp_rank_{stage:03d}"
        name = f"mp_rank_{tp:02d}"
        if self.width == 3 or (self.width == 2 and self.pp > 1):
            name += f"_{stage:03d}"
        if self.width == 3 or (self.width == 2 and self.pp == 1):
            name += f"_{expert:03d}"
        return name
