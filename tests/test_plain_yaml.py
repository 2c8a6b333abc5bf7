"""YAML as plain data: what tags, aliases and depth must not do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mcorefs.errors import CheckpointError
from mcorefs.trainers import plain_loader
from mcorefs.trainers.plain_yaml import read_yaml


def test_tags_construct_nothing(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "a: !!python/object/apply:os.mkdir [exploded]\n"
        "b: !!python/name:os.system ''\n"
        "c: !!python/object/new:type {args: [x]}\n"
        "d: !unknown {e: 1}\n"
        "f: !!python/tuple [1, 2]\n"
        "g: {_target_: os.system, _call_: true, _args_: [true]}\n"
        "h: {_target_: torch.nn.functional.silu, _call_: false}\n"
        "i: {_target_: AttnBackend, _call_: true, _args_: [5], _name_: auto}\n"
        "j: 2026-11-24\n"
        "k: {_target_: AttnBackend, _call_: true, _args_: [5]}\n"
        "l: {_target_: torch.nn.init.normal_, _partial_: true, _args_: [], std: 0.02}\n"
        "m: &m {<<: {x: 1}, y: 2}\n"
        "n: [*m, *m]\n"
    )
    assert read_yaml(file) == {
        "a": ["exploded"],
        "b": "os.system",
        "c": {"args": ["x"]},
        "d": {"e": 1},
        "f": [1, 2],
        "g": True,
        "h": "torch.nn.functional.silu",
        "i": 5,
        "j": "2026-11-24",
        "k": 5,
        "l": {"_target_": "torch.nn.init.normal_", "_partial_": True, "_args_": [], "std": 0.02},
        "m": {"<<": {"x": 1}, "y": 2},
        "n": [{"<<": {"x": 1}, "y": 2}] * 2,
    }
    assert not Path("exploded").exists()


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        MERGE_BOMB,
        "a: " + "1:" * 300_000 + "1",  # to the base of 60
        "a: " + "1" * 5000,
        "a: !!float " + "1" * 500,
        "a: !!int [1]",
        "a: 0x" + "f" * 500,
        "a: {" * 500,
        "a: &a [*a]",
        "a: " + "[" * 5000 + "]" * 5000,
        "a: " + "[" * 100 + "]" * 100,
        "- a list",
        "text",
        "",
        "a: [",
        "{a: 1}: 2",
        "a: 1\n\x00",
        "a: !!int nan",
        "a: !!timestamp never",
        "a: " + "0" * (1 << 20),
    ],
)
def test_what_is_no_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"x\.yaml (cannot be read|holds no mapping)"):
        read_yaml(tmp_path / "x.yaml")


def test_too_many_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.yaml").write_text(json.dumps({"a": [0] * 1000}))
    assert read_yaml(tmp_path / "x.yaml") == {"a": [0] * 1000}
    monkeypatch.setattr(plain_loader, "MAX_NODES", 1000)
    with pytest.raises(CheckpointError, match="means too many values"):
        read_yaml(tmp_path / "x.yaml")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_yaml(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        read_yaml(tmp_path / "x.yaml")
    os.mkfifo(tmp_path / "x.yaml")
    with pytest.raises(CheckpointError, match="No such file"):
        read_yaml(tmp_path / "x.yaml")
