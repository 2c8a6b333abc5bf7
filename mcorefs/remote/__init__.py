"""Checkpoints that lie in an object store or behind a server: whatever fsspec reaches by a URL.

    parse_path   what a user names -> a Path, of this machine or remote
    RemotePath   names and small files, with the interface of pathlib
    Objects      ranges of large files: blocks, many in flight, each of the version that was opened

fsspec is imported where a URL is used, never for local files. Credentials are its business: they
come from the environment and the configuration files of each file system, never through here.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from mcorefs.errors import CheckpointError

__all__ = ["is_url", "parse_path"]

_PASSWORD = re.compile(r"[a-z0-9+.-]+://[^/]*:[^/]*@", re.IGNORECASE)


def is_url(path: str) -> bool:
    """Whether `path` names something that is not a local file; pathlib never leaves "//" in one."""
    return "://" in path


def parse_path(text: str) -> Path:
    """The path that a user means: of a local file, or by a URL that fsspec knows.

    Raises CheckpointError where the URL cannot be used or what reads it is not installed.
    """
    if not is_url(text):
        return Path(text)
    protocol, _, rest = text.partition("://")
    if protocol in ("file", "local"):
        return Path(unquote(rest))
    if _PASSWORD.match(text):
        raise CheckpointError(
            f"a URL must not hold a password, which others see in process lists and logs; give "
            f"credentials for {protocol}:// in the environment or in fsspec's configuration"
        )
    if "::" in text:
        raise CheckpointError(f"{text}: chains of file systems (::) are not supported")
    if protocol in ("http", "https") and ("?" in text or "#" in text):
        raise CheckpointError(
            f"{text.partition('?')[0]}: a URL with a query names one file; pass that of a directory"
        )
    from mcorefs.remote.path import remote_path

    return remote_path(protocol, rest)
