"""SEMANTICS.md and CONTAINERS.md say what is so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcorefs.mount import mounted
from tests.checkpoints import ensure

ROOT = Path(__file__).parents[1]
SEMANTICS = (ROOT / "mcorefs/SEMANTICS.md").read_text()
CONTAINERS = (ROOT / "mcorefs/CONTAINERS.md").read_text()
NAME = "qwen3-tp2-pp2-tied"


@pytest.fixture
def mnt() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="mcorefs-semantics-"))
    yield path
    while mounted(path) is not None:
        subprocess.run(["umount", "-l", str(path)], check=False)
    path.rmdir()


def example() -> str:
    block = SEMANTICS.partition("## An example\n\n")[2].partition("\n\n")[0]
    return "\n".join(line.removeprefix("    ") for line in block.splitlines())


def test_the_example_runs(mnt: Path, tmp_path: Path) -> None:
    fixture = ensure([NAME])[NAME]
    program = tmp_path / "bin/mcorefs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m mcorefs "$@"\n')
    program.chmod(0o755)
    script = example()
    assert script.count("\n") >= 6
    done = subprocess.run(
        ["sh", "-e", "-c", script.replace('"$CKPT"', '"$CKPT" $CUT')],
        env={
            **os.environ,
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "CKPT": str(fixture.root),
            "CUT": f"--vocab-size {fixture.spec.vocab_size}",
            "MNT": str(mnt),
            "LOG": str(tmp_path / "log"),
            "EXPECTED": str(fixture.hf / "model.safetensors"),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal, 0 different" in done.stdout
    assert "served" in done.stdout
    assert mounted(mnt) is None


@pytest.mark.parametrize("text", [SEMANTICS, CONTAINERS], ids=["SEMANTICS", "CONTAINERS"])
def test_tests_that_are_named_exist(text: str) -> None:
    named = set(re.findall(r"\btest_\w+\.py", text))
    assert named
    for name in named:
        assert (ROOT / "tests" / name).is_file(), name
    for name in re.findall(r"`(test_\w+)`", text):
        assert any(f"def {name}(" in file.read_text() for file in ROOT.glob("tests/test_*.py")), (
            name
        )


def test_messages_that_are_explained_are_said() -> None:
    source = "".join(path.read_text() for path in (ROOT / "mcorefs").rglob("*.py"))
    messages = re.findall(r"^\| `([^`]+)` \|", SEMANTICS, re.MULTILINE)
    assert len(messages) > 12
    for message in messages:
        assert message in source, message


def test_every_promise_names_its_tests() -> None:
    promises = SEMANTICS.partition("## Promises\n\n")[2].partition("\n## ")[0]
    for promise in promises.strip().split("\n\n"):
        assert promise.startswith("**"), promise
        assert promise.endswith("]"), promise
        assert "test_" in promise.rpartition("[")[2], promise


def test_options_that_are_named_exist() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mcorefs", "mount", "--help"],
        env={**os.environ, "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    lines = [line for line in CONTAINERS.splitlines() if "mcorefs mount" in line]
    assert lines
    for line in lines:
        for option in re.findall(r" (--[a-z-]+)", line.partition("mcorefs mount")[2]):
            assert option in done.stdout, option


def test_both_are_linked() -> None:
    for file in ("README.md", "mcorefs/ARCHITECTURE.md"):
        text = (ROOT / file).read_text()
        assert "SEMANTICS.md" in text
        assert "CONTAINERS.md" in text
