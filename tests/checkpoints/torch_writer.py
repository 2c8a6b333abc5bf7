"""What Megatron-LM writes with `--ckpt-format torch`: each rank's own state dict, by torch.save.

Follows Megatron-LM:megatron/training/checkpointing.py: get_checkpoint_name, generate_state_dict and
save_checkpoint (which ranks write). The state dicts are those of real megatron-core modules built
from its local layer specs. TransformerEngine and grouped_gemm need a GPU, so their names and
layouts are made here from the same values, by how their modules use them
(megatron/core/transformer/moe/experts.py, megatron/core/extensions/transformer_engine.py).
"""

from __future__ import annotations

import io
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from .spec import Spec

StateDict = dict[str, Any]
INDEXER = "self_attention.core_attention.indexer.linear_wk.weight"
"""Where there is one, norms of latents are on their own."""
_EXPERT = re.compile(r"(.+\.experts)\.local_experts\.(\d+)\.(linear_fc[12]\.(?:weight|bias))$")


def save_rank(
    spec: Spec, models: list[GPTModel], args: Namespace, optimizer: Any, rng: Any, root: Path
) -> None:
    """Write this rank's file, if it is one of those that write. `optimizer`, `rng`: may be None."""
    states = [model.state_dict_for_save_checkpoint() for model in models]
    if spec.names != "local":
        states = list(map(_with_whole_down_projections, states))
    first = parallel_state.get_data_parallel_rank() == 0
    if not first and parallel_state.get_expert_data_parallel_rank() != 0:
        return
    path = root / _name(spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    state: StateDict = {} if spec.common == "no_args" else {"args": args}
    state |= {"checkpoint_version": 3.0, "iteration": args.iteration}
    for number, saved in enumerate(states):
        key = "model" if len(models) == 1 else f"model{number}"
        state[key] = _named(spec, saved)
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
        state["opt_param_scheduler"] = {"max_lr": 1e-4, "num_steps": 12_800}
        state["rng_state"] = [rng]
        if first and spec.flat_buffers:
            torch.save({0: {"param": torch.zeros(64)}}, path.with_name("distrib_optim.pt"))
    state["num_floating_point_operations_so_far"] = 1.5e15
    torch.save(state, path)


def _name(spec: Spec) -> Path:
    """`get_checkpoint_name` without the root."""
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if spec.pp > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if spec.ep > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return Path(spec.iteration_dir) / name / "model_optim_rng.pt"


def flatten(models: list[GPTModel]) -> None:
    """Make all parameters views of the buffers of megatron's own DistributedDataParallel, as a
    run with the distributed optimizer does."""
    config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    for model in models:
        DistributedDataParallel(model.config, config, model)
        parameters = list(model.parameters())
        storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        if len(storages) > 4:
            raise AssertionError(f"{len(parameters)} parameters lie in {len(storages)} storages")


def _with_whole_down_projections(state: StateDict) -> StateDict:
    """TransformerEngine's down projections to latents are not parallel
    (megatron/core/transformer/multi_latent_attention.py). Collective."""
    whole: StateDict = {}
    for name, value in state.items():
        if name.endswith("_down_proj.weight"):
            parts = [
                torch.empty_like(value)
                for _ in range(parallel_state.get_tensor_model_parallel_world_size())
            ]
            torch.distributed.all_gather(
                parts, value.contiguous(), group=parallel_state.get_tensor_model_parallel_group()
            )
            whole[name] = torch.cat(parts)
    return {**state, **whole}


def _named(spec: Spec, state: StateDict) -> StateDict:
    """The state dict under the names (and in the layouts) that `spec` asks for."""
    if spec.names == "local":
        return state
    named: StateDict = {}
    experts: dict[str, dict[str, list[Tensor]]] = {}
    for name, value in state.items():
        if match := _EXPERT.match(name):
            experts.setdefault(_mtp_name(match[1]), {}).setdefault(match[3], []).append(value)
        else:
            named[te_name(name, state)] = value
            if re.search(r"\.linear_(qkv|proj|fc[12])\.weight$", name):
                named[name.replace(".weight", "._extra_state")] = _extra_state(len(named))
    for module, layers in experts.items():
        if spec.names == "grouped_mlp":
            fc1, fc2 = (torch.stack([w.T for w in layers[f"linear_fc{i}.weight"]]) for i in (1, 2))
            named[f"{module}.weight1"] = fc1.reshape(spec.hidden, -1)
            named[f"{module}.weight2"] = fc2.reshape(-1, spec.hidden)
            continue
        for layer, weights in layers.items():
            named |= {f"{module}.{layer}{i}": weight for i, weight in enumerate(weights)}
            named[f"{module}.{layer.partition('.')[0]}._extra_state"] = _extra_state(0)
    return named


def te_name(name: str, state: StateDict) -> str:
    """Norms are part of the linear layer behind them, if there is just one. What is inside a layer
    for multi-token prediction is called what megatron-core calls it since 0.17."""
    for norm, linear in (
        ("input_layernorm.", "self_attention.linear_qkv."),
        ("input_layernorm.", "self_attention.in_proj."),
        ("pre_mlp_layernorm.", "mlp.linear_fc1."),
        ("norm.", "mixer.in_proj."),
        ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj."),
        ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj."),
    ):
        layer, found, rest = name.rpartition(norm)
        if linear.endswith("_up_proj.") and f"{layer}{INDEXER}" in state:
            continue
        if found and f"{layer}{linear}weight" in state:
            name = f"{layer}{linear}layer_norm_{rest}"
    return _mtp_name(name)


def _mtp_name(name: str) -> str:
    return name.replace(".transformer_layer.", ".mtp_model_layer.")


def _extra_state(number: int) -> Any:
    """What TransformerEngine has put there over time: nothing, a stream, a tensor of bytes."""
    return [None, io.BytesIO(b"\x80\x02}."), torch.arange(9, dtype=torch.uint8)][number % 3]
