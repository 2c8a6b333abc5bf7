"""The files of a legacy `torch` iteration, one per rank: their names, and what is in each.

    iter_0000100/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt

TT is the tensor-, PPP the pipeline-, EEE the expert-parallel rank; PPP is there only if the run
had pipeline stages, EEE only if it had expert parallelism
(Megatron-LM:megatron/training/checkpointing.py get_checkpoint_name, generate_state_dict).

NeMo 1 saved models so that it did not yet save as distributed checkpoints: in each file a state
dict and nothing else (NeMo 2.2:nemo/collections/nlp/parts/nlp_overrides.py
NLPSaveRestoreConnector.save_to).

    x.nemo/model_weights.ckpt                           one rank
    x.nemo/mp_rank_TT/model_weights.ckpt                tensor-parallel ranks
    x.nemo/tp_rank_TT_pp_rank_PPP/model_weights.ckpt    pipeline stages as well
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mcorefs.errors import CheckpointError
from mcorefs.formats.base import reading, training_args
from mcorefs.formats.torch_legacy.tensor_parallel import Part
from mcorefs.index import Span
from mcorefs.names import unwrapped
from mcorefs.storage import FileIdentity, is_file, regular_file
from mcorefs.torchzip import Record, load, record_of
from mcorefs.unpickle import StoredView, describe

FILE, NEMO_FILE = "model_optim_rng.pt", "model_weights.ckpt"
_DIRECTORY = re.compile(
    r"mp_rank_([0-9]{2,})(?:_([0-9]{3,}))?(?:_([0-9]{3,}))?|tp_rank_([0-9]{2,})_pp_rank_([0-9]{3,})"
)
_MODEL = re.compile(r"model([0-9]*)")
_BEFORE_CORE = re.compile(r"(?:(?:module|model)\.)+(language_model)\..+")
_WRAPPERS = ("module.", "model.")


@dataclass(frozen=True)
class RankFile:
    """What one rank saved."""

    path: str
    numbers: tuple[int, ...]
    """The numbers in the directory's name: TT, TT PPP, TT EEE or TT PPP EEE."""
    identity: FileIdentity
    args: Mapping[str, object]
    args_source: str
    iteration: object
    stages: tuple[Mapping[str, Part], ...]
    """The parameters of each virtual pipeline stage, under their local names."""
    skipped: Mapping[str, int]

    @property
    def directory(self) -> str:
        """The name of the rank's directory, as messages name the rank."""
        return self.path.rsplit("/", 2)[-2]


def rank_files(path: Path) -> list[tuple[Path, tuple[int, ...]]]:
    """The file of each rank directory in `path`, with the numbers in that one's name; a file need
    not be there."""
    found = [
        (child, tuple(int(number) for number in match.groups() if number is not None))
        for child in sorted(path.iterdir())
        if (match := _DIRECTORY.fullmatch(child.name))
    ]
    if not found and is_file(path / NEMO_FILE):
        return [(path / NEMO_FILE, (0,))]
    is_nemo = any(is_file(directory / NEMO_FILE) for directory, _ in found)
    return [(directory / (NEMO_FILE if is_nemo else FILE), numbers) for directory, numbers in found]


def read(file: Path, numbers: tuple[int, ...], problems: list[str]) -> RankFile | None:
    """What is in the rank file at `file`, from its pickle and its zip directory alone.

    None, with what is wrong added to `problems`, if it cannot be used.
    """
    path = str(file)
    identity, why = regular_file(file)
    if identity is None:
        problems.append(f"{path}: {why}")
        return None
    try:
        with reading(path, identity=identity) as pread:
            _refuse_old_container(pread(0, min(2, identity.size)), path)
            state, records = load(pread, identity.size, path)
        args, source = training_args(state, path)
        skipped: Counter[str] = Counter()
        faults: list[str] = []
        stages = tuple(
            _parameters(model, path, records, skipped, faults) for model in _models(state, path)
        )
    except CheckpointError as problem:
        problems.append(str(problem))
        return None
    if faults:
        problems.extend(faults)
        return None
    assert isinstance(state, dict)
    skipped.update(str(key) for key in state if key in ("optimizer", "opt_param_scheduler"))
    return RankFile(
        path, numbers, identity, args, source, state.get("iteration"), stages, dict(skipped)
    )


def _refuse_old_container(magic: bytes, path: str) -> None:
    if magic == b"\x80\x02":
        raise CheckpointError(
            f"{path} is in torch.save's format from before 1.6 (not a zip), which cannot be read "
            "lazily; load it with torch and save it again with torch.save"
        )


def _models(state: object, path: str) -> list[Mapping[object, object]]:
    """The state dict of each virtual pipeline stage: `model`, or `model0`, `model1`, ..."""
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no dict, as every rank's file does")
    numbered = {m[1]: state[key] for key in state if (m := _MODEL.fullmatch(str(key)))}
    if path.endswith(f"/{NEMO_FILE}"):
        numbered = {"": {_BEFORE_CORE.sub(r"\1", str(key)): state[key] for key in state}}
    wanted = [""] if "" in numbered else [str(number) for number in range(len(numbered))]
    models = [numbered.get(number) for number in wanted]
    if not models or len(models) != len(numbered):
        held = ", ".join(str(key) for key in list(state)[:12]) or "nothing"
        raise CheckpointError(f"{path} holds no model weights; it holds {held}")
    found: list[Mapping[object, object]] = []
    for model in models:
        if not isinstance(model, dict):
            raise CheckpointError(f"{path}: its model is no dict")
        if "language_model" in model:
            raise CheckpointError(
                f"{path} holds a model from before Megatron-Core (`language_model` in it, "
                "--use-legacy-models); convert it with tools/checkpoint/convert.py of Megatron-LM "
                "0.15 or older (--loader legacy --saver core) first, or a .nemo file with "
                "scripts/checkpoint_converters/convert_gpt_nemo_to_mcore.py of NeMo 1"
            )
        found.append(model)
    return found


def _parameters(
    model: Mapping[object, object],
    path: str,
    records: Mapping[str, Record],
    skipped: Counter[str],
    problems: list[str],
) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for name, value in model.items():
        if "_extra_state" in str(name):
            skipped["_extra_state"] += 1
        elif isinstance(value, StoredView):
            try:
                record = record_of(value, records, f"{path}: {name}")
            except CheckpointError as problem:
                problems.append(str(problem))
                continue
            span = Span(path, record.header, record.nbytes, "zip_record")
            parts[str(name)] = Part(span, value.dtype, value.size, value.stride, value.offset)
        else:
            kind = describe(value)
            problems.append(
                f"{path}: {name} is no plain tensor but a {kind:.80}, which cannot be read bit "
                "for bit"
            )
    return _unwrapped(parts)


def _unwrapped(parts: dict[str, Part]) -> dict[str, Part]:
    """Names without the prefixes that wrappers (DDP, Float16Module) put before all of them, and
    those of a model that sees from the root of its language model."""
    while parts:
        around = (p for p in _WRAPPERS if all(name.startswith(p) for name in parts))
        if (prefix := next(around, None)) is None:
            break
        parts = {name.removeprefix(prefix): part for name, part in parts.items()}
    short = {unwrapped(name): part for name, part in parts.items()}
    return short if len(short) == len(parts) else parts
