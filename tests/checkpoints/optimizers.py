"""Megatron's own optimizers over Adam, with a state as if they had stepped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor

from .spec import Spec
from .stand_ins import CudaMeansCpu
from .weights import HFTensors, globally_named, local_tensor, rank_of_this_process


def make_optimizer(spec: Spec, models: list[GPTModel], hf: Path) -> Any:
    """The optimizer of the run; its main parameters are the oracle's weights."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-4,
        bf16=spec.dtype == "bf16",
        fp16=spec.dtype == "fp16",
        use_distributed_optimizer=spec.distributed_optimizer is not None,
    )
    with CudaMeansCpu():
        if spec.distributed_optimizer is not None:
            optimizer = _distributed(config, models)
            parts = [part for one in optimizer.chained_optimizers for part in _own_parts(one)]
            adams = [one.optimizer for one in optimizer.chained_optimizers]
        else:
            optimizer = _whole(spec, config, models)
            parts = list(_main_params(optimizer))
            adams = [optimizer.optimizer]
    if spec.main_weights:
        _load_main_params(spec, models, hf, parts)
    for adam in adams:
        for group in adam.param_groups:
            for parameter in group["params"]:
                adam.state[parameter] = {
                    "exp_avg": torch.full_like(parameter, 1e-3),
                    "exp_avg_sq": torch.full_like(parameter, 1e-6),
                    "step": torch.tensor(100.0),
                }
    return optimizer


def _whole(spec: Spec, config: OptimizerConfig, models: list[GPTModel]) -> Any:
    parameters = [p for model in models for p in model.parameters()]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.Adam([g for g in groups if g["params"]], lr=1e-4)

    def init_state(*_: object) -> None:
        return None

    if spec.dtype == "fp32":
        return FP32Optimizer(adam, config, init_state)
    return Float16OptimizerWithFloat16Params(adam, config, None, init_state)


def _distributed(config: OptimizerConfig, models: list[GPTModel]) -> Any:
    """One DistributedOptimizer for the experts and one for the rest, where there are experts."""
    sharding = DistributedDataParallelConfig(use_distributed_optimizer=True)
    chunks = [DistributedDataParallel(model.config, sharding, model) for model in models]
    return get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False)


Part = tuple[Tensor, Tensor, slice]
"""(parameter of the model, its main parameter, which elements of it that holds)."""


def _main_params(optimizer: Any) -> Iterator[Part]:
    for models, mains in zip(
        optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True
    ):
        for parameter, main in zip(models, mains, strict=True):
            yield parameter, main, slice(None)


def _own_parts(optimizer: Any) -> Iterator[Part]:
    """Those of a DistributedOptimizer, which has a run of the elements of each."""
    for group in optimizer.model_float16_groups:
        for parameter in group:
            held = optimizer._get_model_param_range_map(parameter)["param"]
            yield parameter, parameter.main_param, slice(held.start, held.end)


@torch.no_grad()
def _load_main_params(spec: Spec, models: list[GPTModel], hf: Path, parts: list[Part]) -> None:
    names = {id(p): name for model in models for name, p in globally_named(model)}
    with HFTensors(hf) as tensors:
        for parameter, main, held in parts:
            value = local_tensor(spec, rank_of_this_process(), tensors, names[id(parameter)])
            main.view(-1).copy_(value.reshape(-1)[held])
