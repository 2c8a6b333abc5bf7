"""Which checks a checkpoint allows: each says what it is, how much it reads, and does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from mcorefs.errors import CheckpointError
from mcorefs.formats import HUGGINGFACE
from mcorefs.formats.base import KeepsReplicas
from mcorefs.locate import Location
from mcorefs.model import which_weights
from mcorefs.patience import READ_TIMEOUT, patiently
from mcorefs.tree import Opened
from mcorefs.verify import checksums, deep, integrity
from mcorefs.verify.findings import Findings, OnProgress


@dataclass(frozen=True)
class Check:
    """One way of checking one checkpoint."""

    doing: str
    """What goes on while it runs: "Hashing"."""
    noun: str
    """What is counted as sound: "file"."""
    proof: str
    """What is known of those: "as saved, by integrity.json"."""
    total_bytes: int
    """What it will read, about; 0 where that is not known."""
    run: Callable[[OnProgress], Findings]


def own_proof(
    location: Location, weights: str = "model", read_timeout: float | None = READ_TIMEOUT
) -> Check:
    """By what the run itself saved: SHA-256 of all files, else torch's CRC-32 of the weights.

    Raises CheckpointError where it saved neither, or where the checkpoint cannot be opened.
    """
    return patiently(lambda: _own_proof(location, weights, read_timeout), read_timeout)


def _own_proof(location: Location, weights: str, read_timeout: float | None) -> Check:
    path = location.path
    if (digests := integrity.read_manifest(path)) is not None:
        return Check(
            "Hashing",
            "file",
            f"as saved, by the SHA-256 in {integrity.MANIFEST}",
            integrity.total_bytes(path, digests),
            partial(integrity.check, path, digests, read_timeout=read_timeout),
        )
    if location.format is HUGGINGFACE:
        raise CheckpointError(
            f"{path} is a Hugging Face model directory, and nothing in it says what bytes it "
            "should hold. `mcorefs verify CKPT HF_DIR` compares them with another copy, `--deep` "
            "looks for NaN and infinity"
        )
    checkpoint = location.format.index(path, which_weights(weights))
    return Check(
        "Checking",
        "record",
        f"as saved, by torch's CRC-32 (there is no {integrity.MANIFEST}, which Megatron-LM writes "
        "with --verify-integrity)",
        checksums.total_bytes(checkpoint),
        partial(checksums.check, checkpoint, read_timeout=read_timeout),
    )


def deep_checks(opened: Opened, read_timeout: float | None = READ_TIMEOUT) -> Iterator[Check]:
    """By itself: its numbers, and its copies of one tensor."""
    source, reader = opened.source, opened.reader
    total = sum(tensor.nbytes for tensor in source.tensors)
    run = partial(deep.check_finite, source.tensors, reader)
    yield Check("Reading", "tensor", "finite", total, run)
    if isinstance(source.location.format, KeepsReplicas):
        replicas = source.location.format.replicas(source.location.path)
        run = partial(deep.check_replicas, replicas, reader, read_timeout=read_timeout)
        yield Check("Comparing", "copy", "equal to what is served, from other ranks", 0, run)
