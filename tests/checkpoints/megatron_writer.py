"""One rank of the run that saves a checkpoint: real megatron-core modules and its real `save`."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.models.gpt import GPTModel

from . import adapters, forward, fsdp_writer, torch_writer
from .megatron_model import build_models
from .optimizers import make_optimizer
from .saved_again import save_again
from .saved_args import saved_args
from .spec import Spec
from .weights import HFTensors, globally_named, local_tensor, rank_of_this_process

StateDict = dict[str, Any]


def write_rank(
    spec: Spec,
    oracle: Path,
    root: Path,
    final_root: Path,
    rank: int,
    rendezvous: Path,
    timeout_s: float,
) -> None:
    """Runs in process `rank` of `spec.world`. Writes under `root`; args will say `final_root`.

    `oracle`: the directory with what launcher.py writes first.
    """
    init_parallel(spec, rank, rendezvous, timeout_s)
    models = build_models(spec)
    hf = oracle / ("hf" if spec.adapter is None else "base")
    load(spec, models, hf)
    if forward.is_checkable(spec):
        forward.check(spec, models[0], oracle / "logits.pt")
    if spec.adapter is not None:
        adapters.add_adapters(spec, models, oracle / "adapter")
    if spec.flat_buffers:
        torch_writer.flatten(models)
    directory = root / spec.iteration_dir
    if rank == 0:
        directory.mkdir(parents=True)
    torch.distributed.barrier()
    tokenizer = spec.tokenizer_model or str(final_root.parent / "tokenizer")
    args = saved_args(spec, tokenizer, final_root, rank)
    if spec.format == "torch":
        optimizer = make_optimizer(spec, models, hf) if spec.optimizer_entries else None
        torch_writer.save_rank(spec, models, args, optimizer, _rng_states(), root)
        torch.distributed.barrier()
    elif spec.format == "fsdp_dtensor":
        fsdp_writer.save_fsdp_dtensor(spec, models[0], hf, args, _rng_states(), directory)
    elif spec.format == "torch_dcp":
        fsdp_writer.save_torch_dcp(spec, models[0], args, _rng_states(), directory)
    else:
        _save(spec, models, hf, args, directory)
        if spec.saved_again:
            save_again(directory)
    if rank == 0:
        (root / "latest_checkpointed_iteration.txt").write_text(str(spec.iteration))
    destroy_parallel()


def init_parallel(spec: Spec, rank: int, rendezvous: Path, timeout_s: float) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=spec.world,
        timeout=timedelta(seconds=timeout_s),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=spec.tp,
        pipeline_model_parallel_size=spec.pp,
        virtual_pipeline_model_parallel_size=spec.vpp,
        context_parallel_size=spec.cp,
        expert_model_parallel_size=spec.ep,
        expert_tensor_parallel_size=spec.expert_tp,
        create_gloo_process_groups=False,
    )


def destroy_parallel() -> None:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@torch.no_grad()
def load(spec: Spec, models: list[GPTModel], hf: Path) -> None:
    """Copy this rank's slices of the HF tensors into the models; nothing is converted."""
    rank = rank_of_this_process()
    with HFTensors(hf) as tensors:
        for model in models:
            for name, parameter in globally_named(model):
                value = local_tensor(spec, rank, tensors, name)
                if spec.main_weights:
                    value = value.to(parameter.dtype)
                if value.shape != parameter.shape or value.dtype != parameter.dtype:
                    raise ValueError(
                        f"{name}: megatron has {parameter.dtype} {tuple(parameter.shape)}, "
                        f"the HF slice is {value.dtype} {tuple(value.shape)}"
                    )
                parameter.copy_(value)


def _content_metadata(spec: Spec) -> StateDict:
    metadata: StateDict = {
        "singleton_local_shards": spec.singleton_local_shards,
        "chained_optim_avoid_prefix": True,
    }
    if spec.distributed_optimizer is not None:
        metadata["distrib_optim_sharding_type"] = spec.distributed_optimizer
    if spec.per_layer_keys:
        metadata["non_homogeneous_layers"] = True
    return metadata


def model_states(spec: Spec, models: list[GPTModel]) -> StateDict:
    """The models' sharded state dicts, under the names Megatron-LM gives them."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {**_content_metadata(spec), "dp_cp_group": group}
    names = ["model"] if len(models) == 1 else [f"model{number}" for number in range(len(models))]
    return {
        name: model.sharded_state_dict(metadata=metadata)
        for name, model in zip(names, models, strict=True)
    }


def _save(spec: Spec, models: list[GPTModel], hf: Path, args: Namespace, directory: Path) -> None:
    state: StateDict = {
        **({} if spec.common == "no_args" else {"args": args}),
        "checkpoint_version": 3.0,
        "iteration": args.iteration,
        "num_floating_point_operations_so_far": 1.5e15,
        **model_states(spec, models),
    }
    if spec.adapter is not None:
        state |= {n: adapters.saved(spec, state[n]) for n in state if n.startswith("model")}
    if spec.optimizer_entries:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        state["optimizer"] = make_optimizer(spec, models, hf).sharded_state_dict(
            state, metadata={**_content_metadata(spec), "dp_cp_group": group}
        )
        state["opt_param_scheduler"] = {"max_lr": 1e-4, "num_steps": 12_800}
        state["rng_state"] = _rng_state(spec)
    strategy: Any = ("zarr", 1)
    if spec.format != "zarr":
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=spec.writer_threads)
    if spec.fully_parallel_save:
        strategy = FullyParallelSaveStrategyWrapper(
            strategy, parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
    if spec.common == "common_state":
        _save_as_core_0_19(state, directory, strategy, _content_metadata(spec))
        return
    dist_checkpointing.save(
        state,
        str(directory),
        strategy,
        preprocess_common_before_consistancy_check=_without_rank,
        content_metadata=_content_metadata(spec),
    )


def _save_as_core_0_19(
    state: StateDict, directory: Path, strategy: Any, metadata: StateDict
) -> None:
    """`megatron.core.dist_checkpointing.save` of core_v0.19.0, over 0.16's strategies: the common
    state is an object among the tensors, and `metadata.json` names one backend."""
    state["content_metadata"] = metadata
    sharded, common = save_preprocess(state, True, _without_rank)
    rank = torch.distributed.get_rank()
    sharded["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=rank)
    strategy.save(sharded, directory)
    if rank == 0:
        config = {"sharded_backend": strategy.backend, "sharded_backend_version": strategy.version}
        (directory / "metadata.json").write_text(json.dumps(config))
    torch.distributed.barrier()


def _without_rank(common: StateDict) -> StateDict:
    """What all ranks must agree on, as Megatron-LM's training loop defines it."""
    if "args" not in common:
        return common
    args = {k: v for k, v in vars(common["args"]).items() if k not in ("rank", "local_rank")}
    return {**common, "args": args}


def _rng_states() -> StateDict:
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def _rng_state(spec: Spec) -> ShardedObject:
    """As `get_rng_state` of Megatron-LM's training/checkpointing.py."""
    states = _rng_states()
    pp = parallel_state.get_pipeline_model_parallel_rank()
    tp = parallel_state.get_tensor_model_parallel_rank()
    dp = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    if spec.ep > 1:
        shape, offset, replica = (spec.pp, spec.tp, spec.dp * spec.cp), (pp, tp, dp), 0
        return ShardedObject("rng_state", [states], shape, offset, replica_id=replica)
    return ShardedObject("rng_state", [states], (spec.pp, spec.tp), (pp, tp), replica_id=dp)
