"""The CRC-32 of every record that holds weights, which `torch.save` writes into its archives.

Nothing that loads a checkpoint looks at them (torch reads records without checking), so bits that
rot on disk load as weights. They were written when the run saved, so they prove every byte of a
checkpoint that has no other proof. A CRC of 0 means that none was computed
(torch.serialization.set_crc32_options).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mcorefs.deadline import Deadline
from mcorefs.errors import CheckpointError, ReadFault
from mcorefs.formats import Checkpoint
from mcorefs.index import Span
from mcorefs.patience import READ_TIMEOUT
from mcorefs.storage import Storage
from mcorefs.torchzip import Record, data_start, records
from mcorefs.verify.findings import PIECE, Difference, Findings, OnProgress, threads


@dataclass(frozen=True)
class _Archive:
    """One archive in a file."""

    path: str
    offset: int
    nbytes: int
    name: str
    """What to call it: the fqn of its tensor, or its file."""
    holding: Mapping[int, str] | None
    """fqn by the place of the record that holds it, where other records hold other things."""


def total_bytes(checkpoint: Checkpoint) -> int:
    """Bytes that `check` will read, about."""
    whole = sum(a.nbytes for a in _archives(checkpoint) if a.holding is None)
    spans = {_place(span): span.nbytes for _, span in _spans(checkpoint) if _is_record(span)}
    return whole + sum(spans.values())


def check(
    checkpoint: Checkpoint,
    on_progress: OnProgress = lambda count: None,
    read_timeout: float | None = READ_TIMEOUT,
) -> Findings:
    """Compute the CRC-32 of every record that holds weights. Memory: one piece for each thread.

    Raises CheckpointError where none was saved.
    """
    storage = Storage(checkpoint.files, deadline=Deadline.of(read_timeout))

    def look(archive: _Archive) -> tuple[int, int, int, list[Difference]]:
        return _check_archive(archive, storage, on_progress)

    sound = unproven = read = 0
    differences: list[Difference] = []
    with ThreadPoolExecutor(threads()) as pool:
        for good, without, nbytes, wrong in pool.map(look, _archives(checkpoint)):
            sound, unproven, read = sound + good, unproven + without, read + nbytes
            differences += wrong
    storage.close()
    if not sound and not differences:
        raise CheckpointError(
            f"{checkpoint.path} is whole, but was saved without any checksum, so nothing says what "
            "bytes it should have. `mcorefs verify CKPT HF_DIR` compares it with a Hugging Face "
            "directory, `--deep` with itself"
        )
    remarks = [f"{unproven} records were saved without a checksum"] if unproven else []
    return Findings(sound, read, tuple(differences), tuple(remarks))


def _spans(checkpoint: Checkpoint) -> Iterator[tuple[str, Span]]:
    for fqn, tensor in checkpoint.tensors.items():
        for chunk in tensor.chunks:
            yield fqn, chunk.span


def _is_record(span: Span) -> bool:
    return span.kind == "zip_record"


def _place(span: Span) -> tuple[str, int]:
    return span.path, span.offset


def _archives(checkpoint: Checkpoint) -> list[_Archive]:
    """The archives that hold weights, in the order in which they lie on disk."""
    whole: dict[tuple[str, int], _Archive] = {}
    holding: dict[str, dict[int, str]] = {}
    for fqn, span in _spans(checkpoint):
        if _is_record(span):
            holding.setdefault(span.path, {}).setdefault(span.offset, fqn)
        elif span.kind == "torch_zip":
            whole[_place(span)] = _Archive(span.path, span.offset, span.nbytes, fqn, None)
    files = (
        _Archive(path, 0, checkpoint.files[path].size, path, fqns) for path, fqns in holding.items()
    )
    return sorted((*whole.values(), *files), key=lambda archive: (archive.path, archive.offset))


def _check_archive(
    archive: _Archive, storage: Storage, on_progress: OnProgress
) -> tuple[int, int, int, list[Difference]]:
    """(records that are sound, that have no checksum, bytes read, what is wrong)."""

    def pread(offset: int, nbytes: int) -> bytes:
        return storage.read(archive.path, archive.offset + offset, nbytes)

    sound = without = read = 0
    wrong: list[Difference] = []
    what = f"{archive.path} (at byte {archive.offset})"
    try:
        for name, record in _wanted(archive, records(pread, archive.nbytes, what).values()):
            start = archive.offset + data_start(pread, record, archive.nbytes, what)
            if not record.crc and record.nbytes:
                without += 1
                continue
            found = _crc32(storage, archive.path, start, record.nbytes, on_progress)
            read += record.nbytes
            if found == record.crc:
                sound += 1
            else:
                wrong.append(
                    Difference(
                        name,
                        f"is damaged on disk: {what}, record {record.name!a:.80} has CRC-32 "
                        f"{found:08x}, saved was {record.crc or 0:08x}",
                    )
                )
    except (CheckpointError, ReadFault) as problem:
        wrong.append(Difference(archive.name, str(problem)))
    return sound, without, read, wrong


def _wanted(archive: _Archive, members: Iterable[Record]) -> Iterator[tuple[str, Record]]:
    """The records of weights, and the pickle that describes them; with what to call each."""
    for record in members:
        if archive.holding is None or record.name == "data.pkl":
            yield archive.name, record
        elif record.header in archive.holding:
            yield archive.holding[record.header], record


def _crc32(storage: Storage, path: str, start: int, nbytes: int, on_progress: OnProgress) -> int:
    buffer = memoryview(bytearray(min(PIECE, nbytes)))
    found = 0
    for at in range(0, nbytes, PIECE):
        part = buffer[: min(PIECE, nbytes - at)]
        storage.read_into(path, start + at, part)
        found = zlib.crc32(part, found)
        on_progress(len(part))
    return found
