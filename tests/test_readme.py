"""README.md says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mcorefs.cli import app
from scripts.tables import BEGIN, END, updated

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_tables_are_up_to_date() -> None:
    assert BEGIN in README
    assert END in README
    assert updated(README) == README, "run: .venv/bin/python scripts/tables.py"


def test_every_command_is_there() -> None:
    for name in app.commands:
        assert f"`mcorefs {name} " in README, name


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`?scripts/(\w+)", README))))
def test_scripts_exist(name: str) -> None:
    assert any((ROOT / "scripts").glob(f"{name}*"))


def test_modules_of_the_architecture_exist() -> None:
    text = (ROOT / "mcorefs/ARCHITECTURE.md").read_text()
    table = text.partition("| module | what it knows |")[2].partition("\n\n")[0]
    for line in table.splitlines()[2:]:
        for name in re.findall(r"`([\w/]+)`", line.split("|")[1]):
            path = ROOT / "mcorefs" / name
            assert path.is_dir() or path.with_suffix(".py").is_file(), name
