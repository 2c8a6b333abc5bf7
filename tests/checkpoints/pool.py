"""Fixtures on demand: a cache of written checkpoints, and one writer process for what is missing.

A fixture's directory is named by a hash of all that decides its bytes: the spec, the source of this
package and the versions of the libraries that write. So there is nothing to invalidate, and the
cache may be deleted at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from .families import SPECS
from .spec import ADAPTED, HEADED, Spec

GENERATOR_FILES = (
    "adapters.py",
    "delta_net.py",
    "falcon.py",
    "families/base.py",
    "forward.py",
    "fsdp_writer.py",
    "hf.py",
    "lora.py",
    "mamba.py",
    "megatron_model.py",
    "megatron_writer.py",
    "mimo_v2.py",
    "optimizers.py",
    "own_code.py",
    "saved_again.py",
    "saved_args.py",
    "sparse.py",
    "stand_ins.py",
    "step.py",
    "te_linear.py",
    "torch_writer.py",
    "vision.py",
    "weights.py",
)
OLD_MEGATRON = "megatron-0.15"
"""What writes the format `zarr`: .venv/NAME, which scripts/setup makes of scripts/NAME.txt."""
LIBRARIES = ("megatron-core", "torch", "transformers", "tokenizers")
REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 120.0
SLOWEST_PARAMETERS_PER_S = 2e6
"""Generous: what a fixture may take beyond TIMEOUT_S, by its number of parameters."""


class FixtureError(RuntimeError):
    """A fixture could not be written; carries the end of the writer's output."""


@dataclass(frozen=True)
class Fixture:
    spec: Spec
    directory: Path

    @property
    def root(self) -> Path:
        """The Megatron checkpoint root: tracker file and iteration directory."""
        return self.directory / "root"

    @property
    def iteration(self) -> Path:
        return self.root / self.spec.iteration_dir

    @property
    def hf(self) -> Path:
        """The `save_pretrained` directory of the model the checkpoint was made from."""
        return self.directory / "hf"

    @property
    def adapter(self) -> Path:
        """Of a spec with an adapter: its matrices, by Hugging Face's names for the layers."""
        return self.directory / "adapter"

    @property
    def tokenizer(self) -> Path:
        return self.directory / "tokenizer"


def ensure(names: Iterable[str]) -> dict[str, Fixture]:
    """The named fixtures, written first if the cache lacks them (all in one process pool)."""
    known = {**SPECS, **ADAPTED, **HEADED}
    return ensure_specs({name: known[name] for name in names})


def ensure_specs(specs: Mapping[str, Spec]) -> dict[str, Fixture]:
    """Fixtures of any specs, by names of the caller's."""
    cache = cache_directory()
    fixtures = {
        name: Fixture(spec, cache / f"{name}-{_digest(spec)}") for name, spec in specs.items()
    }
    if _missing(fixtures):
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock"):
            write(_missing(fixtures))
    return fixtures


def write(fixtures: Mapping[str, Fixture]) -> None:
    """Write fixtures to their directories, which must not exist yet."""
    old = {name: fixture for name, fixture in fixtures.items() if fixture.spec.format == "zarr"}
    _write({name: fixture for name, fixture in fixtures.items() if name not in old}, {})
    _write(old, {"PYTHONPATH": str(Path(sys.prefix) / OLD_MEGATRON)})


def _write(fixtures: Mapping[str, Fixture], variables: Mapping[str, str]) -> None:
    """Write fixtures in a process with these environment variables."""
    jobs = [
        {
            "name": name,
            "spec": fixture.spec.to_json(),
            "directory": str(fixture.directory),
            "timeout_s": TIMEOUT_S + fixture.spec.parameters() / SLOWEST_PARAMETERS_PER_S,
        }
        for name, fixture in fixtures.items()
    ]
    if not jobs:
        return
    environment = {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # nothing here runs long enough to compile it
        **os.environ,
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.launcher"],
        input=json.dumps(jobs),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise FixtureError(f"writing test checkpoints failed:\n{done.stdout[-20_000:]}")


def cache_directory() -> Path:
    configured = os.environ.get("MCOREFS_TEST_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "mcorefs-tests"


def _missing(fixtures: Mapping[str, Fixture]) -> dict[str, Fixture]:
    return {name: f for name, f in fixtures.items() if not f.directory.exists()}


def _digest(spec: Spec) -> str:
    files = (*GENERATOR_FILES, f"families/{spec.family}.py")
    sources = [(Path(__file__).parent / name).read_text() for name in files]
    versions = [f"{name} {version(name)}" for name in LIBRARIES]
    if spec.adapter is not None:
        versions.append((REPOSITORY / "scripts/trainers.txt").read_text())
    if spec.format == "zarr":
        versions.append((REPOSITORY / f"scripts/{OLD_MEGATRON}.txt").read_text())
    text = json.dumps([spec.to_json(), sources, versions])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
