"""Every level that people point at, and what is said to those who point elsewhere."""

from __future__ import annotations

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


def refusal(path: Path, iteration: int | None = None, format_name: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        locate(path, iteration, format_name)
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
    assert found.complete == ["iter_0000100"]
    assert found.incomplete == ["iter_0000200", "iter_0000300"]
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
    assert remarks(found) == f"iter_0000200 was not published: {TRACKER} names iteration 100"
    found = locate(track(root, "200"), 100)
    assert (found.path, found.iteration) == (root / "iter_0000100", 100)
    assert found.complete == ["iter_0000100", "iter_0000200"]
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
        (place / "run/checkpoint-1/iter_0000001").chmod(0)
        with unprivileged():
            assert "iter_0000001 cannot be opened" in refusal(place / "run/checkpoint-1")
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
        ({"model.safetensors": "", "tokenizer.json": "{}"}, "but no config.json"),
        ({"pytorch_model-00001-of-00002.bin": ""}, "but no config.json"),
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
        ({"metadata.json": '{"sharded_backend": "zarr"}'}, "says zarr but it has no arrays"),
        ({"x/.zarray": "{}"}, "it has zarr arrays but no metadata.json that says so"),
    ],
)
def test_other_directories(files: Mapping[str, str], expected: str, tmp_path: Path) -> None:
    here = make(tmp_path / "here", files)
    message = refusal(here)
    assert message.startswith(str(here))
    assert expected in message


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '{"sharded_backend": "tar"}', "[" * 100_000, "\0\0"]
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


# -- Hugging Face directories ---------------------------------------------------------------------

HF: Mapping[str, str] = {"config.json": "{}", "model.safetensors": "", "tokenizer.json": "{}"}
EMPTY_HF: Mapping[str, str] = {"config.json": "{}", "tokenizer.json": "{}"}


def test_a_hugging_face_directory_is_one_already(tmp_path: Path) -> None:
    for name, weights in (("a", "model.safetensors"), ("b", "pytorch_model-00001-of-00002.bin")):
        here = make(tmp_path / name / "hf", {"config.json": "{}", weights: ""})
        found = locate(here)
        assert (found.path, found.format.name) == (here, "huggingface")
        assert "is one iteration already" in refusal(here, 7)
        assert locate(here.parent, None, "huggingface").path == here


def test_a_model_in_a_directory_is_not_what_was_asked_for(tmp_path: Path) -> None:
    """It may be the one that a run began from, which has saved nothing yet."""
    make(tmp_path / "a/hf", HF)
    make(tmp_path / "b/hf", HF)
    message = refusal(tmp_path)
    assert "holds no Megatron checkpoint. Pass what is a Hugging Face model directory" in message
    assert f"\n  {tmp_path}/a/hf\n  {tmp_path}/b/hf" in message
    assert f"\n  {tmp_path}/a/hf" in refusal(tmp_path / "a")


def test_a_checkpoint_below_weights(tmp_path: Path) -> None:
    """A model that was trained into its own directory: it must be said which is meant."""
    make(tmp_path, HF)
    make(track(tmp_path / "output", "1") / "iter_0000001")
    assert f"pass --format huggingface, or {tmp_path}/output" in refusal(tmp_path)
    assert locate(tmp_path, None, "huggingface").path == tmp_path
    assert locate(tmp_path, None, "torch_dist").path == tmp_path / "output/iter_0000001"


def test_ms_swift_with_weights_beside_the_iteration(tmp_path: Path) -> None:
    """save_safetensors with no_save_optim: only common.pt in the iteration."""
    here = make(track(tmp_path / "run/checkpoint-5", "5") / "iter_0000005", {"common.pt": ""})
    make(here.parent, {**HF, "args.json": "{}"})
    for path in (here, here.parent, tmp_path / "run"):
        found = locate(path)
        assert (found.path, found.iteration) == (here.parent, 5)
        assert found.format.name == "huggingface"
        assert f"{here} holds no weights; the trainer saved them as Hugging" in remarks(found)
    assert "holds no iter_0000006" in refusal(here.parent, 6)
    merged = make(track(tmp_path / "checkpoint-5-merged", "5"), {**HF, "args.json": "{}"})
    assert (locate(merged).path, locate(merged).iteration) == (merged, 5)
    (here.parent / "model.safetensors").unlink()
    for path in (here, here.parent):
        assert "holds only common.pt" in refusal(path)
        assert "but none are there" in refusal(path)


def test_weights_in_a_root_are_not_those_of_an_unfinished_iteration(tmp_path: Path) -> None:
    """They may be the model that training began from."""
    make(track(tmp_path, "5"), HF)
    assert "holds no iter_0000005" in refusal(tmp_path)
    make(tmp_path / "iter_0000005", without("metadata.json", ".metadata"))
    assert "it has shard files but no .metadata" in refusal(tmp_path)
    make(tmp_path / "iter_0000005")
    found = locate(tmp_path)
    assert found.path == tmp_path / "iter_0000005"
    assert f"{tmp_path} holds Hugging Face weights too; --format huggingface" in remarks(found)
    assert locate(tmp_path, None, "huggingface").path == tmp_path


def test_a_copy_that_megatron_bridge_saved(tmp_path: Path) -> None:
    iteration = make(track(tmp_path, "5") / "iter_0000005")
    copy = make(iteration / "hf", HF)
    for path in (tmp_path, iteration):
        assert locate(path).path == iteration
        assert f"{copy} holds Hugging Face weights too" in remarks(locate(path))
        assert locate(path, None, "huggingface").path == copy
    assert locate(copy).path == copy


# -- formats --------------------------------------------------------------------------------------


def test_a_directory_of_two_formats(tmp_path: Path) -> None:
    iteration = make(
        track(tmp_path, "5") / "iter_0000005", {**COMPLETE, "mp_rank_00/model_optim_rng.pt": ""}
    )
    for path in (tmp_path, iteration):
        message = refusal(path)
        assert f"{iteration} holds files of 2 formats: torch_dist, torch; pass --form" in message
        for name in ("torch_dist", "torch"):
            assert locate(path, None, name).format.name == name
    make(tmp_path / "iter_0000004")
    found = locate(tmp_path, 4)
    assert found.format.name == "torch_dist"
    found = locate(tmp_path, 5, "torch")
    assert (found.complete, found.incomplete) == (["iter_0000005"], ["iter_0000004"])


def test_a_format_that_is_not_there(root: Path) -> None:
    assert "iter_0000100 cannot be opened: " in refusal(root, None, "torch")
    assert "it is in format torch_dist" in refusal(root / "iter_0000100", None, "torch")
    with pytest.raises(CheckpointError, match="--format zip: expected one of torch_dist, torch, "):
        locate(root, None, "zip")


# -- saves that are not for everyone --------------------------------------------------------------


def test_non_persistent_saves(root: Path) -> None:
    passing = track(root / "non_persistent", "150")
    make(passing / "iter_0000150")
    found = locate(root)
    assert found.iteration == 100
    assert f"{passing} holds iteration 150, saved only for resuming" in remarks(found)
    assert locate(passing).iteration == 150
    track(passing, "50")
    assert "non_persistent" not in remarks(locate(root))


@pytest.mark.parametrize("session", ["7/0", "0"])
def test_local_checkpoints_are_refused_by_name(tmp_path: Path, session: str) -> None:
    file = tmp_path / session / "iter_0000100_0_local.pt"
    make(file.parent, {file.name: ""})
    for path in (tmp_path, file.parent, file):
        message = refusal(path)
        assert "holds a local (non-persistent) checkpoint of nvidia-resiliency-ext" in message
        assert "save a global one" in message
    file.rename(file.with_name("iter_0000100_0_local.dirty.pt"))
    assert "nvidia-resiliency-ext" in refusal(tmp_path)


# -- verl -----------------------------------------------------------------------------------------

WITNESS: Mapping[str, str] = {"transformer_config.json": "{}"}
FINISHED: Mapping[str, str] = {**WITNESS, "ckpt_contents.json": "{}"}


def within(directory: str, files: Mapping[str, str]) -> dict[str, str]:
    return {f"{directory}/{name}": text for name, text in files.items()}


SHARDED_1 = {**WITNESS, **within("dist_ckpt", COMPLETE), **within("huggingface", EMPTY_HF)}
SHARDED_2 = {
    **FINISHED,
    **within("model/dist_ckpt", COMPLETE),
    **within("optimizer/dist_ckpt", COMPLETE),
    **within("extra/dist_ckpt", COMPLETE),
}
BRIDGED_2 = {
    **FINISHED,
    **within("model/huggingface", HF),
    **within("optimizer/dist_ckpt", COMPLETE),
    **within("extra/dist_ckpt", COMPLETE),
}


@pytest.mark.parametrize(
    ("files", "weights", "others"),
    [
        (SHARDED_1, "dist_ckpt", ["huggingface"]),
        (SHARDED_2, "model/dist_ckpt", ["model", "optimizer", "optimizer/dist_ckpt", "extra"]),
        (BRIDGED_2, "model/huggingface", ["model", "optimizer/dist_ckpt", "extra/dist_ckpt"]),
    ],
)
def test_every_level_of_a_run_of_verl(
    tmp_path: Path, files: Mapping[str, str], weights: str, others: list[str]
) -> None:
    run = track(tmp_path / "project/run", "20")
    for number in (10, 20):
        make(run / f"global_step_{number}/actor", files)
        make(run / f"global_step_{number}/critic", files)
        make(run / f"global_step_{number}", {"data.pt": ""})
    actor = run / "global_step_20/actor"
    for path in (
        run.parent,
        run,
        actor.parent,
        actor,
        actor / weights,
        *map(actor.joinpath, others),
    ):
        found = locate(path)
        assert (found.root, found.path, found.iteration) == (run, actor / weights, 20)
        wanted = "huggingface" if "huggingface" in weights else "torch_dist"
        assert found.format.name == wanted
        if path != actor / weights:
            assert str(actor / weights) in remarks(found)
    assert locate(run, 10).path == run / "global_step_10/actor" / weights
    assert "holds no global_step_30. Complete here: global_step_10, g" in refusal(run, 30)
    critic = run / "global_step_20/critic"
    assert locate(critic).path == critic / weights
    assert f"--iteration 10 needs the directory above it, {run}" in refusal(actor, 10)


def test_verl_without_roles(tmp_path: Path) -> None:
    """The SFT trainer saves one model, right into the step."""
    run = track(tmp_path / "run", "20")
    step = make(run / "global_step_20", SHARDED_2)
    for path in (run, step, step / "model"):
        assert locate(path).path == step / "model/dist_ckpt"


def test_verl_with_both_kinds_of_weights(tmp_path: Path) -> None:
    actor = make(tmp_path / "global_step_5/actor", {**SHARDED_2, **BRIDGED_2})
    sharded, copy = actor / "model/dist_ckpt", actor / "model/huggingface"
    for path in (tmp_path, actor, actor / "model"):
        assert locate(path).path == sharded
        assert f"{copy} holds Hugging Face weights too" in remarks(locate(path))
        assert locate(path, None, "huggingface").path == copy
    assert locate(copy).path == copy
    assert locate(sharded).huggingface == copy


def test_verl_while_it_saves(tmp_path: Path) -> None:
    """ckpt_contents.json comes last; the tracker file of an asynchronous save later still."""
    make(tmp_path / "global_step_10/actor", SHARDED_2)
    late = make(
        tmp_path / "global_step_20/actor",
        {name: text for name, text in SHARDED_2.items() if name != "ckpt_contents.json"},
    )
    found = locate(tmp_path)
    assert found.iteration == 10
    assert (found.complete, found.incomplete) == (["global_step_10"], ["global_step_20"])
    found = locate(tmp_path, 20)
    assert "holds no ckpt_contents.json, which is written last" in remarks(found)
    assert "holds no ckpt_contents.json, which verl writes last" in remarks(locate(late))
    (late / "model/dist_ckpt/.metadata").unlink()
    assert f"{late}/model/dist_ckpt: it has metadata.json but no .metadata" in refusal(late)
    assert "global_step_20 cannot be opened: " in refusal(tmp_path, 20)
    assert "global_step_20 cannot be opened: " in refusal(track(tmp_path, "20"))


def test_verl_with_its_fsdp_backend(tmp_path: Path) -> None:
    track(tmp_path, "20")
    files = {"model_world_size_8_rank_0.pt": "", **within("huggingface", EMPTY_HF)}
    actor = make(tmp_path / "global_step_20/actor", files)
    for path in (tmp_path, actor.parent, actor):
        message = refusal(path)
        assert "verl's FSDP backend saved it" in message
        assert "verl.model_merger merge --backend fsdp" in message
    make(actor / "huggingface", HF)
    assert locate(tmp_path).path == actor / "huggingface"


@pytest.mark.parametrize("name", ["model", "extra", "huggingface", "dist_ckpt", "optimizer"])
def test_plain_names_do_not_make_a_run_of_verl(tmp_path: Path, name: str) -> None:
    make(track(tmp_path / name, "1") / "iter_0000001")
    assert locate(tmp_path / name).path == tmp_path / name / "iter_0000001"
    make(tmp_path / "project/model/dist_ckpt")
    assert locate(tmp_path / "project").path == tmp_path / "project/model/dist_ckpt"
