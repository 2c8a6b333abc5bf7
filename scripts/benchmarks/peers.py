"""Materializing against other converters: the same checkpoint, the same machine, no GPU.

Each is a process of its own, timed from its start to the last byte on disk: what a user waits for,
imports included. Its tensors are compared with those of the real model. Where it builds Megatron's
model, TransformerEngine's layers are stand-ins (see `converters.transformer_engine`).
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from scripts.benchmarks.bench import Bench
from scripts.benchmarks.places import MCOREFS, ROOT, Ended, Place, child, in_turns, warm

CONVERTERS = Path(sys.prefix) / "converters"
PACKAGES = f"{CONVERTERS}:{Path(sys.prefix) / 'trainers'}"
"""Where scripts/converters.txt and scripts/trainers.txt are installed, which see."""


@dataclass(frozen=True)
class Converter:
    name: str
    command: tuple[str | Path, ...]
    path: str = ""
    """PYTHONPATH."""
    converts: bool = True
    """Its tensors are those of the model; else it does less."""
    ended: list[Ended] = field(default_factory=list)

    def run(self, out: Path) -> float:
        """Seconds until what it writes to `out` is on disk."""
        shutil.rmtree(out, ignore_errors=True)
        out.with_name("rendezvous").unlink(missing_ok=True)
        os.sync()
        environment = {**os.environ, "PYTHONPATH": self.path, "PYTHONWARNINGS": "ignore"}
        self.ended.append(child(*self.command, timeout=900, env=environment))
        started = time.perf_counter()
        os.sync()
        return self.ended[-1].seconds + time.perf_counter() - started

    @property
    def peak_mib(self) -> float:
        return max(one.peak_mib for one in self.ended)

    @property
    def cpu_seconds(self) -> float:
        return statistics.median(one.cpu_seconds for one in self.ended)


def peers(bench: Bench) -> None:
    moe, scratch = bench.moe, bench.directory / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    out = scratch / "out"

    def seconds_of(converter: Converter) -> float:
        seconds = converter.run(out)
        if converter.converts:
            compare(out, moe)
        return seconds

    try:
        found = converters(moe, scratch, out)
        warm(*moe.shards)
        sides = [partial(seconds_of, one) for one in found]
        taken = in_turns(min(bench.rounds, 3), *sides)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    (ours, *theirs), (seconds, *references) = found, taken
    for one, reference in zip(theirs, references, strict=True):
        bench.time("materialize, from the shell", seconds, one.name, reference, 1 / 5)
        bench.time("materialize, CPU", ours.cpu_seconds, one.name, one.cpu_seconds, None)
        bench.row("materialize, peak resident memory", ours.peak_mib, "MiB", one.name,
                  one.peak_mib, at_most=1 / 10)  # fmt: skip


def converters(moe: Place, scratch: Path, out: Path) -> list[Converter]:
    """mcorefs, and the others."""
    (iteration,) = moe.checkpoint.glob("iter_*")
    install()
    model = reference(moe, scratch)
    shown = with_run_config(iteration, model, scratch)
    tokenizer = ("--tokenizer", moe.real)

    def module(name: str, *arguments: Path) -> tuple[str | Path, ...]:
        return (sys.executable, "-m", f"scripts.benchmarks.converters.{name}", *arguments)

    return [
        Converter("mcorefs", (*MCOREFS, "materialize", moe.checkpoint, out, *tokenizer)),
        Converter("dcp_to_torch_save, load, save_file", module("torch_save", iteration, out),
                  converts=False),
        Converter(f"mbridge {version('mbridge')}", module("mbridge", iteration, model, out),
                  PACKAGES),
        Converter(f"mcore-bridge {version('mcore_bridge')}",
                  module("mcore_bridge", iteration, model, out), PACKAGES),
        Converter(f"Megatron-Bridge {version('megatron_bridge')}",
                  module("megatron_bridge", shown, model, out), PACKAGES),
    ]  # fmt: skip


def install() -> None:
    wanted = (ROOT / "scripts" / "converters.txt").read_text()
    stamp = CONVERTERS / "installed"
    if not stamp.exists() or stamp.read_text() != wanted:
        print("installing scripts/converters.txt", file=sys.stderr)
        shutil.rmtree(CONVERTERS, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--target", str(CONVERTERS)]
        command += ["--requirement", str(ROOT / "scripts" / "converters.txt")]
        subprocess.run(command, check=True)
        stamp.write_text(wanted)


def version(package: str) -> str:
    (found,) = (
        one
        for packages in PACKAGES.split(":")
        for one in Path(packages).glob(f"{package}-*.dist-info")
    )
    return found.name.removesuffix(".dist-info").rpartition("-")[2]


def reference(moe: Place, scratch: Path) -> Path:
    """The Hugging Face model that other converters want beside the checkpoint."""
    model = scratch / "model"
    command = [*MCOREFS, "materialize", str(moe.checkpoint), str(model)]
    # More than one file, for an index is wanted.
    command += ["--tokenizer", str(moe.real), "--shard-size", f"{moe.nbytes // 4_000_000 + 1}MB"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    file = model / "tokenizer_config.json"
    # The class of transformers 5 that saved it; the converters want a transformers before that.
    config = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(config))
    return model


def with_run_config(iteration: Path, model: Path, scratch: Path) -> Path:
    """The same checkpoint, as Megatron-Bridge would have saved it."""
    shown = scratch / "shown"
    (shown / iteration.name).mkdir(parents=True)
    for file in iteration.iterdir():
        (shown / iteration.name / file.name).symlink_to(file)
    command = [sys.executable, "-m", "scripts.benchmarks.converters.megatron_bridge", "--prepare"]
    command += [str(model), str(shown / iteration.name / "run_config.yaml")]
    subprocess.run(
        command,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PACKAGES, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
    )
    return shown


def compare(out: Path, moe: Place) -> None:
    """Stop unless the tensors in `out` are those of the model."""
    with safe_open(str(moe.weights), framework="pt") as real:
        left = set(real.keys())
        for file in sorted(out.glob("*.safetensors")):
            with safe_open(str(file), framework="pt") as made:
                for name in made.keys():  # noqa: SIM118
                    if name not in left or not _equal(made.get_tensor(name), real.get_tensor(name)):
                        raise SystemExit(f"{file}: {name} is not the model's")
                    left.remove(name)
    if left:
        raise SystemExit(f"{out} lacks {sorted(left)[:5]}")


def _equal(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and bool(found.equal(expected))
