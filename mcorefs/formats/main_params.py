"""The optimizer's main parameters in place of the model's weights: what training would go on from.

A run in bfloat16 or float16 updates float32 copies of its weights, of which the weights are the
roundings. Where the optimizer's state has the shapes of the model, they lie beside it:

    optimizer.state.fp32_param.<fqn>    not sharded; DistributedOptimizer, if not flattened
    optimizer.state.param.<fqn>         DistributedOptimizer, fully_reshardable
    optimizer.state.<fqn>.param         the same, converted to fsdp_dtensor

Layout facts: Megatron-LM:megatron/core/optimizer/{optimizer,distrib_optimizer}.py,
tools/checkpoint/checkpoint_inspector.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mcorefs.boxes import Shape
from mcorefs.names import unwrapped

_PARAM = r"(?:fp32_param|master_param|param)"
_BEFORE = re.compile(rf"(?:chained_\d+\.)*optimizer\.state\.{_PARAM}\.(.+)$")
_BEHIND = re.compile(rf"(?:chained_\d+\.)*optimizer\.state\.(.+)\.{_PARAM}$")


def model_name(fqn: str) -> str | None:
    """The name, from the root of the model, of the parameter whose main parameter `fqn` is."""
    match = _BEFORE.match(fqn) or _BEHIND.match(fqn)
    return unwrapped(match[1]) if match else None


@dataclass(frozen=True)
class Described:
    """What .metadata says of a tensor, as far as it is needed to choose."""

    fqn: str
    dtype: str
    shape: Shape | None


@dataclass(frozen=True)
class Choice:
    main_params: Mapping[str, str]
    """Which tensors to take instead: fqns of main parameters by fqn of the model's."""
    remarks: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def choose(
    model: Iterable[Described], mains: Mapping[str, Described], optimizer: Iterable[str]
) -> Choice:
    """The main parameter of each tensor of the `model` that has one among `mains` (by model_name).

    Float32 tensors may be without: they are their own. So may those that were not trained.
    `optimizer`: fqns of all that the optimizer keeps, to say how it does where nothing fits.
    """
    chosen: dict[str, str] = {}
    rounded: list[str] = []
    unlike: list[str] = []
    for tensor in model:
        main = mains.get(unwrapped(tensor.fqn))
        if main is None:
            rounded += [tensor.fqn] if tensor.dtype != "float32" else []
        elif main.dtype == "float32" and main.shape == tensor.shape:
            chosen[tensor.fqn] = main.fqn
        else:
            unlike.append(
                f"{main.fqn} is {main.dtype} {_list(main.shape)} but the model's own tensor "
                f"{_list(tensor.shape)}"
            )
    if unlike:
        more = f", and {len(unlike) - 1} more like it" if len(unlike) > 1 else ""
        return _refusal(f"flattened (fully_sharded_model_space): {unlike[0]}{more}")
    if rounded and not chosen:
        return _refusal(_layout(optimizer))
    if not rounded:
        return Choice(chosen)
    more = ", ..." if len(rounded) > 3 else ""
    return Choice(
        chosen,
        (
            f"the optimizer has no main parameter for {len(rounded)} tensors "
            f"({', '.join(rounded[:3])}{more}), as if they were not trained: they are served from "
            "the model's weights",
        ),
    )


def _list(shape: Shape | None) -> str:
    return "of unknown shape" if shape is None else str(list(shape))


def _layout(optimizer: Iterable[str]) -> str:
    """How an optimizer keeps its main parameters, if not under the names of the model."""
    kept = list(optimizer)
    if not kept:
        return "not there: the run saved no optimizer (--no-save-optim)"
    if any(".param_state/shard_" in fqn for fqn in kept):
        return "inside one object for each group of ranks (dp_zero_gather_scatter)"
    if any(".gbuf_idx_" in fqn for fqn in kept):
        return "in buckets of data-parallel ranks (dp_reshardable or fully_sharded_bucket_space)"
    if any(".fp32_from_fp16_params." in fqn for fqn in kept):
        return "numbered instead of named (fp32_from_fp16_params)"
    return "not there: the optimizer keeps none under the names of the model"


def _refusal(how: str) -> Choice:
    return Choice(
        {},
        (),
        (
            f"--weights optimizer: the main parameters are {how}; a run with "
            "--dist-ckpt-optim-fully-reshardable saves them so that they can be read; "
            "--weights model serves the model's own weights",
        ),
    )
