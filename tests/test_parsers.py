"""Every parser, fed with what is much like a file of its kind: a moment of `scripts/fuzz`, without
its guidance, and each file in `tests/crashes` that once broke one."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.fuzzing.mutators import damaged
from scripts.fuzzing.parsers import PARSERS, Parser

ROOT = Path(__file__).parents[1]
CRASHES = sorted((ROOT / "tests/crashes").glob("*/*"))
MAX_SECONDS = 10.0
"""Of the processor, for one file."""
MAX_BYTES = 1 << 30
"""Of memory, for one file: less than a length that is only said."""


def resident(what: str) -> int:
    """VmRSS, or VmHWM: the most there was since `clear_refs` was written."""
    line = next(one for one in STATUS.read_text().splitlines() if one.startswith(what))
    return int(line.split()[1]) << 10


STATUS = Path("/proc/self/status")


def takes(parser: Parser, data: bytes, directory: Path) -> bool:
    """Whether the parser takes the bytes. Raises what is no error of its own."""
    STATUS.with_name("clear_refs").write_text("5")
    start, before = time.process_time(), resident("VmRSS")
    try:
        parser.parse(data, directory)
    except parser.errors as problem:
        if len(str(problem)) > 50_000:
            raise RuntimeError("a message without end") from problem
        return False
    finally:
        assert time.process_time() - start < MAX_SECONDS
        assert resident("VmHWM") - before < MAX_BYTES
    return True


@pytest.mark.parametrize("name", PARSERS)
def test_much_like_a_file_of_its_kind(name: str, tmp_path: Path) -> None:
    parser, rng = PARSERS[name], random.Random(name)
    seeds = [*parser.seeds()]
    assert any([takes(parser, seed, tmp_path) for seed in seeds])  # noqa: C419 (all are tried)
    for seed in seeds:
        for number in range(15):
            mutate = damaged if number % 3 == 0 else parser.mutate or damaged
            takes(parser, mutate(rng, seed), tmp_path)


@pytest.mark.parametrize("file", CRASHES, ids=lambda file: f"{file.parent.name}-{file.name}")
def test_what_once_broke_one(file: Path, tmp_path: Path) -> None:
    takes(PARSERS[file.parent.name], file.read_bytes(), tmp_path)


def test_guided(tmp_path: Path) -> None:
    """The fuzzer keeps what breaks a parser."""
    pytest.importorskip("atheris", reason="has wheels for Linux on x86_64 only")
    crashes = tmp_path / "crashes"
    done = subprocess.run(
        [sys.executable, "-c", BREAKING, "index", str(tmp_path / "corpus"), str(crashes)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "RuntimeError: broken" in done.stdout, done.stderr[-3000:]
    (crash,) = crashes.iterdir()
    assert b"[" in crash.read_bytes()


BREAKING = """
from dataclasses import replace
from scripts.fuzzing import guided
parser = guided.PARSERS["index"]
def parse(data, directory):
    if b"[" in data:
        raise RuntimeError("broken")
    parser.parse(data, directory)
guided.PARSERS = {"index": replace(parser, parse=parse)}
guided.main()
"""
"""Breaks by a kind of value that is not in the seeds."""
