"""All formats do what every format owes (`format_contract`), of this machine and behind a URL."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from tests.format_contract import Case, FormatContract


class TestFormats(FormatContract):
    pass


class FilesByUrl(LocalFileSystem):  # type: ignore[misc]
    """Files of this machine behind a URL, so that a test can damage what mcorefs reads there."""

    protocol = "files"

    @classmethod
    def _strip_protocol(cls, path: str | Path) -> str:
        return "/" + str(path).removeprefix("files://").strip("/")


class TestFormatsByUrl(FormatContract):
    URL = "files:/"

    @pytest.fixture(scope="class", autouse=True)
    @staticmethod
    def _files() -> None:
        fsspec.register_implementation("files", FilesByUrl, clobber=True)

    @pytest.mark.parametrize("what", ["fifo", "directory"])  # a store has no links
    def test_a_shard_that_is_no_file(self, case: Case, tmp_path: Path, what: str) -> None:
        super().test_a_shard_that_is_no_file(case, tmp_path, what)
