"""Mount a checkpoint, load it with transformers, generate a few tokens, unmount."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "A mount is a promise about bytes."


def main(arguments: list[str]) -> None:
    checkpoint, options = (Path(arguments[0]), arguments[1:]) if arguments else small_checkpoint()
    command("inspect", checkpoint, *inspect_options(options))
    mnt = Path(tempfile.mkdtemp(prefix="mcorefs-demo-"))
    command("mount", checkpoint, mnt, *options)
    try:
        print("\n$ ls -lh", mnt, flush=True)
        subprocess.run(["ls", "-lh", str(mnt)], check=True)
        load_and_generate(mnt)
    finally:
        command("umount", mnt)
        mnt.rmdir()


def small_checkpoint() -> tuple[Path, list[str]]:
    """A Qwen3-MoE saved by megatron-core at TP2 x PP2 x EP2, and the options that suit it."""
    say("Writing a small Qwen3-MoE checkpoint with megatron-core: 4 processes, TP2 PP2 EP2")
    sys.path.insert(0, str(ROOT))
    from tests.checkpoints import ensure

    fixture = ensure(["qwen3_moe-tp2-pp2-ep2"])["qwen3_moe-tp2-pp2-ep2"]
    for path in sorted(fixture.iteration.iterdir()):
        print(f"  {path.stat().st_size:>9,}  {path.relative_to(fixture.root)}")
    return fixture.root, ["--vocab-size", str(fixture.spec.vocab_size)]


def inspect_options(options: list[str]) -> list[str]:
    """Those of mount's options that inspect has too."""
    known = ("--iteration", "--family", "--hf-config", "--tokenizer", "--vocab-size")
    return [part for pair in itertools.pairwise(options) if pair[0] in known for part in pair]


def load_and_generate(mnt: Path) -> None:
    say(f'AutoModelForCausalLM.from_pretrained("{mnt}")')
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all it needs is there
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(mnt, dtype="auto")
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__}: {count:,} parameters in {time.perf_counter() - started:.2f} s")
    if (mnt / "TOKENIZER_MISSING.txt").exists():
        print((mnt / "TOKENIZER_MISSING.txt").read_text())
        inputs = {"input_ids": torch.arange(8)[None]}
        made = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        print("without a tokenizer, token ids:", made[0].tolist())
        return
    tokenizer = AutoTokenizer.from_pretrained(mnt)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    print(f"{PROMPT!r} is {inputs['input_ids'].shape[1]} tokens; the model goes on:")
    print(repr(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :])))


def command(*words: object) -> None:
    say(f"mcorefs {' '.join(map(str, words))}")
    subprocess.run([sys.executable, "-m", "mcorefs", *map(str, words)], check=True)


def say(text: str) -> None:
    print(f"\n$ {text}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
