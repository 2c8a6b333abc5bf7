"""The writer process: import megatron-core once, then fork the ranks of one fixture after another.

Started by `pool` as `python -m tests.checkpoints.launcher`, with the jobs as JSON on stdin. Forking
gives every fixture fresh process groups and parallel state for the price of a fork; nothing is
computed in this process, so there are no threads to lose.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from . import forward, hf, lora, megatron_writer, stand_ins
from .spec import Spec

PR_SET_PDEATHSIG = 1
Task = Callable[[], None]


def main() -> None:
    warnings.filterwarnings("ignore")
    stand_ins.prepare()
    for job in json.load(sys.stdin):
        spec, directory = Spec.from_json(job["spec"]), Path(job["directory"])
        started = time.perf_counter()
        write_fixture(spec, directory, job["timeout_s"])
        _report(f"{job['name']}: written in {time.perf_counter() - started:.1f} s")


def write_fixture(spec: Spec, final: Path, timeout_s: float) -> None:
    """Write `final`/{root,hf,tokenizer}, which exist only when they are complete."""
    final.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        deadline = time.monotonic() + timeout_s
        run_all([lambda: _write_oracle(spec, work)], deadline)
        rendezvous = work / "rendezvous"

        def rank(number: int) -> Task:
            return lambda: megatron_writer.write_rank(
                spec, work, work / "root", final / "root", number, rendezvous, timeout_s
            )

        run_all([rank(number) for number in range(spec.world)], deadline)
        rendezvous.unlink(missing_ok=True)
        (work / "logits.pt").unlink(missing_ok=True)
        work.chmod(0o755)
        work.rename(final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_oracle(spec: Spec, directory: Path) -> None:
    base = directory / ("hf" if spec.adapter is None else "base")
    hf.save_model(spec, base)
    if forward.is_checkable(spec):
        forward.save_expected(spec, base, directory / "logits.pt")
    if spec.adapter is not None:
        lora.save_adapter(spec, base, directory / "adapter", directory / "hf")
    hf.save_tokenizer(spec, directory / "tokenizer")


def run_all(tasks: Sequence[Task], deadline: float) -> None:
    """Run each task in a forked process; the first failure, or the deadline, ends them all."""
    context = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = [context.Process(target=_run, args=(task,)) for task in tasks]
    try:
        for process in processes:
            process.start()
        running = set(processes)
        while running:
            ready = wait([p.sentinel for p in running], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{len(running)} of {len(processes)} ranks did not finish")
            done = {p for p in running if p.sentinel in ready}
            for process in done:
                process.join()
                if process.exitcode:
                    number = processes.index(process)
                    raise RuntimeError(f"rank {number} ended with status {process.exitcode}")
            running -= done
    finally:
        for process in processes:
            _end(process)


def _run(task: Task) -> None:
    os.setpgid(0, 0)  # so that the writers megatron forks end with their rank
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        task()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _end(process: BaseProcess) -> None:
    if process.pid is None or process.exitcode is not None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def _report(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
