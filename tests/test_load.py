"""The promise itself: real checkpoints, mounted for real, loaded by transformers.

Everything that may block on the mount runs in processes of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcorefs.mount import mounted
from tests.checkpoints import Fixture, ensure

HYBRIDS = ("nemotron_h-moe-tp2-ep2", "torch-nemotron_h-moe-tp2-pp2-ep2")
NAMES = ("qwen3-tp2-pp2-tied", "qwen3_moe-tp2-pp2-ep2", "qwen3_moe-mixed-pp2", *HYBRIDS)

LOAD = """
import sys, torch
from pathlib import Path
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

mnt, hf, tokenizer = map(Path, sys.argv[1:])
names = set()
for file in sorted(hf.glob("*.safetensors")):
    with safe_open(file, "pt") as expected, safe_open(mnt / file.name, "pt") as found:
        assert set(found.keys()) == set(expected.keys()), file.name
        assert found.metadata() == expected.metadata()
        for name in expected.keys():
            ours, theirs = found.get_tensor(name), expected.get_tensor(name)
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
            names.add(name)
assert len(names) > 20
assert {f.name for f in mnt.glob("*.safetensors")} == {f.name for f in hf.glob("*.safetensors")}

models = [AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (mnt, hf)]
assert type(models[0]) is type(models[1])
tokens = torch.arange(0, models[1].config.vocab_size, 5)[None]
with torch.no_grad():
    logits = [model(tokens).logits for model in models]
assert logits[0].abs().max() > 0
assert torch.equal(*logits)

text = "Grüße, 世界! <|im_start|>user\\nΔx = 0.5<|im_end|>"
tokenizers = [AutoTokenizer.from_pretrained(path) for path in (mnt, tokenizer)]
ids = [tokenizer(text)["input_ids"] for tokenizer in tokenizers]
assert ids[0] == ids[1] and len(ids[0]) > 10
assert tokenizers[0].decode(ids[0]) == text
chat = [{"role": "user", "content": "hello"}]
options = {"add_generation_prompt": True, "tokenize": False}
prompts = [tokenizer.apply_chat_template(chat, **options) for tokenizer in tokenizers]
assert prompts[0] == prompts[1] and "assistant" in prompts[0]
"""


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure(NAMES)


@pytest.fixture
def mnt() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="mcorefs-load-"))
    yield path
    while mounted(path) is not None:
        subprocess.run(["umount", "-l", str(path)], check=False)
    path.rmdir()


def run(*command: object, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "libfuse", "fsname"),
    [
        ("qwen3_moe-tp2-pp2-ep2", "libfuse3", "mcorefs"),
        ("qwen3_moe-tp2-pp2-ep2", "libfuse2", "mcorefs"),
        ("qwen3_moe-mixed-pp2", "libfuse3", "hf-mount"),  # transformers then reads, without mmap
        ("qwen3-tp2-pp2-tied", "libfuse3", "mcorefs"),
        *((name, "libfuse3", "mcorefs") for name in HYBRIDS),
    ],
)
def test_from_pretrained(
    fixtures: dict[str, Fixture], mnt: Path, name: str, libfuse: str, fsname: str
) -> None:
    fixture = fixtures[name]
    options = ["--vocab-size", fixture.spec.vocab_size, "--fsname", fsname]
    if fixture.spec.hf_max_shard_size:
        options += ["--shard-size", fixture.spec.hf_max_shard_size]
    run("-m", "mcorefs", "mount", fixture.root, mnt, *options, MCOREFS_FUSE=libfuse)
    entry = mounted(mnt)
    assert entry is not None
    assert (entry.fstype, entry.source) == ("fuse.mcorefs", fsname)
    run("-c", LOAD, mnt, fixture.hf, fixture.tokenizer)
    run("-m", "mcorefs", "umount", mnt)
