"""A stranger's directory: files that never end, links out of it, numbers that no model has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from mcorefs.errors import CheckpointError, McorefsError
from mcorefs.files import read_all
from mcorefs.formats.huggingface import resolved
from mcorefs.formats.torch_dist import TorchDist
from mcorefs.model import Model, Options, load
from mcorefs.tree import open_tree
from tests.checkpoints import Fixture, ensure

DENSE, LEGACY, WINDOWED = "qwen3-tp2", "torch-qwen3-tp2", "gpt_oss-tp2-ep2"
NAMES = [DENSE, LEGACY, WINDOWED]


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure(NAMES)


@pytest.fixture
def run_of(fixtures: dict[str, Fixture], tmp_path: Path) -> Path:
    """A run with its config.json and its tokenizer beside the iteration."""
    fixture = fixtures[DENSE]
    root = Path(shutil.copytree(fixture.root, tmp_path / "run"))
    for source in (fixture.hf, fixture.tokenizer):
        for file in source.glob("*.json"):
            shutil.copy(file, root / file.name)
    return root


# One child looks at all: what is named on its command line, and says what became of each.
CHILD = """
import resource, sys, time
from pathlib import Path
from mcorefs.errors import McorefsError
from mcorefs.model import Options
from mcorefs.tree import open_tree
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
for path in sys.argv[2:]:
    start = time.monotonic()
    try:
        open_tree(Path(path), Options(vocab_size=int(sys.argv[1])))
        said = "opened"
    except McorefsError as problem:
        said = "refused: " + " ".join(str(problem).split())
    assert time.monotonic() - start < 10, path
    print(path, said, flush=True)
"""
LATER = (
    "args.json",
    "config.yaml",
    "generation_config.json",
    "latest_train_state.pt",
    "model.safetensors.index.json",
    "additional_chat_templates/x.jinja",
)
"""Files that this run does not have but that are looked for."""
LATER_IN = ("args.json", "run_config.yaml", "train_state.pt", "config.json", "context/model.yaml")


def test_files_that_are_none_hang_and_fill_nothing(
    run_of: Path, fixtures: dict[str, Fixture]
) -> None:
    """Each file that is read whole, as a pipe that nobody writes to, as one of a tebibyte without
    contents, as a link to itself and as a directory: no process hangs, runs out of memory or ends
    with anything but words."""
    iteration = fixtures[DENSE].iteration.name
    small = [str(p.relative_to(run_of)) for p in run_of.rglob("*") if p.is_file()]
    names = [name for name in small if not name.endswith(".distcp")]
    names += [*LATER, *(f"{iteration}/{name}" for name in LATER_IN)]
    copies: list[Path] = []
    for number, name in enumerate(dict.fromkeys(names)):
        for kind in ("pipe", "huge", "loop", "directory"):
            root = run_of.with_name(f"{number}-{kind}")
            shutil.copytree(run_of, root, copy_function=os.link)
            file = root / name
            file.parent.mkdir(exist_ok=True)
            file.unlink(missing_ok=True)
            if kind == "pipe":
                os.mkfifo(file)
            elif kind == "huge":
                file.touch()
                os.truncate(file, 1 << 40)
            elif kind == "loop":
                file.symlink_to(file.name)
            else:
                file.mkdir()
            copies.append(root)
    vocab = str(fixtures[DENSE].spec.vocab_size)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, vocab, *map(str, copies)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-2000:]
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert len(said) == len(copies)
    for kind in ("pipe", "huge", "loop", "directory"):
        for name in (f"{iteration}/metadata.json", f"{iteration}/.metadata"):
            root = run_of.with_name(f"{names.index(name)}-{kind}")
            assert said[str(root)].startswith("refused")


def test_metadata_of_a_tebibyte_is_refused_with_words(
    run_of: Path, fixtures: dict[str, Fixture]
) -> None:
    os.truncate(run_of / fixtures[DENSE].iteration.name / ".metadata", 1 << 40)
    with pytest.raises(CheckpointError, match=r"it is larger than 2048 MiB"):
        load(run_of, Options())


# -- links ----------------------------------------------------------------------------------------

SECRET = {"aws_secret_access_key": "hunter2"}


@pytest.mark.parametrize(
    "name",
    [
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "added_tokens.json",
        "additional_chat_templates/x.jinja",
    ],
)
def test_no_other_file_of_this_machine_is_served(
    run_of: Path, fixtures: dict[str, Fixture], tmp_path: Path, name: str
) -> None:
    secret = tmp_path / "home/credentials"
    secret.parent.mkdir()
    secret.write_text(json.dumps(SECRET))
    file = run_of / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    file.symlink_to(secret)
    options = Options(vocab_size=fixtures[DENSE].spec.vocab_size)
    if name == "generation_config.json":
        with pytest.raises(CheckpointError) as caught:
            open_tree(run_of, options)
        said = str(caught.value)
    else:
        opened = open_tree(run_of, options)
        served = b"".join(read_all(each) for each in opened.tree.files.values())
        assert b"hunter2" not in served
        assert isinstance(opened.source, Model)
        said = "\n".join(opened.source.remarks)
    assert f"{file} is a symbolic link to {secret}" in said
    assert "hunter2" not in said
    # What the user names is the user's: links in it are followed.
    given = tmp_path / "given"
    given.mkdir()
    for source in fixtures[DENSE].tokenizer.iterdir():
        (given / source.name).symlink_to(source)
    if file.parent == run_of and name != "generation_config.json":
        found = load(run_of, Options(vocab_size=options.vocab_size, tokenizer=given))
        assert found.tokenizer.found


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("config.json")
    with pytest.raises(CheckpointError, match="leads nowhere"):
        resolved(tmp_path / "config.json")


# -- numbers --------------------------------------------------------------------------------------

HUGE = 10**600
IMPOSSIBLE: tuple[object, ...] = (
    HUGE,
    -HUGE,
    1 << 63,
    float("nan"),
    float("inf"),
    [1, HUGE],
    {"a": float("nan")},
)
ODD: tuple[object, ...] = (
    -1,
    0,
    0.5,
    True,
    "x" * 3000,
    "\x1b[31m\udc80",
    [],
    {},
    "10000000000",
    10**12,
)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        (DENSE, ("rotary_seq_len_interpolation_factor", "layernorm_epsilon", "rotary_base")),
        (WINDOWED, ("window_attn_skip_freq", "window_size", "mscale", "yarn_mscale_all_dim")),
        (WINDOWED, ("moe_router_topk", "activation_func_clamp_value")),
    ],
)
def test_impossible_training_arguments(
    fixtures: dict[str, Fixture], tmp_path: Path, name: str, keys: tuple[str, ...]
) -> None:
    """An error with words, or a config.json that is JSON."""
    fixture = fixtures[name]
    root = Path(shutil.copytree(fixture.root, tmp_path / "run"))
    args = TorchDist().index(fixture.iteration).args
    options = Options(vocab_size=fixture.spec.vocab_size)
    for key in keys:
        for value in (*IMPOSSIBLE, *ODD):
            state = {"args": Namespace(**{**args, key: value})}
            torch.save(state, root / fixture.iteration.name / "common.pt")
            if any(value is one for one in IMPOSSIBLE):
                with pytest.raises(McorefsError, match=key):
                    load(root, options)
                continue
            with suppress(McorefsError):
                json.dumps(dict(load(root, options).config), allow_nan=False)
