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
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mcorefs.errors import CheckpointError
from mcorefs.formats.base import refusal
from mcorefs.passthrough import StoredFile
from mcorefs.remote import is_url
from mcorefs.remote.ahead import AheadFile, ReadAhead
from mcorefs.storage import FileIdentity, Storage, is_file_name, is_there, regular_file
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
        with path.open("rb") as file:
            stated = json.loads(file.read(_MAX_MANIFEST), object_pairs_hook=_once)
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
    directory: Path, digests: Mapping[str, str], on_progress: OnProgress = lambda count: None
) -> Findings:
    """Hash every file that `digests` lists, and look for files that it does not list.

    Memory: one piece for each thread.
    """
    differences: list[Difference] = []
    sizes: dict[str, int] = {}
    for name in digests:
        identity, why = regular_file(directory / name)
        if identity is None:
            missing = why == os.strerror(2)
            problem = f"is missing, but {MANIFEST} lists it" if missing else (why or "")
            differences.append(Difference(name, problem))
        else:
            sizes[name] = identity.size

    def compare(name: str) -> Difference | None:
        try:
            found = _sha256(directory / name, on_progress)
        except OSError as problem:
            return Difference(name, f"cannot be read: {problem.strerror}")
        except CheckpointError as problem:
            return Difference(name, str(problem))
        if found == digests[name]:
            return None
        return Difference(
            name, f"was changed: its SHA-256 is {found[:16]}..., saved was {digests[name][:16]}..."
        )

    largest_first = sorted(sizes, key=lambda name: -sizes[name])
    with ThreadPoolExecutor(threads()) as pool:
        changed = [found for found in pool.map(compare, largest_first) if found is not None]
    unlisted, remarks = _unlisted(directory, digests)
    return Findings(
        len(sizes) - len(changed),
        sum(sizes.values()),
        (*differences, *sorted(changed, key=lambda found: found.name), *unlisted),
        tuple(remarks),
    )


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


def _sha256(path: Path, on_progress: OnProgress) -> str:
    """The digest of a regular file that nobody changes meanwhile. Raises OSError."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(PIECE))
    if is_url(str(path)):
        return _sha256_remote(path, buffer, on_progress)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd, "rb", buffering=0) as file:
        before = os.fstat(fd)
        if not stat.S_ISREG(before.st_mode):
            raise CheckpointError("is not a regular file any more")
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            on_progress(count)
        if FileIdentity.of(before) != FileIdentity.of(os.fstat(fd)):
            raise CheckpointError("was written to while it was read")
    return digest.hexdigest()


def _sha256_remote(path: Path, buffer: memoryview, on_progress: OnProgress) -> str:
    identity, why = regular_file(path)
    if identity is None:
        raise CheckpointError(why or "is not there any more")
    digest = hashlib.sha256()
    storage = Storage({str(path): identity})
    file = AheadFile(StoredFile(str(path), identity.size, storage), ReadAhead(storage.pieces_ahead))
    for start in range(0, identity.size, len(buffer)):
        part = buffer[: min(len(buffer), identity.size - start)]
        file.read_into(start, part)
        digest.update(part)
        on_progress(len(part))
    storage.close()
    return digest.hexdigest()
