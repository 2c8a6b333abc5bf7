"""The words and numbers in which the command line speaks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mcorefs.formats import HUGGINGFACE
from mcorefs.formats.base import MAX_SHOWN
from mcorefs.passthrough import Passthrough
from mcorefs.shares import Share

if TYPE_CHECKING:  # not imported by commands that have nothing of them to say
    from mcorefs.inspection import Inspection, LoraFound
    from mcorefs.materialize import Written
    from mcorefs.tree import Source
    from mcorefs.verify import Findings
    from mcorefs.verify.checks import Check

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def printable(text: str) -> str:
    """`text` without control characters: names in a checkpoint are a stranger's."""
    return _UNPRINTABLE.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def parse_size(text: str) -> int:
    """Bytes in "512MiB", "4GB" or "1000000". Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it as 4GB, 512MiB or 1000000")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def size(count: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def parameters(count: int) -> str:
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f}{unit}"
    return f"{count:,}"


def count(number: int, noun: str) -> str:
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def summary(source: Source) -> str:
    what = f"{source.architecture} from {source.location.path}: "
    if not source.tensors:  # pickled weights, which nobody looks into
        return what + size(sum(file.size for file in source.checkpoint.files.values()))
    total = sum(tensor.nbytes for tensor in source.tensors)
    elements = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in source.tensors)
    return f"{what}{parameters(elements)} parameters, {size(total)}"


def written(
    found: Written, source: Source, out: Path, seconds: float, share: Share | None
) -> Iterator[str]:
    """What `materialize` did."""
    if share is not None and not found.files:
        yield f"part {share.number} of {share.count} has nothing to write: there are fewer files"
        return
    speed = (found.total_bytes - found.resumed_bytes) / 1e9 / max(seconds, 1e-9)
    mine = "" if share is None else f", of which part {share.number} of {share.count} was"
    yield (
        f"{summary(source)}{mine} written to {out}: {count(found.files, 'file')} "
        f"in {seconds:.1f} s ({speed:.2f} GB/s)"
    )
    if found.missing:
        first = found.missing[0] + (", ..." if len(found.missing) > 1 else "")
        wanting = count(len(found.missing), "file")
        yield f"{out} is complete when the other parts are: {wanting} still missing ({first})"


def no_tokenizer(model: Source) -> str:
    if isinstance(model, Passthrough):
        return f"  WARNING: {model.location.path} holds no tokenizer; copy its files there."
    return (
        "  WARNING: no tokenizer. The weights are complete, but text cannot be read or written.\n"
        f"  Looked in: {model.tokenizer.source}\n"
        "  Give it with --tokenizer DIR (a directory with tokenizer.json), or with\n"
        "  --hf-config DIR (the Hugging Face model it came from)."
    )


def findings(check: Check, found: Findings) -> Iterator[str]:
    """What a check found, line by line."""
    for difference in found.differences[:MAX_SHOWN]:
        yield f"{difference.name} {difference.problem}"
    if (more := len(found.differences) - MAX_SHOWN) > 0:
        yield f"... and {more:,} more"
    yield from (f"  note: {remark}" for remark in found.remarks)
    yield (
        f"{count(found.sound, check.noun)} {check.proof}; {len(found.differences):,} not "
        f"({size(found.total_bytes)} read)"
    )


def how_to_load(mnt: Path, architecture: str) -> str:
    """The engines prefetch by themselves on NFS and Lustre only, so they are told to
    (vllm-project/vllm pull 39422; sgl-project/sglang pull 37806)."""
    sees = architecture.endswith("ForConditionalGeneration")
    kind = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    return (
        f'  transformers  {kind}.from_pretrained("{mnt}", dtype="auto")\n'
        f"  vLLM          vllm serve {mnt} --safetensors-load-strategy=prefetch\n"
        f"  SGLang        python -m sglang.launch_server --model-path {mnt} "
        "--weight-loader-prefetch-checkpoints"
    )


def inspection(found: Inspection) -> Iterator[tuple[str, str]]:
    """(label, text) for each thing that is known."""
    yield "checkpoint", found.path
    yield "format", found.format
    lines = (
        ("iteration", None if found.iteration is None else str(found.iteration)),
        ("iterations", ", ".join(found.iterations)),
        ("incomplete", ", ".join(found.incomplete)),
        ("model", found.architecture),
        ("told by", ", ".join(found.evidence)),
        ("parameters", found.parameters and parameters(found.parameters)),
        ("tensors", found.total_bytes and size(found.total_bytes)),
        ("dtypes", _pairs(found.dtypes)),
        ("parallel", _pairs(found.parallel)),
        ("written by", found.trainer),
        ("arguments", found.args_source),
        ("shard files", found.shard_files and _shards(found)),
        ("left aside", _pairs(found.skipped)),
        ("adapter", found.adapter and _lora(found.adapter)),
        ("base model", found.adapter and (found.adapter.base or "in the same checkpoint")),
    )
    yield from ((label, text) for label, text in lines if text)
    if found.architecture:
        yield "tokenizer", found.tokenizer or _no_tokenizer(found)
    yield from (("note", remark) for remark in found.remarks)
    yield from (("PROBLEM", problem) for problem in found.problems)
    if not found.problems:
        yield "verdict", "whole; can be mounted"


def _lora(adapter: LoraFound) -> str:
    ranks = " and ".join(map(str, adapter.ranks))
    scaled = ", scaled by the root of the rank" if adapter.is_rank_stabilised else ""
    alpha = "unknown" if adapter.alpha is None else f"{adapter.alpha:g}"
    said = f"LoRA in {adapter.path}: rank {ranks}, alpha {alpha}{scaled}, on "
    said += ", ".join(adapter.targets) or "no module"
    whole = ", ".join(adapter.trained_whole)
    return f"{said}; {whole} trained whole" if whole else said


def _no_tokenizer(found: Inspection) -> str:
    passed_on = found.format == HUGGINGFACE.name
    return "none found" if passed_on else "none found (give it with --tokenizer DIR)"


def _pairs(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in values.items())


def _shards(found: Inspection) -> str:
    chunks = count(found.chunks or 0, "chunk")
    return f"{found.shard_files:,} with {chunks}, {size(found.shard_bytes or 0)}"
