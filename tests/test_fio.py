"""fio reads a real mount, and finds in it the blocks that fio itself made.

Each block of a file that fio writes to be verified says where it lies and what its checksum is.
Such bytes are made the values of tensors, at the places where these lie in model.safetensors; the
ranks' parts of them are saved by torch. So who compares knows neither the checkpoint nor mcorefs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from mcorefs.files import read_all
from mcorefs.model import Options
from mcorefs.mount import mounted, mounting
from mcorefs.tree import open_tree
from tests.checkpoints import Fixture, ensure

NAME, WEIGHTS = "torch-qwen3-tp2", "model.safetensors"
FFN, VOCAB, HIDDEN, RANKS = 4096, 8192, 64, 2
BLOCK = 4096
LAYER = "model.layers.1.mlp"
TENSORS = {
    "model.embed_tokens.weight": VOCAB,  # rows of one rank, then of the other
    f"{LAYER}.gate_proj.weight": FFN,  # every other half of the ranks' linear_fc1
    f"{LAYER}.up_proj.weight": FFN,
    f"{LAYER}.down_proj.weight": HIDDEN,  # columns of each rank: gathered, or tiles
}
OPTIONS = Options(vocab_size=VOCAB, cache_bytes=1 << 20)
Ranges = Mapping[str, tuple[int, int]]
"""Where the data of tensors lie in the file: first byte, and bytes."""


@pytest.fixture
def place() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="mcorefs-fio-"))
    (place / "mnt").mkdir()
    yield place
    while mounted(place / "mnt") is not None:
        subprocess.run(["umount", "-l", str(place / "mnt")], check=False)
    shutil.rmtree(place)


def save(fixture: Fixture, root: Path, values: Mapping[str, torch.Tensor]) -> None:
    """The fixture with wider layers, all zeros but for what is given, as its two ranks save it."""
    for rank in range(RANKS):
        file = f"{fixture.iteration.name}/mp_rank_0{rank}/model_optim_rng.pt"
        state = torch.load(fixture.root / file, weights_only=False)
        state["args"].ffn_hidden_size = FFN
        state["args"].padded_vocab_size = state["args"].vocab_size = VOCAB
        model = state["model"]
        zeros = torch.zeros(FFN * HIDDEN, dtype=torch.bfloat16)
        for layer in range(state["args"].num_layers):
            mlp = f"decoder.layers.{layer}.mlp"
            model[f"{mlp}.linear_fc1.weight"] = zeros.view(FFN, HIDDEN).clone()
            model[f"{mlp}.linear_fc2.weight"] = (
                zeros[: len(zeros) // RANKS].view(HIDDEN, -1).clone()
            )
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            model[name] = torch.zeros(VOCAB // RANKS, HIDDEN, dtype=torch.bfloat16)
        if values:
            table, gate, up, down = values.values()
            model["embedding.word_embeddings.weight"] = table.chunk(RANKS)[rank].clone()
            mlp = "decoder.layers.1.mlp"
            halves = (gate.chunk(RANKS)[rank], up.chunk(RANKS)[rank])
            model[f"{mlp}.linear_fc1.weight"] = torch.cat(halves)
            model[f"{mlp}.linear_fc2.weight"] = down.chunk(RANKS, dim=1)[rank].clone()
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        kept = ("args", "checkpoint_version", "iteration", "model")
        torch.save({key: state[key] for key in kept}, root / file)
    tracker = "latest_checkpointed_iteration.txt"
    shutil.copy(fixture.root / tracker, root / tracker)


def ranges(root: Path) -> Ranges:
    opened = open_tree(root, OPTIONS)
    whole = read_all(opened.tree.files[WEIGHTS])
    opened.reader.close()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    found = {name: header[name]["data_offsets"] for name in TENSORS}
    return {name: (8 + length + start, end - start) for name, (start, end) in found.items()}


def fio(file: Path, within: tuple[int, int], *options: str) -> str:
    """Runs fio, and answers what is wrong. Its status tells only of blocks that are read alone."""
    offset, size = within
    command = ["fio", "--name=job", f"--filename={file}", f"--offset={offset}", f"--size={size}"]
    command += ["--verify=crc32c", f"--verify_interval={BLOCK}", "--verify_state_save=0"]
    done = subprocess.run(
        [*command, "--ioengine=psync", *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = done.stdout + done.stderr
    return said if done.returncode or "verify" in said else ""


def blocks(file: Path, at: Ranges) -> dict[str, torch.Tensor]:
    """fio's own blocks, of each range as the values of a tensor."""
    found = {}
    for name, (offset, size) in at.items():
        assert not fio(file, (offset, size), "--rw=write", f"--bs={BLOCK}", "--do_verify=0")
        data = bytearray(file.read_bytes()[offset : offset + size])
        values = torch.frombuffer(data, dtype=torch.bfloat16)
        found[name] = values.view(TENSORS[name], -1)
    return found


READING = ("--readonly", "--rw=randread", f"--bsrange={BLOCK}-256k", "--numjobs=4", "--loops=3")


def test_what_fio_wrote(place: Path) -> None:
    fixture = ensure([NAME])[NAME]
    save(fixture, place / "zeros", {})
    at = ranges(place / "zeros")
    values = blocks(place / "written", at)
    save(fixture, place / "root", values)
    assert ranges(place / "root") == at

    def read() -> list[str]:
        with mounting(open_tree(place / "root", OPTIONS).tree, place / "mnt") as mnt:
            return [
                fio(mnt / WEIGHTS, within, direct, *READING)
                for within in at.values()
                for direct in ("--direct=0", "--direct=1")
            ]

    assert set(read()) == {""}
    # And it would say so: one bit of each tensor is another in the first rank's file.
    shard = place / "root" / fixture.iteration.name / "mp_rank_00/model_optim_rng.pt"
    data = bytearray(shard.read_bytes())
    for tensor in values.values():
        first = bytes(tensor.view(torch.uint8).flatten()[:64].tolist())
        data[data.index(first) + 2000] ^= 1
    shard.write_bytes(data)
    assert all("verify failed" in said for said in read())
