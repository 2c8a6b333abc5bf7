"""Damages one file of a real checkpoint at a time, and looks whether what it promises still holds;
then feeds each parser alone, led by its coverage (`scripts.fuzzing`).

What holds of any damage to what describes a checkpoint (not to the elements, which nothing but
their checksums protect): it is refused with words, in bounded time; or it opens, and then each
weight that is served has the bytes that it has in the intact one, or reading it is a fault. Only a
training argument may change bytes, because that is what arguments are for (how many groups of
queries there are): there, nothing but words and time are asked for.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcorefs.errors import McorefsError, ReadFault
from mcorefs.files import read_all
from mcorefs.formats.torch_dist import TorchDist
from mcorefs.model import Options
from mcorefs.storage import Storage
from mcorefs.tree import open_tree
from scripts.fuzzing.parsers import PARSERS
from tests.checkpoints import Fixture, ensure

ROOT = Path(__file__).resolve().parents[1]
CORPUS = Path.home() / ".cache" / "mcorefs-fuzz"
"""What parsers were led to so far, for the next time."""
MAX_SECONDS = 20.0
"""Of the processor, for one look."""


@dataclass(frozen=True)
class Target:
    """A file of a fixture, and what may be damaged in it."""

    fixture: str
    file: str
    """Pattern below the root."""
    keeps_bytes: bool = True
    """Whether no damage may change the bytes of a weight."""
    ranges: Callable[[Path], list[tuple[int, int]]] | None = None
    """Where damage goes; None: anywhere."""


def _around_elements(file: Path) -> list[tuple[int, int]]:
    """The parts of a shard that are not elements: headers, pickles and directories of archives."""
    checkpoint = TorchDist().index(file.parent)
    storage = Storage(checkpoint.files)
    data: list[tuple[int, int]] = []
    spans: list[tuple[int, int]] = []
    for tensor in checkpoint.tensors.values():
        for chunk in tensor.chunks:
            if chunk.span.path == str(file):
                placed = storage.place(chunk, tensor.dtype)
                nbytes = chunk.box.volume * tensor.dtype.itemsize
                data.append((placed.offset, placed.offset + nbytes))
                spans.append((chunk.span.offset, chunk.span.offset + chunk.span.nbytes))
    storage.close()
    found: list[tuple[int, int]] = []
    for (start, stop), (first, last) in zip(spans, data, strict=True):
        found += [(start, first), (last, stop)]
    return found


def _ends(file: Path) -> list[tuple[int, int]]:
    """The pickle, which comes first in an archive, and the directory, which comes last."""
    size = file.stat().st_size
    pickled = file.read_bytes().find(b".format_version")
    return [(0, pickled if pickled > 0 else size // 4), (size - 2000, size)]


def _header(file: Path) -> list[tuple[int, int]]:
    return [(0, 8 + int.from_bytes(file.read_bytes()[:8], "little"))]


DIST, LEGACY, ZARR = "qwen3-tp2", "torch-qwen3-tp2", "zarr-qwen3_moe-tp2-pp2-ep2"
TARGETS: Mapping[str, Target] = {
    "metadata": Target(DIST, "*/.metadata"),
    "metadata, fsdp": Target("fsdp-qwen3-tp2-dp2", "*/.metadata"),
    "common": Target(DIST, "*/common.pt", keeps_bytes=False),
    "backend": Target(DIST, "*/metadata.json"),
    "tracker": Target(DIST, "latest_checkpointed_iteration.txt"),
    "shard": Target(DIST, "*/__0_0.distcp", ranges=_around_elements),
    "rank file": Target(LEGACY, "*/*/model_optim_rng.pt", False, _ends),
    "zarr array": Target(ZARR, "*/*/.zarray"),
    "safetensors": Target("", "model*.safetensors", False, _header),
    "safetensors index": Target("", "model.safetensors.index.json", False),
    "config": Target("", "config.json", False),
    "tokenizer": Target(DIST, "*/tokenizer.json"),
    "train state": Target(DIST, "latest_train_state.pt", False),
    "yaml": Target(DIST, "*/run_config.yaml", False),
    "args.json": Target(DIST, "args.json", False),
}


@dataclass(frozen=True)
class Finding:
    target: str
    seed: int
    what: str


class Bench:
    """Copies of the fixtures, each damaged in one file at a time and then mended."""

    def __init__(self, directory: Path) -> None:
        self._fixtures = ensure(sorted({t.fixture or DIST for t in TARGETS.values()}))
        self._directory = directory
        self._roots: dict[str, Path] = {}
        self._ranges: dict[Path, list[tuple[int, int]]] = {}
        self._expected: dict[Path, dict[str, bytes]] = {}

    def look(self, name: str, seed: int) -> Finding | None:
        """What damage number `seed` of a target brings to light, if anything."""
        rng, target = random.Random(f"{name} {seed}"), TARGETS[name]
        root = self._root(target.fixture)
        files = sorted(root.glob(target.file))
        file = files[rng.randrange(len(files))]
        whole = file.read_bytes()
        expected = self._intact(root, target)
        if file not in self._ranges:
            self._ranges[file] = target.ranges(file) if target.ranges else [(0, len(whole))]
        damaged = mutated(rng, whole, self._ranges[file])
        start = time.process_time()
        try:
            file.write_bytes(damaged)
            self._read(root, target, expected)
        except McorefsError as problem:
            if len(str(problem)) > 50_000:
                return Finding(name, seed, f"a message of {len(str(problem))} characters")
        except Exception:
            return Finding(name, seed, traceback.format_exc())
        finally:
            file.write_bytes(whole)
        seconds = time.process_time() - start
        return Finding(name, seed, f"{seconds:.0f} seconds") if seconds > MAX_SECONDS else None

    def _root(self, name: str) -> Path:
        if name not in self._roots:
            fixture = self._fixtures[name or DIST]
            root = self._directory / f"{len(self._roots)}"
            shutil.copytree(fixture.root if name else fixture.hf, root)
            if name == DIST:
                _with_companions(fixture, root)
            self._roots[name] = root
        return self._roots[name]

    def _intact(self, root: Path, target: Target) -> dict[str, bytes]:
        if root not in self._expected:
            self._expected[root] = _weights(root, self._options(target))
        return self._expected[root]

    def _options(self, target: Target) -> Options:
        if not target.fixture:
            return Options()
        return Options(vocab_size=self._fixtures[target.fixture].spec.vocab_size)

    def _read(self, root: Path, target: Target, expected: Mapping[str, bytes]) -> None:
        found = _weights(root, self._options(target))
        if target.keeps_bytes:
            assert found.keys() == expected.keys(), "other files"
            for name, data in found.items():
                assert data == expected[name], f"other bytes in {name}"


def _with_companions(fixture: Fixture, root: Path) -> None:
    import torch

    iteration = root / fixture.iteration.name
    for file in fixture.tokenizer.glob("*.json"):
        shutil.copy(file, iteration)
    (root / "args.json").write_text('{"model_type": "qwen3", "swift_version": "4.0", "lora": null}')
    (iteration / "run_config.yaml").write_text("model: {num_layers: 4, init: &a [1, 2], b: *a}\n")
    torch.save({"step": torch.tensor(100)}, root / "latest_train_state.pt")


def _weights(root: Path, options: Options) -> dict[str, bytes]:
    """The weights' files. Raises ReadFault, too."""
    opened = open_tree(root, options)
    try:
        files = opened.tree.files.items()
        return {name: read_all(file) for name, file in files if name.endswith(".safetensors")}
    except ReadFault:
        if root.is_dir():
            raise
        return {}
    finally:
        opened.reader.close()


_WORDS = (
    *(b"\0", b"\xff", b"\x80", b".", b"(", b"R", b"c", b"\x93", b"\x94", b"}", b"]", b"'", b'"'),
    *(b"{", b"-1", b"0", b"9" * 20, b"1e400", b"NaN", b"null", b"true", b"../", b"/etc/passwd"),
    *(b"\n", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0" * 8, b"\x8a\xff", b"&a", b"*a", b"!!"),
    b"PK\5\6",
)


def mutated(rng: random.Random, data: bytes, ranges: list[tuple[int, int]]) -> bytes:
    """`data` with one to three things wrong within `ranges`; its length changes only if they are
    all of it."""
    changed = bytearray(data)
    is_whole = ranges == [(0, len(data))]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        start, stop = rng.choice([r for r in ranges if r[1] > r[0]])
        at = rng.randrange(start, max(min(stop, len(changed)), start + 1))
        word = rng.choice(_WORDS)
        match rng.randrange(8 if is_whole else 4):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                changed[at : at + 1] = bytes(
                    [(data[min(at, len(data) - 1)] + rng.choice((1, 255))) % 256]
                )
            case 2:
                changed[at : at + 1] = bytes(
                    [data[min(at, len(data) - 1)] ^ (1 << rng.randrange(8))]
                )
            case 3:
                changed[at : at + len(word)] = word
            case 4:
                changed[at:at] = word
            case 5:
                del changed[at : at + rng.choice((1, 2, 8, 100))]
            case 6:
                other = rng.randrange(start, stop)
                changed[at:at] = data[other : other + rng.choice((1, 4, 30))]
            case 7:
                del changed[at:]
    return bytes(changed) if is_whole else bytes(changed[: len(data)])


def damage(names: Sequence[str], seconds: float) -> int:
    """Damages these targets for so long; how many findings there are."""
    with tempfile.TemporaryDirectory(prefix="mcorefs-fuzz-") as directory:
        bench = Bench(Path(directory))
        end = time.monotonic() + seconds
        seed, count, found = random.SystemRandom().randrange(1 << 40), 0, 0
        while time.monotonic() < end:
            for name in names:
                if (finding := bench.look(name, seed)) is not None:
                    found += 1
                    print(f"--target {name!r} --seed {seed}\n{finding.what}", flush=True)
                count += 1
            seed += 1
    print(f"{count} damaged checkpoints, {found} findings", flush=True)
    return found


def guided(names: Sequence[str], seconds: float) -> int:
    """Looks for bytes that break these parsers, for so long in all; how many were broken."""
    if importlib.util.find_spec("atheris") is None:
        print("parsers are fuzzed with atheris, which has wheels for Linux on x86_64 only")
        return 0
    found = 0
    for name in names:
        crashes = ROOT / "tests/crashes" / name
        before = {*crashes.glob("*")}
        command = [sys.executable, "-m", "scripts.fuzzing.guided", name, str(CORPUS / name)]
        command += [str(crashes), f"-max_total_time={max(int(seconds / len(names)), 1)}"]
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        said = done.stdout.decode(errors="replace")
        runs = re.findall(r"number_of_executed_units: (\d+)", said)
        print(f"{name}: {' '.join(runs) or 'no'} runs", flush=True)
        if done.returncode:
            found += 1
            broken = "Uncaught Python exception"
            print(said[said.index(broken) :] if broken in said else said[-3000:])
            print(*({*crashes.glob("*")} - before), flush=True)
        elif not any(crashes.iterdir()):
            crashes.rmdir()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--target", choices=TARGETS, help="damage this one only")
    parser.add_argument("--seed", type=int, help="look at this one only, of --target")
    parser.add_argument("--parser", choices=PARSERS, help="feed this one only")
    given = parser.parse_args()
    if given.seed is not None:
        with tempfile.TemporaryDirectory(prefix="mcorefs-fuzz-") as directory:
            print(Bench(Path(directory)).look(given.target, given.seed) or "nothing")
        return
    found = 0
    share = given.seconds if given.target or given.parser else given.seconds / 2
    if given.target or not given.parser:
        found += damage([given.target] if given.target else list(TARGETS), share)
    if given.parser or not given.target:
        found += guided([given.parser] if given.parser else list(PARSERS), share)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
