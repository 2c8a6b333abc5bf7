"""Fill one rank's Megatron parameters from a Hugging Face save, by Megatron's own semantics.

This is written from how megatron-core *uses* its parameters, independently of mcorefs, so that the
two can be compared:

- column parallel: rank t of tp owns rows t*n/tp .. (t+1)*n/tp; row parallel: the same on columns;
- `linear_qkv` rows are query groups; a group is its query heads, then its key, then its value head;
- a gated `linear_fc1` is, on each rank, that rank's gate rows followed by its up rows;
- vocabulary rows are padded to a multiple of vocab_divisible_by * tp;
- expert e of a rank is global expert ep_rank * (experts / ep) + e, split over the etp ranks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from safetensors import safe_open
from torch import Tensor

from .spec import PADDING_VALUE, Spec


@dataclass(frozen=True)
class Rank:
    """This process's place in the run."""

    tp: int
    etp: int
    ep: int


def rank_of_this_process() -> Rank:
    return Rank(
        tp=parallel_state.get_tensor_model_parallel_rank(),
        etp=parallel_state.get_expert_tensor_parallel_rank(),
        ep=parallel_state.get_expert_model_parallel_rank(),
    )


def globally_named(model: GPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters with the layer's number in the whole model, not in this stage."""

    def global_number(match: re.Match[str]) -> str:
        return f"decoder.layers.{model.decoder.layers[int(match[1])].layer_number - 1}."

    for name, parameter in model.named_parameters():
        yield re.sub(r"^decoder\.layers\.(\d+)\.", global_number, name), parameter


class HFTensors:
    """The tensors of a `save_pretrained` directory, read by slices."""

    def __init__(self, directory: Path) -> None:
        self._stack = ExitStack()
        index = directory / "model.safetensors.index.json"
        names = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.exists()
            else ["model.safetensors"]
        )
        self._files: dict[str, Any] = {}
        for name in names:
            file = self._stack.enter_context(safe_open(directory / name, framework="pt"))
            self._files.update(dict.fromkeys(file.keys(), file))

    def __enter__(self) -> HFTensors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stack.close()

    def whole(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def part(self, name: str, axis: int, rank: int, size: int) -> Tensor:
        """Part number `rank` of `size` equal parts along `axis`."""
        view = self._files[name].get_slice(name)
        length, rest = divmod(view.get_shape()[axis], size)
        if rest:
            raise ValueError(f"{name}: axis {axis} does not split into {size}")
        part = slice(rank * length, (rank + 1) * length)
        tensor: Tensor = view[part] if axis == 0 else view[:, part]
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        view = self._files[name].get_slice(name)
        tensor: Tensor = view[min(start, view.get_shape()[0]) : min(stop, view.get_shape()[0])]
        return tensor


def local_tensor(spec: Spec, rank: Rank, hf: HFTensors, name: str) -> Tensor:
    """The value of Megatron parameter `name`, whose layer number is global, expert number local."""
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        head = name == "output_layer.weight" and not spec.tied
        return _vocabulary(
            spec, rank, hf, "lm_head.weight" if head else "model.embed_tokens.weight"
        )
    if name == "decoder.final_layernorm.weight":
        return hf.whole("model.norm.weight")
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        raise KeyError(name)
    return _layer(spec, rank, hf, f"model.layers.{match[1]}.", match[2])


def _layer(spec: Spec, rank: Rank, hf: HFTensors, layer: str, name: str) -> Tensor:
    whole = {
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        "mlp.router.weight": "mlp.gate.weight",
    }
    if name in whole:
        return hf.whole(layer + whole[name])
    if name.startswith("self_attention.linear_qkv."):
        return qkv(spec, rank, hf, f"{layer}self_attn.", name.rpartition(".")[2])
    if name == "self_attention.linear_proj.weight":
        return hf.part(f"{layer}self_attn.o_proj.weight", 1, rank.tp, spec.tp)
    if name.startswith("mlp.linear_"):
        return _mlp(hf, f"{layer}mlp.", name.removeprefix("mlp."), rank.tp, spec.tp)
    match = re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(.+)", name)
    if match is None:
        raise KeyError(name)
    expert = rank.ep * (spec.experts // spec.ep) + int(match[1])
    return _mlp(hf, f"{layer}mlp.experts.{expert}.", match[2], rank.etp, spec.expert_tp)


def _vocabulary(spec: Spec, rank: Rank, hf: HFTensors, name: str) -> Tensor:
    rows = spec.padded_vocab_size // spec.tp
    real = hf.rows(name, rank.tp * rows, (rank.tp + 1) * rows)
    padding = torch.full((rows - real.shape[0], spec.hidden), PADDING_VALUE, dtype=real.dtype)
    return torch.cat([real, padding])


def qkv(spec: Spec, rank: Rank, hf: HFTensors, prefix: str, parameter: str) -> Tensor:
    queries = spec.heads // spec.kv_heads * spec.head_dim
    q, k, v = (hf.whole(f"{prefix}{x}_proj.{parameter}") for x in "qkv")
    groups: list[Tensor] = []
    for group in range(spec.kv_heads):
        key = slice(group * spec.head_dim, (group + 1) * spec.head_dim)
        groups += [q[group * queries : (group + 1) * queries], k[key], v[key]]
    return torch.cat(groups).chunk(spec.tp)[rank.tp]


def _mlp(hf: HFTensors, prefix: str, name: str, rank: int, size: int) -> Tensor:
    if name == "linear_fc1.weight":
        gate = hf.part(f"{prefix}gate_proj.weight", 0, rank, size)
        return torch.cat([gate, hf.part(f"{prefix}up_proj.weight", 0, rank, size)])
    if name == "linear_fc2.weight":
        return hf.part(f"{prefix}down_proj.weight", 1, rank, size)
    raise KeyError(prefix + name)
