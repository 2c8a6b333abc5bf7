"""Ratios that matter to a person who loads a model, measured in one run on one machine.

Makes checkpoints (real megatron-core, kept in --dir), then compares what goes through mcorefs with
the same bytes as real files: medians of several rounds, the two sides taking turns. The reference
for reading through a mount is libfuse's own passthrough (Debian: gcc, pkg-config, libfuse3-dev).
Dropping the page cache, for the cold figures, needs root. `peers`, other converters, installs those
of scripts/converters.txt (1.7 GB) when it is first run. Run by `scripts/bench`.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from pathlib import Path

from scripts.benchmarks import opening, peers, reading, writing
from scripts.benchmarks.bench import Bench
from scripts.benchmarks.report import Report

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "ready": writing.ready,
    "sequential": reading.sequential,
    "transposed": reading.transposed,
    "faults": reading.faults,
    "warm": reading.again,
    "from_pretrained": reading.from_pretrained,
    "random": reading.random_reads,
    "threads": reading.many_threads,
    "materialize": writing.materialize,
    "peers": peers.peers,
    "api": reading.api,
    "idle": reading.idle,
    "metadata": opening.metadata,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path.home() / ".cache" / "mcorefs-bench")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=["full", "small"], default="full")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="and the table here")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="plot read speed by path against its floors; needs `pip install mcorefs[bench]`",
    )
    parser.add_argument("--only", nargs="*", default=[], choices=SECTIONS, metavar="SECTION",
                        help=f"of: {', '.join(SECTIONS)}")  # fmt: skip
    options = parser.parse_args()
    # What is installed has been compiled: so is what is measured.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    suffix = "-small" if options.size == "small" else ""
    report = Report(machine(), "", options.rounds)
    bench = Bench(options.dir, options.rounds, suffix, report)
    sizes = f"{bench.moe.nbytes / 1e9:.2f} GB of Qwen3-MoE, {bench.transposed.nbytes / 1e9:.2f} GB"
    bench.report.data = f"{sizes} of gpt-oss"
    for name in options.only or SECTIONS:
        bench.section = name
        SECTIONS[name](bench)
    print(f"\n{bench.report.markdown()}")
    if options.json:
        options.json.write_text(bench.report.to_json())
    if options.markdown:
        options.markdown.write_text(bench.report.markdown())
    if options.plot:
        bench.report.plot(options.plot)


def machine() -> str:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    load = (
        f"load {os.getloadavg()[0]:.1f} before"  # of others: more than 0 or so, and it was shared
    )
    return f"{os.cpu_count()} x {model}, {memory:.0f} GiB, Linux {platform.release()}, {load}"


if __name__ == "__main__":
    main()
