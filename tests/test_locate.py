"""Every level that people point at, and what is said to those who point elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from mcorefs.errors import CheckpointError
from mcorefs.locate import TRACKER, Location, locate
from mcorefs.model import Options, load
from tests.checkpoints import Fixture, ensure
from tests.edited import unprivileged

COMPLETE: Mapping[str, str] = {
    "metadata.json": '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}',
    ".metadata": "",
    "common.pt": "",
    "__0_0.distcp": "",
}


def make(directory: Path, files: Mapping[str, str] = COMPLETE) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


def without(*names: str) -> dict[str, str]:
    return {name: text for name, text in COMPLETE.items() if name not in names}


def track(root: Path, said: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / TRACKER).write_text(said)
    return root


def refusal(path: Path, iteration: int | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(path, iteration)
    return str(caught.value)


def remarks(location: Location) -> str:
    return "\n".join(location.remarks)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two iterations, of which the tracker names the first, and one that is not finished."""
    root = track(tmp_path / "run", "100")
    make(root / "iter_0000100")
    make(root / "iter_0000200")
    make(root / "iter_0000300", without(".metadata", "metadata.json"))
    return root


# -- levels ---------------------------------------------------------------------------------------


def test_a_root_gives_the_tracked_iteration(root: Path) -> None:
    found = locate(root)
    assert (found.root, found.path, found.iteration) == (root, root / "iter_0000100", 100)
    assert found.format.name == "torch_dist"
    assert found.complete == ["iter_0000100", "iter_0000200"]
    assert found.incomplete == ["iter_0000300"]
    assert remarks(found) == f"{TRACKER} names iteration 100; not published: iter_0000200"


def test_an_iteration_directory(root: Path) -> None:
    for number in (100, 200):
        path = root / f"iter_0000{number}"
        for asked in (None, number):
            found = locate(path, asked)
            assert (found.root, found.path, found.iteration) == (root, path, number)


def test_release(tmp_path: Path) -> None:
    root = track(tmp_path / "run", "release\n")
    make(root / "release")
    for path in (root, root / "release"):
        found = locate(path)
        assert (found.root, found.path, found.iteration) == (root, root / "release", None)


@pytest.mark.parametrize(
    "inside",
    [
        ".",
        "checkpoint-100",  # ms-swift 4, its run directory
        "v0-20260101-120000/checkpoint-100",  # ms-swift, its output directory
    ],
)
def test_a_run_directory(tmp_path: Path, inside: str) -> None:
    root = track(tmp_path / "output" / inside, "100")
    make(root / "iter_0000100")
    (tmp_path / "output/logs/deep").mkdir(parents=True)
    found = locate(tmp_path / "output")
    assert found.path == root / "iter_0000100"
    assert found.iteration == 100
    if inside != ".":
        assert remarks(found) == (
            f"{tmp_path / 'output'} is a run directory; the checkpoint in it is {root}"
        )


@pytest.mark.parametrize("inside", ["weights", "actor/dist_ckpt"])
def test_a_checkpoint_directory_under_another_name(tmp_path: Path, inside: str) -> None:
    """NeMo 2 and verl: one iteration, whose directory is not called iter_*."""
    make(tmp_path / "step" / inside)
    make(tmp_path / "step/context", {"model.yaml": ""})
    for path in (tmp_path / "step", tmp_path / "step" / inside):
        found = locate(path)
        assert (found.path, found.iteration) == (tmp_path / "step" / inside, None)
    assert "is one iteration already; --iteration 7" in refusal(tmp_path / "step", 7)


def test_several_checkpoints_are_listed(tmp_path: Path) -> None:
    for number in (10, 20):
        make(track(tmp_path / f"checkpoint-{number}", f"{number}") / f"iter_00000{number}")
    message = refusal(tmp_path)
    assert "holds several checkpoints" in message
    for number in (10, 20):
        assert f"\n  {tmp_path / f'checkpoint-{number}'}" in message
    found = locate(tmp_path, 20)
    assert found.path == tmp_path / "checkpoint-20/iter_0000020"
    assert "holds several checkpoints" in refusal(tmp_path, 30)


def test_the_fixtures_can_be_opened_at_every_level(tmp_path: Path) -> None:
    fixtures: Mapping[str, Fixture] = ensure(["qwen3-tp2-common-state"])
    fixture = fixtures["qwen3-tp2-common-state"]
    assert fixture.iteration.name == "iter_12345678"  # eight digits
    for path in (fixture.root, fixture.iteration, fixture.root.parent):
        found = load(path, Options())
        assert found.location.path == fixture.iteration
        assert found.location.iteration == 12_345_678


# -- which iteration ------------------------------------------------------------------------------


def test_another_iteration_on_request(root: Path) -> None:
    found = locate(root, 200)
    assert (found.path, found.iteration) == (root / "iter_0000200", 200)
    assert remarks(found) == ""


def test_a_number_is_what_counts_not_its_width(tmp_path: Path) -> None:
    make(track(tmp_path, "100") / "iter_000000100")
    assert locate(tmp_path).path == locate(tmp_path, 100).path == tmp_path / "iter_000000100"


def test_an_iteration_that_is_not_there(root: Path) -> None:
    message = refusal(root, 150)
    assert f"{root} holds no iter_0000150" in message
    assert "Complete here: iter_0000100, iter_0000200; pass --iteration N" in message
    assert "is one iteration already; --iteration 200 needs the directory above it" in refusal(
        root / "iter_0000100", 200
    )


def test_an_unfinished_iteration_is_never_opened(root: Path) -> None:
    """Neither on request, nor because it is the newest, nor because the tracker names it."""
    for message in (refusal(root, 300), refusal(track(root, "300"))):
        assert (
            f"{root / 'iter_0000300'} cannot be opened: it has shard files but no .meta" in message
        )
        assert "Complete here: iter_0000100, iter_0000200" in message
    shutil.rmtree(root / "iter_0000200")
    (root / TRACKER).unlink()
    found = locate(root)
    assert found.path == root / "iter_0000100"
    assert found.incomplete == ["iter_0000300"]
    assert "its only complete iteration" in remarks(found)


def test_a_tracker_that_names_what_is_gone(root: Path) -> None:
    shutil.rmtree(root / "iter_0000100")
    message = refusal(root)
    assert "holds no iter_0000100. Complete here: iter_0000200; pass --iteration N" in message
    for child in root.glob("iter_*"):
        shutil.rmtree(child)
    assert refusal(root).endswith("holds no iter_0000100. Complete here: none")


@pytest.mark.parametrize(
    "said",
    [
        "",
        "iter_0000100",
        "-1",
        "1.5",
        "²",
        "\u0661\u0660",
        "100 200",
        "\0",
        "9" * 60 + "x",
        "\u2028",
    ],
)
def test_a_tracker_that_names_nothing(root: Path, said: str) -> None:
    message = refusal(track(root, said))
    assert f"{root / TRACKER} says {said.strip()[:40]!r}" in message
    assert "pass --iteration N" in message
    assert locate(root, 100).path == root / "iter_0000100"


def test_bytes_in_a_tracker(root: Path) -> None:
    (root / TRACKER).write_bytes(b"\xff\xfe1\x000\x00")
    assert "expected an iteration number or 'release'" in refusal(root)
    (root / TRACKER).write_bytes(b" 200\r\n")
    assert locate(root).iteration == 200
    (root / TRACKER).write_bytes(b"1" + b" " * (1 << 20))
    assert "holds no iter_0000001" in refusal(root)


def test_without_a_tracker(root: Path) -> None:
    (root / TRACKER).unlink()
    message = refusal(root)
    assert "several iterations: iter_0000100, iter_0000200; pass --iteration N" in message
    assert locate(root, 200).iteration == 200
    for number in (100, 200):
        (root / f"iter_0000{number}/.metadata").unlink()
    message = refusal(root)
    assert "none of iter_0000100, iter_0000200, iter_0000300 is complete" in message


def test_a_tracker_that_is_a_directory_is_none(root: Path) -> None:
    (root / TRACKER).unlink()
    (root / TRACKER).mkdir()
    assert "has no latest_checkpointed_iteration.txt and several" in refusal(root)


def test_release_beside_iterations(root: Path) -> None:
    make(root / "release")
    assert locate(root).iteration == 100
    assert locate(track(root, "release")).path == root / "release"
    (root / TRACKER).unlink()
    assert "iter_0000100, iter_0000200, release; pass" in refusal(root)


def test_a_directory_called_release_is_no_checkpoint(tmp_path: Path) -> None:
    make(tmp_path / "release", {"notes.txt": ""})
    assert "is not a Megatron checkpoint" in refusal(tmp_path)
    make(tmp_path / "target/release", {"a.out": ""})
    make(track(tmp_path / "ckpt", "1") / "iter_0000001")
    assert locate(tmp_path).path == tmp_path / "ckpt/iter_0000001"


# -- paths ----------------------------------------------------------------------------------------


def test_relative_paths(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root / "iter_0000100")
    for path in (".", "..", "../iter_0000100", "../../run", "../iter_0000200/../iter_0000100"):
        found = locate(Path(path))
        assert (found.root, found.path) == (root, root / "iter_0000100")


def test_symbolic_links_to_directories(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    (tmp_path / "latest").symlink_to(root / "iter_0000200")
    (root / "iter_0000400").symlink_to(root / "iter_0000200")
    assert locate(tmp_path / "link").iteration == 100
    assert locate(root, 400).path == root / "iter_0000400"
    found = locate(tmp_path / "latest")
    assert (found.root, found.path, found.iteration) == (root, root / "iter_0000200", 200)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert f"symbolic link to {tmp_path / 'nowhere'}" in refusal(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert str(tmp_path / "loop") in refusal(tmp_path / "loop")


def test_paths_that_are_no_directory(root: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'} does not exist"
    assert "does not exist" in refusal(root / TRACKER / "below a file")
    inside = refusal(root / "iter_0000100/__0_0.distcp")
    assert f"pass the directory above it, {root / 'iter_0000100'}" in inside
    assert f"pass the directory above it, {root}" in refusal(root / TRACKER)
    (tmp_path / "model.safetensors").write_text("")
    assert f"the one with {TRACKER}" in refusal(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "fifo")
    assert "is not a directory" in refusal(tmp_path / "fifo")
    assert "cannot be looked at: File name too long" in refusal(tmp_path / ("a" * 300))


def test_directories_that_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        place.chmod(0o755)
        make(track(place / "run/checkpoint-1", "1") / "iter_0000001")
        make(place / "run/lost+found/x")
        for mode in (0o000, 0o444, 0o111):
            (place / "run/lost+found").chmod(mode)
            with unprivileged():
                found = locate(place / "run")
                assert found.path == place / "run/checkpoint-1/iter_0000001"
                message = refusal(place / "run/lost+found")
            assert "cannot be listed: Permission denied" in message
        (place / "run").chmod(0)
        with unprivileged():
            assert "Permission denied" in refusal(place / "run")
            assert "Permission denied" in refusal(place / "run/checkpoint-1")
        (place / "run").chmod(0o755)


# -- what is there instead ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "is empty"),
        ({"notes.txt": "", "src/a.py": ""}, "It holds: notes.txt, src"),
        ({f"{i}.txt": "" for i in range(20)}, "13.txt, 14.txt, 15.txt, ..."),
        (
            {"config.json": "{}", "model.safetensors": "", "tokenizer.json": "{}"},
            "is a Hugging Face model directory already",
        ),
        ({"config.json": "{}", "pytorch_model-00001-of-00002.bin": ""}, "is a Hugging Face model"),
        ({"config.json": "{}", "tokenizer.json": ""}, "give this one as --hf-config"),
        (
            {"adapter_config.json": "{}", "adapter_model.safetensors": ""},
            "holds a LoRA adapter (PEFT), not a Megatron checkpoint",
        ),
        ({"adapter_model.bin": ""}, "holds a LoRA adapter (PEFT)"),
        ({"mp_rank_00/distrib_optim.pt": ""}, "none holds model_optim_rng.pt"),
        ({"model_optim_rng.pt": ""}, "holds what one rank saved; pass the directory above it"),
        (without(".metadata"), "not copied or saved completely"),
        (without(".metadata", "metadata.json"), "the save was interrupted or still goes on"),
        ({"common.pt": ""}, "holds only common.pt"),
        (
            {"metadata.json": '{"sharded_backend": "zarr"}', "x/.zarray": "{}"},
            "it is in the zarr format",
        ),
    ],
)
def test_other_directories(files: Mapping[str, str], expected: str, tmp_path: Path) -> None:
    here = make(tmp_path / "here", files)
    message = refusal(here)
    assert message.startswith(str(here))
    assert expected in message


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '{"sharded_backend": "zarr"}', "[" * 100_000, "\0\0"]
)
def test_a_metadata_json_that_says_something_else(text: str, tmp_path: Path) -> None:
    make(tmp_path / "iter_0000001", {**COMPLETE, "metadata.json": text})
    for path in (tmp_path, tmp_path / "iter_0000001"):
        assert "metadata.json names no format that mcorefs reads" in refusal(path)


@pytest.mark.parametrize("name", ["metadata.json", ".metadata", TRACKER])
def test_a_pipe_does_not_hang_the_search(name: str, tmp_path: Path) -> None:
    make(tmp_path / "iter_0000001", without(name))
    os.mkfifo(tmp_path / ("" if name == TRACKER else "iter_0000001") / name)
    if name == TRACKER:
        assert locate(tmp_path).iteration == 1
    else:
        assert "cannot be opened" in refusal(tmp_path / "iter_0000001")


def test_a_run_of_verl_is_explained(tmp_path: Path) -> None:
    track(tmp_path, "100")
    make(tmp_path / "global_step_100/actor/dist_ckpt")
    assert f"pass the directory of one model, such as {tmp_path}/global_step_100/actor" in refusal(
        tmp_path
    )
    assert locate(tmp_path / "global_step_100/actor").path.name == "dist_ckpt"


def test_ms_swift_without_megatron_weights(tmp_path: Path) -> None:
    """save_safetensors with no_save_optim: only common.pt in the iteration, weights beside it."""
    make(track(tmp_path, "5") / "iter_0000005", {"common.pt": ""})
    make(tmp_path, {"config.json": "{}", "model.safetensors": "", "args.json": json.dumps({})})
    assert "holds only common.pt" in refusal(tmp_path)
    assert "beside it; use those" in refusal(tmp_path)
