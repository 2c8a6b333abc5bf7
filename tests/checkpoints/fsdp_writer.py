"""What Megatron-LM writes with `--use-megatron-fsdp` (format `fsdp_dtensor`) and with
`--use-torch-fsdp2 --ckpt-format torch_dcp`: DTensors, by torch.distributed.checkpoint.

The wrappers, the names and the uneven DTensors are megatron-core's own, on the CPU; the steps are
those of Megatron-LM:megatron/training/checkpointing.py generate_state_dict,
preprocess_fsdp_dtensor_state_dict and save_checkpoint, which first unwraps the model down to
`MegatronFSDP` or, in torch_dcp, to the bare model. A stand-in are TransformerEngine's names, where
a spec asks for them: its modules need a GPU.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallelConfig,
    TorchFullyShardedDataParallel,
    TorchFullyShardedDataParallelConfig,
)
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import (
    preprocess_state_dict_for_uneven_dtensor,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import Float16Module
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from . import torch_writer
from .spec import Spec
from .stand_ins import CudaMeansCpu, prepare_fsdp
from .weights import HFTensors, local_tensor, rank_of_this_process

StateDict = dict[str, Any]
_EXPERT = re.compile(r"(.+\.experts)\.local_experts\.(\d+)\.(linear_fc[12]\.weight)(_[wv])?$")


def save_fsdp_dtensor(
    spec: Spec, model: GPTModel, hf: Path, args: Namespace, rng: StateDict, directory: Path
) -> None:
    """Shard the loaded `model` with Megatron-FSDP and save it. Collective."""
    # Here, because megatron-core 0.15, which runs all else of this package too, has less of it.
    from megatron.core.transformer.fsdp_dtensor_checkpoint import (
        handle_experts_in_state_dict,
        handle_fp8_extra_state_case,
        handle_swiglu_in_state_dict,
    )

    prepare_fsdp()
    config = DistributedDataParallelConfig(
        use_megatron_fsdp=True,
        data_parallel_sharding_strategy="optim_grads_params",
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        bucket_size=40_000_000,
        preserve_fp32_weights=spec.main_weights,
    )
    wrapped = FullyShardedDataParallel(
        model.config, config, _half(model), device=torch.device("cpu")
    )
    if spec.main_weights:
        _load_main_weights(spec, wrapped, hf)
    tp = parallel_state.get_tensor_model_parallel_rank()
    state = _state(spec, args)
    state["model"] = wrapped.module.state_dict_for_save_checkpoint()
    optimizer = _optimizer(wrapped) if spec.optimizer_entries else None
    if optimizer is not None:
        metadata = {"distrib_optim_sharding_type": "fsdp_dtensor"}
        optimizer = optimizer.sharded_state_dict(state, metadata=metadata)
        state["opt_param_scheduler"] = {"max_lr": 1e-4, "num_steps": 12_800}
        state["rng_state"] = {f"(0, {tp})": [rng]}
    handle_fp8_extra_state_case(state["model"])
    if spec.split_halves:
        state["model"], optimizer = handle_swiglu_in_state_dict(
            wrapped.module, state["model"], optimizer
        )
    state["model"] = _named(spec, state["model"])
    if spec.is_moe:
        state["model"] = handle_experts_in_state_dict(state["model"], spec.experts)
    if optimizer is not None:
        state["optimizer"] = optimizer
    preprocess_state_dict_for_uneven_dtensor(state)
    save(state, storage_writer=FileSystemWriter(directory))


def save_torch_dcp(
    spec: Spec, model: GPTModel, args: Namespace, rng: StateDict, directory: Path
) -> None:
    """Shard the loaded `model` with torch's FSDP2 and save it. Collective.

    The optimizer's state is a stand-in: entries under the names that FSDP2's users give them.
    """
    prepare_fsdp()
    model.config.transformer_impl = "local"
    TorchFullyShardedDataParallel(
        model.config,
        TorchFullyShardedDataParallelConfig(),
        _half(model),
    )
    state = _state(spec, args)
    state["model"] = _named(spec, model.state_dict_for_save_checkpoint())
    if spec.optimizer_entries:
        moments = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        state["optimizer"] = {"state": {name: {"exp_avg": m} for name, m in moments.items()}}
        state["rng_state"] = [rng]
    save(state, storage_writer=FileSystemWriter(directory))


def _half(model: GPTModel) -> Float16Module:
    """The model in the dtype that it computes in. It rounds expert biases too, which in a run are
    all zero then and get their values later."""
    biases = {name: b for name, b in model.named_buffers() if name.endswith(".expert_bias")}
    half = Float16Module(model.config, model)
    for name, bias in biases.items():
        model.get_buffer(name).data = bias
    return half


def _state(spec: Spec, args: Namespace) -> StateDict:
    return {
        **({} if spec.common == "no_args" else {"args": args}),
        "checkpoint_version": 3.0,
        "iteration": args.iteration,
        "num_floating_point_operations_so_far": 1.5e15,
    }


@torch.no_grad()
def _load_main_weights(spec: Spec, wrapped: FullyShardedDataParallel, hf: Path) -> None:
    """The weights in fp32, of which those that the model computes with are roundings."""
    rank = rank_of_this_process()
    with HFTensors(hf) as tensors:
        for name, parameter in wrapped.named_parameters():
            value = local_tensor(spec, rank, tensors, name.replace("module.", ""))
            part = parameter.megatron_fsdp_slice
            parameter.to_local().view(-1).copy_(value.reshape(-1)[part])


def _optimizer(wrapped: FullyShardedDataParallel) -> DistributedOptimizer:
    """Megatron's own distributed optimizer, with a state as if it had stepped."""
    adam = torch.optim.AdamW(wrapped.parameters(), lr=1e-4)
    for parameter in wrapped.parameters():
        adam.state[parameter] = {
            "exp_avg": torch.full_like(parameter, 1e-3),
            "exp_avg_sq": torch.full_like(parameter, 1e-6),
        }
    config = OptimizerConfig(optimizer="adam", lr=1e-4, bf16=True)
    chunks: list[Any] = [wrapped]
    with CudaMeansCpu():
        return DistributedOptimizer(adam, config, None, None, chunks, {}, None, None, 0, 0)


def _named(spec: Spec, state: StateDict) -> StateDict:
    """The state dict under the names that `spec` asks for."""
    if spec.names == "local":
        return state
    return {
        torch_writer.te_name(_EXPERT.sub(r"\1.\3\2\4", name), state): value
        for name, value in state.items()
    }
