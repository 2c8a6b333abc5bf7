"""`integrity.json`: the SHA-256 of every file of an iteration, as Megatron-LM saved it.

    {"algorithm": "sha256", "files": {"__0_0.distcp": "9f86d081...", ".metadata": "..."}}

Written last with --verify-integrity, from megatron-core 0.18 on; lists the regular files right in
the directory except itself (Megatron-LM:megatron/core/dist_checkpointing/validation.py
save_integrity_manifest). It is as much a stranger's as the rest: a name in it is only ever that of
a file in this directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mcorefs.deadline import Deadline
from mcorefs.errors import CheckpointError, ReadFault
from mcorefs.files import VirtualFile
from mcorefs.formats.base import refusal
from mcorefs.passthrough import StoredFile
from mcorefs.patience import READ_TIMEOUT, patiently
from mcorefs.remote.ahead import AheadFile, ReadAhead
from mcorefs.storage import (
    FileIdentity,
    Storage,
    is_file_name,
    is_there,
    read_start,
    regular_file,
)
from mcorefs.verify.findings import PIECE, Difference, Findings, OnProgress, threads

MANIFEST = "integrity.json"
_MAX_MANIFEST = 1 << 28
"""Bytes: a file of a million names has 100 MB."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PARTS = re.compile(r".*\.distcp|.*\.metadata|metadata\.json|common\.pt")
"""Files that make a checkpoint what it is: none of these may be there unlisted."""


def read_manifest(directory: Path) -> Mapping[str, str] | None:
    """SHA-256 by file name, None where there is no manifest.

    Raises CheckpointError with everything that is wrong with it.
    """
    path = directory / MANIFEST
    if not is_there(path):
        return None
    identity, why = regular_file(path)
    if identity is None or identity.size > _MAX_MANIFEST:
        raise CheckpointError(f"{path} {why or 'is too large'}")
    try:
        stated = json.loads(read_start(path, _MAX_MANIFEST), object_pairs_hook=_once)
        algorithm, files = stated.get("algorithm", "sha256"), stated["files"]
        names = list(files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise CheckpointError(f"{path} cannot be read: {problem!r:.200}") from None
    if algorithm != "sha256":
        raise CheckpointError(f"{path} is of algorithm {algorithm!r:.40}; only sha256 is known")
    problems = [
        f"{MANIFEST} names a file {name!r:.80}, which is not one of this directory"
        for name, _ in names
        if not is_file_name(name)
    ]
    problems += [
        f"{MANIFEST} gives {digest!r:.80} for {name}, which is no SHA-256"
        for name, digest in names
        if not (isinstance(digest, str) and _DIGEST.fullmatch(digest))
    ]
    if problems:
        raise refusal(directory, problems)
    return files  # type: ignore[no-any-return]


def check(
    directory: Path,
    digests: Mapping[str, str],
    on_progress: OnProgress = lambda count: None,
    read_timeout: float | None = READ_TIMEOUT,
) -> Findings:
    """Hash every file that `digests` lists, and look for files that it does not list.

    Memory: one piece for each thread.
    """
    found, differences = patiently(lambda: _listed(directory, digests), read_timeout)
    sizes = {name: identity.size for name, identity in found.items()}
    identities = {str(directory / name): identity for name, identity in found.items()}
    storage = Storage(identities, deadline=Deadline.of(read_timeout))

    def compare(name: str) -> Difference | None:
        path = str(directory / name)
        try:
            found = _sha256(path, sizes[name], storage, on_progress)
            after, _ = patiently(lambda: regular_file(path), read_timeout)
        except (ReadFault, CheckpointError) as problem:
            return Difference(name, f"cannot be read: {problem}")
        if after != identities[path]:
            return Difference(name, "was written to while it was read")
        if found == digests[name]:
            return None
        return Difference(
            name, f"was changed: its SHA-256 is {found[:16]}..., saved was {digests[name][:16]}..."
        )

    largest_first = sorted(sizes, key=lambda name: -sizes[name])
    with ThreadPoolExecutor(threads()) as pool:
        changed = [found for found in pool.map(compare, largest_first) if found is not None]
    storage.close()
    unlisted, remarks = patiently(lambda: _unlisted(directory, digests), read_timeout)
    return Findings(
        len(sizes) - len(changed),
        sum(sizes.values()),
        (*differences, *sorted(changed, key=lambda found: found.name), *unlisted),
        tuple(remarks),
    )


def _listed(
    directory: Path, digests: Mapping[str, str]
) -> tuple[dict[str, FileIdentity], list[Difference]]:
    """(the files that are there, by name; what is wrong with the others)."""
    found: dict[str, FileIdentity] = {}
    differences: list[Difference] = []
    for name in digests:
        identity, why = regular_file(directory / name)
        if identity is None:
            missing = why == os.strerror(2)
            problem = f"is missing, but {MANIFEST} lists it" if missing else (why or "")
            differences.append(Difference(name, problem))
        else:
            found[name] = identity
    return found, differences


def total_bytes(directory: Path, digests: Mapping[str, str]) -> int:
    """Bytes that `check` will read."""
    identities = (regular_file(directory / name)[0] for name in digests)
    return sum(identity.size for identity in identities if identity is not None)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object none of whose keys comes twice: readers would differ in which they believe."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _unlisted(directory: Path, digests: Mapping[str, str]) -> tuple[list[Difference], list[str]]:
    """(files of the checkpoint that are not listed, what to say of all else)."""
    wrong: list[Difference] = []
    others: list[str] = []
    for child in sorted(directory.iterdir()):
        if child.name in digests or child.name == MANIFEST:
            continue
        if child.is_dir():
            others.append(f"{child.name}/")
        elif _PARTS.fullmatch(child.name):
            problem = f"is not listed in {MANIFEST}: it was added later, or is of another save"
            wrong.append(Difference(child.name, problem))
        else:
            others.append(child.name)
    remark = f"not listed in {MANIFEST}, so not checked: {', '.join(others)}"
    return wrong, [remark] if others else []


def _sha256(path: str, size: int, storage: Storage, on_progress: OnProgress) -> str:
    """The digest of a file of `storage`. Raises ReadFault."""
    file: VirtualFile = StoredFile(path, size, storage)
    if storage.pieces_ahead:
        file = AheadFile(file, ReadAhead(storage.pieces_ahead))
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(PIECE, size)))
    for start in range(0, size, PIECE):
        part = buffer[: min(PIECE, size - start)]
        file.read_into(start, part)
        digest.update(part)
        on_progress(len(part))
    return digest.hexdigest()
