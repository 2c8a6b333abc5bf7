"""The command line as a person meets it: a process, its output and its status."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mcorefs.cli import app
from mcorefs.mount import mounted
from mcorefs.mount.prefetch import prefetch
from mcorefs.wording import parse_size, printable, size
from tests.checkpoints import Fixture, ensure

MOE, PLAIN = "qwen3_moe-tp2-pp2-ep2", "qwen3-tp2-common-state"


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure([MOE, PLAIN])


@pytest.fixture
def mnt() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="mcorefs-cli-"))
    yield path
    while mounted(path) is not None:
        subprocess.run(["umount", "-l", str(path)], check=False)
    path.rmdir()


def mcorefs(*arguments: object, status: int = 0) -> str:
    """What the command prints, stdout then stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "mcorefs", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    said = done.stdout + done.stderr
    assert done.returncode == status, said
    assert "Traceback" not in said
    return said


def test_mount_and_umount(fixtures: dict[str, Fixture], mnt: Path, tmp_path: Path) -> None:
    fixture = fixtures[MOE]
    log = tmp_path / "log"
    said = mcorefs("mount", fixture.root, mnt, "--vocab-size", 301, "--log-file", log)
    assert said.startswith(f"Qwen3MoeForCausalLM from {fixture.iteration}: 434,496 parameters")
    for expected in (
        "512 rows are cut to 301, from --vocab-size",
        f'AutoModelForCausalLM.from_pretrained("{mnt}", dtype="auto")',
        f"vllm serve {mnt} --safetensors-load-strategy=prefetch",
        "--weight-loader-prefetch-checkpoints",
        f"Unmount: mcorefs umount {mnt}",
    ):
        assert expected in said
    assert (mnt / "model.safetensors").read_bytes()[-1000:] == (
        sorted(mcorefs_materialized(fixture, tmp_path).glob("*.safetensors"))[-1].read_bytes()
    )[-1000:]
    entry = mounted(mnt)
    assert entry is not None
    assert entry.options >= {"ro", "nosuid", "nodev", "noexec", "default_permissions"}
    assert "already a mount point" in mcorefs("mount", fixture.root, mnt, status=1)
    mcorefs("umount", mnt)
    assert mounted(mnt) is None
    assert "not a mount point" in mcorefs("umount", mnt, status=1)


def cached(path: Path) -> int:
    """How many bytes of the file lie in the page cache, in whole pages (mincore)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        there = (ctypes.c_ubyte * pages)()
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), there
        assert libc.mincore(*arguments) == 0
        return mmap.PAGESIZE * sum(page & 1 for page in there)


def test_an_index_is_kept_where_that_is_wanted(
    fixtures: dict[str, Fixture], mnt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = fixtures[MOE].root
    for options, variable, count in (
        ([], "", 0),
        (["--index-cache"], "", 1),
        ([], "1", 1),  # the same one, used
    ):
        monkeypatch.setenv("MCOREFS_INDEX_CACHE", variable or "0")
        mcorefs("mount", root, mnt, *options)
        assert (mnt / "model.safetensors.index.json").exists() or (mnt / "config.json").exists()
        mcorefs("umount", mnt)
        assert len([file for file in tmp_path.rglob("*") if file.is_file()]) == count


def test_prefetch(fixtures: dict[str, Fixture], mnt: Path) -> None:
    fixture = fixtures[MOE]
    mcorefs("mount", fixture.root, mnt)
    weights = mnt / "model.safetensors"
    count = weights.stat().st_size
    assert cached(weights) < count
    mcorefs("umount", mnt)
    said = mcorefs("mount", fixture.root, mnt, "--prefetch")
    assert f"Read ahead {size(count)} in" in said
    assert cached(weights) >= count
    mcorefs("umount", mnt)


def test_what_cannot_be_prefetched_is_said(
    fixtures: dict[str, Fixture], mnt: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(fixtures[MOE].root, root)
    mcorefs("mount", root, mnt)
    assert mounted(mnt) is not None
    for shard in root.glob("*/*.distcp"):
        os.truncate(shard, 10)
    with pytest.raises(OSError, match="Input/output error"):
        prefetch(mnt, {"model.safetensors": (mnt / "model.safetensors").stat().st_size}, print)
    mcorefs("umount", mnt)


@pytest.mark.skipif(os.geteuid() != 0, reason="the kernel lets only root change it")
def test_read_ahead(fixtures: dict[str, Fixture], mnt: Path) -> None:
    for option, kib in ((), "4096"), (("--read-ahead", "256KiB"), "256"):
        mcorefs("mount", fixtures[MOE].root, mnt, "--vocab-size", 301, *option)
        device = mnt.stat().st_dev
        queue = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        assert queue.read_text().strip() == kib
        mcorefs("umount", mnt)


def mcorefs_materialized(fixture: Fixture, tmp_path: Path) -> Path:
    out = tmp_path / "materialized"
    said = mcorefs("materialize", fixture.root, out, "--vocab-size", 301)
    assert f"written to {out}: 6 files in" in said
    return out


def test_the_tree_of_a_mount_is_what_materialize_writes(
    fixtures: dict[str, Fixture], mnt: Path, tmp_path: Path
) -> None:
    options = ("--vocab-size", 301, "--shard-size", "100KB", "--dtype", "float32")
    mcorefs("mount", fixtures[MOE].root, mnt, *options, "--fsname", "hf-mount")
    mcorefs("materialize", fixtures[MOE].root, tmp_path / "out", *options, "--threads", 3)
    assert (mnt / "model.safetensors.index.json").exists()
    subprocess.run(["diff", "-r", str(mnt), str(tmp_path / "out")], check=True)
    subprocess.run(["cp", "-r", str(mnt), str(tmp_path / "copy")], check=True)
    subprocess.run(["diff", "-r", str(tmp_path / "copy"), str(tmp_path / "out")], check=True)
    assert "not empty" in mcorefs("materialize", fixtures[MOE].root, tmp_path / "out", status=1)


def test_a_hugging_face_directory_is_passed_on(
    fixtures: dict[str, Fixture], mnt: Path, tmp_path: Path
) -> None:
    hf = fixtures[MOE].hf
    said = mcorefs("mount", hf, mnt)
    assert f"Qwen3MoeForCausalLM from {hf}: 434,496 parameters, 869.0 kB in 9 files" in said
    assert "is a Hugging Face model directory already: served as it is" in said
    assert f"WARNING: {hf} holds no tokenizer" in said
    subprocess.run(["diff", "-r", str(hf), str(mnt)], check=True)
    mcorefs("umount", mnt)
    said = mcorefs("materialize", hf, tmp_path / "out")
    subprocess.run(["diff", "-r", str(hf), str(tmp_path / "out")], check=True)
    assert "135 tensors equal, 0 different" in mcorefs("verify", hf, tmp_path / "out")
    found = json.loads(mcorefs("inspect", "--json", hf))
    assert (found["format"], found["problems"]) == ("huggingface", [])
    assert "none found\n" in mcorefs("inspect", hf)
    refused = mcorefs("mount", hf, mnt, "--dtype", "float16", "--vocab-size", 7, status=1)
    assert "--dtype cannot be given for a Hugging Face model directory" in refused
    assert "--vocab-size cannot be given" in refused


def test_no_tokenizer_cannot_be_missed(fixtures: dict[str, Fixture], mnt: Path) -> None:
    root = fixtures[PLAIN].root
    said = mcorefs("mount", root, mnt)
    assert "WARNING: no tokenizer" in said
    assert f"Looked in: {fixtures[PLAIN].iteration}" in said
    assert "--tokenizer DIR" in said
    assert "Qwen/Qwen3-0.6B" in (mnt / "TOKENIZER_MISSING.txt").read_text()
    mcorefs("umount", mnt)
    refused = mcorefs("mount", root, mnt, "--require-tokenizer", status=1)
    assert "--require-tokenizer: none found in" in refused
    assert mounted(mnt) is None
    given = mcorefs("mount", root, mnt, "--tokenizer", fixtures[PLAIN].tokenizer)
    assert "WARNING" not in given
    assert not (mnt / "TOKENIZER_MISSING.txt").exists()


def test_inspect(fixtures: dict[str, Fixture]) -> None:
    said = mcorefs("inspect", fixtures[MOE].root)
    for expected in (
        "format  torch_dist",
        "iteration  100",
        "model  Qwen3MoeForCausalLM",
        "parallel  TP 2, PP 2, EP 2, ETP 1",
        "shard files  8 with 137 chunks",
        "left aside  _extra_state 72",
        f"tokenizer  {fixtures[MOE].tokenizer}",
        "verdict  whole; can be mounted",
    ):
        assert expected in said
    found = json.loads(mcorefs("inspect", "--json", fixtures[PLAIN].root))
    assert found["iteration"] == 12_345_678
    assert found["tokenizer"] is None
    assert "common_state/shard_0_1" in found["args_source"]
    assert found["problems"] == []


def test_inspect_of_a_damaged_checkpoint(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    root = Path(shutil.copytree(fixtures[MOE].root, tmp_path / "root"))
    shards = sorted((root / "iter_0000100").glob("*.distcp"))
    shards[0].unlink()
    os.truncate(shards[-1], 100)
    said = mcorefs("inspect", root, status=1)
    assert f"shard file {shards[0]}: No such file" in said
    assert f"shard file {shards[-1]} is cut short: it has 100 bytes" in said
    assert "whole" not in said
    found = json.loads(mcorefs("inspect", "--json", root, status=1))
    assert found["format"] == "torch_dist"
    (tmp_path / "mnt").mkdir()
    assert "cut short" in mcorefs("mount", root, tmp_path / "mnt", status=1)
    assert "cut short" in mcorefs("materialize", root, tmp_path / "out", status=1)
    assert not (tmp_path / "out").exists()


def test_verify(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures[MOE]
    said = mcorefs("verify", fixture.root, fixture.hf, "--vocab-size", 301)
    assert "135 tensors equal, 0 different" in said
    said = mcorefs("verify", fixture.root, fixture.hf, status=1)
    assert "lm_head.weight has shape [512, 64] in the checkpoint, [301, 64] there" in said
    assert "133 tensors equal, 2 different" in said


def test_verify_without_a_directory(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    root = Path(shutil.copytree(fixtures[MOE].root, tmp_path / "root"))
    iteration = root / "iter_0000100"
    said = mcorefs("verify", root)
    assert "as saved, by torch's CRC-32 (there is no integrity.json, which" in said
    assert "; 0 not (" in said
    said = mcorefs("verify", root, "--deep", "--iteration", 100)
    assert "135 tensors finite; 0 not" in said
    assert "as saved, by torch's CRC-32" in said
    digests = {path.name: "0" * 64 for path in iteration.iterdir()}
    (iteration / "integrity.json").write_text(json.dumps({"files": digests}))
    said = mcorefs("verify", root, status=1)
    assert "common.pt was changed: its SHA-256 is" in said
    assert f"0 files as saved, by the SHA-256 in integrity.json; {len(digests)} not" in said
    hf = fixtures[MOE].hf
    assert "nothing in it says what bytes it should hold" in mcorefs("verify", hf, status=1)
    assert mcorefs("verify", hf, "--deep").startswith("135 tensors finite; 0 not")


def test_wrong_places_and_options(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    assert "expected one of torch_dist, torch, fsdp_dtensor, zarr, huggingface" in mcorefs(
        "inspect", fixtures[MOE].hf, "--format", "zip", status=1
    )
    assert f"{tmp_path} is empty" in mcorefs("inspect", tmp_path, status=1)
    assert "does not exist" in mcorefs("inspect", tmp_path / "absent", status=1)
    root = fixtures[MOE].root
    assert "does not exist. Create it" in mcorefs("mount", root, tmp_path / "absent", status=1)
    assert "expected one of bfloat16" in mcorefs(
        "mount", root, tmp_path, "--dtype", "int4", status=1
    )
    assert "not supported yet. Supported: " in mcorefs(
        "mount", root, tmp_path, "--family", "t5", status=1
    )
    assert "'much' is not a size" in mcorefs(
        "mount", root, tmp_path, "--cache-size", "much", status=2
    )
    assert mounted(tmp_path) is None


def test_a_failed_start_leaves_nothing(fixtures: dict[str, Fixture], mnt: Path) -> None:
    root = fixtures[MOE].root
    said = mcorefs("mount", root, mnt, "--log-file", mnt / "absent/log", status=1)
    assert "log file" in said
    assert mounted(mnt) is None


def test_output_that_cannot_be_written(fixtures: dict[str, Fixture], mnt: Path) -> None:
    """What only looks has failed; a mount is there all the same."""
    root = next(iter(fixtures.values())).root
    with open("/dev/full", "wb") as full:
        for command, code in (("inspect", root), 1), (("mount", root, mnt), 0):
            done = subprocess.run(
                [sys.executable, "-m", "mcorefs", *map(str, command)],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
                timeout=60,
            )
            assert done.returncode == code, done.stderr
            assert "Traceback" not in done.stderr
            assert code == 0 or "cannot be written: No space left" in done.stderr
    assert mounted(mnt) is not None


def test_started_where_there_is_no_directory(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run(
        ["sh", "-c", 'rmdir "$1" && exec "$0" -m mcorefs inspect ckpt', sys.executable, str(gone)],
        cwd=gone,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "ckpt is nowhere, for the directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_teaches() -> None:
    said = mcorefs("--help")
    for word in ("mount", "umount", "materialize", "inspect", "verify", "mcorefs.open"):
        assert word in said
    said = mcorefs("mount", "--help")
    for option in ("--cache-size", "--hf-config", "--tokenizer", "--allow-other", "--fsname"):
        assert option in said


def completed(words: str, tmp_path: Path) -> list[str]:
    """What bash offers for the last of `words`, with the completion that README tells of."""
    command = tmp_path / "mcorefs"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m mcorefs "$@"\n')
    command.chmod(0o755)
    script = (
        'eval "$(_MCOREFS_COMPLETE=bash_source mcorefs)"\n'
        'compopt() { echo "$@"; }\n'  # it may be called only where a person types
        f"COMP_WORDS=({words}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
        '_mcorefs_completion mcorefs; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "-c", script],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.split()


def test_tab_completion(tmp_path: Path) -> None:
    assert completed("mcorefs ma", tmp_path) == ["materialize"]
    assert completed("mcorefs umount --f", tmp_path) == ["--force"]
    assert completed("mcorefs mount /t", tmp_path) == ["-o", "default"]  # bash's own: files


def test_usage_errors(tmp_path: Path) -> None:
    for arguments, expected in (
        (["inspect"], "Missing argument 'CKPT'"),
        (["mount", tmp_path], "MNT is missing; only --fuse-fd N"),
        (
            ["mount", tmp_path, tmp_path, "--fuse-fd", "2"],
            "'--fuse-fd': 2 is not in the range x>=3",
        ),
        (["mount", tmp_path, tmp_path, "--read-ahead", "x"], "'x' is not a size; write it as 4GB"),
        (["inspect", tmp_path, "--iteration", "last"], "'last' is not a valid integer"),
        (["inspect", tmp_path, "--adapter", f"{tmp_path}:nan"], "--adapter: "),
        (["materialize", tmp_path, tmp_path, "--part", "3"], "'3' is not a part such as 3/16"),
        (["materialize", tmp_path, tmp_path, "--part", "3/2"], "there is no part 3 of 2"),
        (["materialize", tmp_path, tmp_path, "--part", "1/2", "--finish"], "exclude each other"),
        (["unmount", tmp_path], "No such command 'unmount'"),
    ):
        said = mcorefs(*arguments, status=2)
        assert said.startswith("Usage: mcorefs "), said
        assert expected in said


@pytest.mark.parametrize(
    "command",
    [
        "mount place place --log-file place --hf-config place --tokenizer place",
        "materialize place place --hf-config place",
        "verify place place",
        "umount place",
        "status place",
    ],
)
def test_places_are_not_looked_at_to_parse_them(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount that hangs would hang whoever looks, before there is a time limit."""
    looked: list[object] = []
    stat = os.stat

    def noted(path: str | bytes | int, **given: int | None) -> os.stat_result:
        looked.append(path)
        return stat(path, **given)  # type: ignore[arg-type]

    name, *rest = command.split()
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", noted)
        app.commands[name].make_context(name, rest)
    assert "place" not in map(str, looked)


def test_starting_is_cheap(fixtures: dict[str, Fixture]) -> None:
    """Neither torch nor transformers is imported to mount: they cost seconds. pydantic and rich are
    what a library of command lines may bring along, for a quarter of the time of a mount."""
    code = (
        "import sys; from mcorefs.cli import app\n"
        f"app(['inspect', {str(fixtures[MOE].root)!r}], standalone_mode=False)\n"
        "import mcorefs.tree, mcorefs.mount\n"
        "dear = {'torch', 'transformers', 'megatron', 'pydantic', 'rich', 'typer'}\n"
        "assert not dear & set(sys.modules), dear & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_hostile_names_are_shown_harmless() -> None:
    assert printable("a\x1b[31mred\x07\u202e") == "a\\x1b[31mred\\x07\\x202e"
    assert printable("two\nlines\tand ü") == "two\nlines\tand ü"


def test_sizes() -> None:
    assert [parse_size(text) for text in ("7", "4GB", "1.5 KiB", "512mib", "2T")] == [
        7,
        4_000_000_000,
        1536,
        512 << 20,
        2_000_000_000_000,
    ]
    for wrong in ("", "GB", "-1", "1XB", "1e9"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(wrong)
    assert [size(count) for count in (0, 999, 1000, 61_100_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "61.1 GB",
    ]
