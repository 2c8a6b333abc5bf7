"""How long N nodes take to load one checkpoint from shared storage that only moves so fast.

    .venv/bin/python -m scripts.many_nodes [--nodes 4] [--rate 200]

Nodes are processes, each with a `shared_storage` mount and a page cache of its own; all of them
together move so many MB a second. Two ways of loading: each node reads what a rank of an engine
needs (its experts, and its share of the rows of all else), or all of it. Two ways of getting there:
a mount on each node, or one `materialize` to the same storage first.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from scripts.benchmarks.places import MCOREFS, ROOT, place
from scripts.shared_storage import Storage

LOAD = """
import re, sys
from pathlib import Path
from safetensors import safe_open
root, rank, ranks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for path in sorted(root.glob("*.safetensors")):
    with safe_open(path, "pt") as file:
        for name in file.keys():
            part = file.get_slice(name)
            rows = part.get_shape()[0]
            expert = re.search(r"experts[.]([0-9]+)[.]", name)
            if expert is None:
                part[rank * rows // ranks : (rank + 1) * rows // ranks].clone()
            elif int(expert[1]) % ranks == rank:
                part[:].clone()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rate", type=float, default=200, help="MB a second, for all nodes")
    parser.add_argument("--dir", type=Path, default=Path.home() / ".cache" / "mcorefs-bench")
    options = parser.parse_args()
    shared = place(options.dir, "shared")
    size = shared.nbytes
    rate = options.rate * 1e6
    print(f"{size / 1e6:.0f} MB of weights, {options.nodes} nodes, {options.rate:.0f} MB/s for all")
    storage = Storage(shared.real.parent, rate)
    ways: dict[str, Callable[[list[Path], int], None]] = {
        "a mount on each node": by_mount,
        "mount --read-ahead 256KiB": partial(by_mount, mount_options=("--read-ahead", "256KiB")),
        "materialize once": by_files,
    }
    for way, go in ways.items():
        for what, ranks in (("its share", options.nodes), ("all of it", 1)):
            with nodes_of(storage, options.nodes) as nodes:
                before, started = storage.moved, time.perf_counter()
                go(nodes, ranks)
                seconds, bytes_moved = time.perf_counter() - started, storage.moved - before
            print(
                f"{f'{way}, then each reads {what}':46} {seconds:6.2f} s, moved "
                f"{bytes_moved / size:5.2f} x the model ({bytes_moved / rate:.2f} s at full speed)",
                flush=True,
            )


@contextmanager
def nodes_of(storage: Storage, count: int) -> Iterator[list[Path]]:
    """Directories with a fresh mount of `storage` in each."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as mounts:
        nodes = [Path(scratch) / f"node{number}" for number in range(count)]
        for node in nodes:
            node.mkdir()
            mounts.enter_context(storage.mount(node / "storage"))
        yield nodes


def by_mount(nodes: list[Path], ranks: int, mount_options: Iterable[str] = ()) -> None:
    """A mount on each node; each loads the share of one of so many ranks."""
    with ExitStack() as mounts:
        starting = []
        for node in nodes:
            node.joinpath("hf").mkdir()
            command = [*MCOREFS, "mount", str(node / "storage" / "root"), str(node / "hf")]
            command += ["--tokenizer", str(node / "storage" / "tokenizer"), *mount_options]
            starting.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL))
            mounts.callback(subprocess.run, [*MCOREFS, "umount", str(node / "hf")], cwd=ROOT)
        finish(starting)
        load([node / "hf" for node in nodes], ranks)


def by_files(nodes: list[Path], ranks: int) -> None:
    """The first node writes real files, which all load."""
    storage = nodes[0] / "storage"
    command = [*MCOREFS, "materialize", str(storage / "root"), str(storage / "out")]
    command += ["--tokenizer", str(storage / "tokenizer")]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    load([node / "storage" / "out" for node in nodes], ranks)
    subprocess.run(["rm", "-r", str(storage / "out")], check=True)


def load(directories: list[Path], ranks: int) -> None:
    command = [sys.executable, "-c", LOAD]
    finish(
        [
            subprocess.Popen([*command, str(directory), str(number % ranks), str(ranks)])
            for number, directory in enumerate(directories)
        ]
    )


def finish(processes: list[subprocess.Popen[bytes]]) -> None:
    if any([process.wait() for process in processes]):  # noqa: C419 - all, also after a failure
        raise SystemExit("a node failed")


if __name__ == "__main__":
    main()
