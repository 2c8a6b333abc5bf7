"""Materializing as Ray tasks, one for each file of weights, on all nodes of a cluster.

CKPT and OUT are on storage that every node sees under the same paths. Each worker process opens the
checkpoint once and writes files as any other process would (`output`): a worker that dies is
replaced, and its file gone on with where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcorefs.errors import McorefsError, OutputError
from mcorefs.materialize import Written, write_files
from mcorefs.materialize.output import check_space, claimed, fingerprint, finish, is_there, large
from mcorefs.materialize.writing import OnProgress
from mcorefs.model import Options
from mcorefs.tree import VirtualTree, open_tree

if TYPE_CHECKING:
    import ray

CPUS = 2
"""Of one task, which mostly waits for storage."""
RETRIES = 5
"""How often a file is gone on with after its worker died."""
CACHE_BYTES = 128 << 20
"""Of one worker: files are read from front to back."""
_NOT_INSTALLED = "to run on Ray, install it: pip install 'mcorefs[ray]'"


def materialize_on_ray(
    tree: VirtualTree,
    ckpt: Path,
    options: Options,
    out: Path,
    address: str | None = None,
    on_progress: OnProgress = lambda count: None,
) -> Written:
    """Write every file of `tree`, which is what `open_tree(ckpt, options)` gives, below `out`.

    `address` is that of a cluster ("auto": the one this machine belongs to); None starts Ray here.
    Raises as `materialize` does, and OutputError where workers cannot run or keep dying.
    """
    weights = large(tree)
    out = out.absolute()
    wanted = [name for name, file in weights.items() if not is_there(out, name, file)]
    total = tree.total_bytes
    resumed = sum(file.size for name, file in weights.items() if name not in wanted)
    small = total - sum(file.size for file in weights.values())
    with claimed(tree, out):
        check_space(out, total - resumed)
        on_progress(resumed)
        with _connected(address) as ray:
            job = ckpt.absolute(), _everywhere(options), out, fingerprint(tree)
            task = ray.remote(_write_file).options(num_cpus=CPUS, max_retries=RETRIES)
            running = {task.remote(*job, name): name for name in sorted(wanted)}
            for name in _finished(ray, running):
                on_progress(weights[name].size)
        missing = finish(tree, out)
    if missing:
        raise OutputError(f"{out} is not complete: {missing[0]} was written and is gone")
    on_progress(small)
    return Written(len(tree.files), total, resumed)


def _everywhere(options: Options) -> Options:
    """`options` as they mean the same on every node."""
    paths = {
        name: None if path is None else path.absolute()
        for name in ("hf_config", "tokenizer", "adapter")
        if isinstance(path := getattr(options, name), Path | None)
    }
    return replace(options, **paths, cache_bytes=options.cache_bytes or CACHE_BYTES)  # type: ignore[arg-type]


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """The module ray, connected; disconnected afterwards if it was not connected before."""
    try:
        import ray
    except ImportError:
        raise OutputError(_NOT_INSTALLED) from None
    if ray.is_initialized():
        yield ray
        return
    local: dict[str, Any] = {} if address is not None else {"include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, **local)
    except Exception as problem:
        raise OutputError(f"Ray at {address or 'this machine'} cannot be used: {problem}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _finished(ray: Any, running: dict[ray.ObjectRef[None], str]) -> Iterator[str]:
    """Names of files as they are done. Raises what stopped the first that failed; the others are
    then stopped too, and kept for a later run."""
    left = list(running)
    try:
        while left:
            (done, *_), left = ray.wait(left)
            try:
                ray.get(done)
            except ray.exceptions.RayTaskError as problem:
                cause = problem.cause if isinstance(problem.cause, McorefsError) else None
                raise cause or OutputError(f"{running[done]}: {problem.cause!r}") from None
            except ray.exceptions.RayError as problem:
                raise OutputError(f"{running[done]}: {problem}") from None
            yield running[done]
    finally:
        for task in left:
            ray.cancel(task, force=True)


# -- in a worker ---------------------------------------------------------------------------------

_opened: dict[tuple[Path, Options, str], VirtualTree] = {}
"""By the plan too: to a worker that lives on, a checkpoint that has changed is another one."""


def _write_file(ckpt: Path, options: Options, out: Path, plan: str, name: str) -> None:
    tree = _opened.get((ckpt, options, plan))
    if tree is None:
        tree = open_tree(ckpt, options).tree
        if fingerprint(tree) != plan:
            raise OutputError(
                f"{ckpt} is not the same on every node: do all of them see the same storage?"
            )
        _opened[ckpt, options, plan] = tree
    write_files(tree, out, [name])
