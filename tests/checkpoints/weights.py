"""Fill one rank's Megatron parameters from a Hugging Face save, by Megatron's own semantics.

Which tensor a parameter comes from says its family (`families`). How a rank has it is written from
how megatron-core *uses* its parameters, independently of mcorefs, so that the two can be compared:

- column parallel: rank t of tp owns rows t*n/tp .. (t+1)*n/tp; row parallel: the same on columns;
- `linear_qkv` rows are query groups; a group is its query heads, then its key, then its value head;
- a gated `linear_fc1` is, on each rank, that rank's gate rows followed by its up rows;
- vocabulary rows are padded to a multiple of vocab_divisible_by * tp;
- expert e of a rank is global expert ep_rank * (experts / ep) + e, split over the etp ranks.
"""

from __future__ import annotations

import itertools
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

from .families import FAMILIES
from .families.base import (
    HF_LAYER,
    INDEX_DIM,
    Columns,
    FusedGated,
    Gated,
    HeadNorm,
    IndexHeads,
    Made,
    Norm,
    Place,
    Qkv,
    Rows,
    Value,
    Vocabulary,
    Whole,
)
from .spec import PADDING_VALUE, Spec
from .vision import HF_VISION, language_model, vision_value


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


def globally_named(model: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that are saved too (expert biases), with the layer's number in
    the whole model, not in this stage."""

    layers = language_model(model).decoder.layers

    def global_number(match: re.Match[str]) -> str:
        return f"{match[1]}decoder.layers.{layers[int(match[2])].layer_number - 1}."

    saved = model.state_dict()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    for name, tensor in itertools.chain(model.named_parameters(), buffers):
        yield re.sub(r"^(language_model\.|)decoder\.layers\.(\d+)\.", global_number, name), tensor


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
    name = name.removeprefix("language_model.")
    if name == "output_layer.weight" and spec.labels:
        return hf.whole("score.weight")
    if name == "output_layer.weight" and spec.tied:
        name = "embedding.word_embeddings.weight"
    layer, expert, size = "", "", (rank.tp, spec.tp)
    if spec.vision and (value := vision_value(spec, name)) is not None:
        return _Reader(spec, hf, "", "", *size).read(value)
    if match := re.match(r"decoder\.layers\.(\d+)\.", name):
        layer = match[1]
        name = "decoder.layers.{layer}." + name[match.end() :]
    elif match := re.match(r"mtp\.layers\.(\d+)\.(transformer_layer\.)?", name):
        layer = str(spec.layers + int(match[1]))
        name = ("decoder" if match[2] else "mtp") + ".layers.{layer}." + name[match.end() :]
    if match := re.search(r"\.local_experts\.(\d+)\.", name):
        expert = str(rank.ep * (spec.experts // spec.ep) + int(match[1]))
        name = f"{name[: match.start()]}.local_experts.{{expert}}.{name[match.end() :]}"
        size = (rank.etp, spec.expert_tp)
    reader = _Reader(spec, hf, layer, expert, *size)
    return reader.read(FAMILIES[spec.family].parameters[name])


def rank_value(spec: Spec, rank: Rank, hf: HFTensors, value: Value) -> Tensor:
    """What this rank has of `value`, whose names hold no {layer} or {expert}."""
    return _Reader(spec, hf, "", "", rank.tp, spec.tp).read(value)


@dataclass(frozen=True)
class _Reader:
    """Values as one rank has them, of one layer and expert."""

    spec: Spec
    hf: HFTensors
    layer: str
    expert: str
    rank: int
    size: int

    def read(self, value: Value) -> Tensor:
        match value:
            case Whole(hf):
                return self._whole(hf)
            case Norm(hf):
                return self._norm(hf)
            case HeadNorm(hf, cut):
                heads = self._heads(self._norm(hf))
                return heads.chunk(self.size)[self.rank] if cut else heads
            case IndexHeads(whole):
                return self._index_heads(self.read(whole))
            case Rows(hf, transposed) | Columns(hf, transposed):
                return self._part(hf, int(isinstance(value, Columns)), transposed)
            case Gated() | FusedGated():
                return self._gated(value)
            case Qkv(hf, transposed):
                return self._groups(hf, transposed).chunk(self.size)[self.rank]
            case Made(names, make):
                expert = int(self.expert) if self.expert else None
                return make([self._whole(n) for n in names], Place(self.rank, self.size, expert))
            case Vocabulary(hf):
                return self._padded(hf)

    def _name(self, hf: str) -> str:
        hf = hf.removeprefix("model.") if self.spec.bare else hf
        family = FAMILIES[self.spec.family]
        at = family.mtp_at
        if at and self.layer and (number := int(self.layer) - self.spec.layers) >= 0:
            hf = hf.replace(HF_LAYER, at.replace("{mtp}", str(number)))
            if family.mtp_moved:
                hf = hf.replace("post_attention_layernorm", "pre_mlp_layernorm")
        if self.spec.vision and FAMILIES[self.spec.family].hub_names:
            hf = hf.replace(HF_VISION, "visual.", 1)
        elif self.spec.vision and hf.startswith("model.") and not hf.startswith(HF_VISION):
            hf = hf.replace("model.", "model.language_model.", 1)
        return hf.replace("{layer}", self.layer).replace("{expert}", self.expert)

    def _whole(self, hf: str) -> Tensor:
        return self.hf.whole(self._name(hf))

    def _part(self, hf: str, axis: int, transposed: bool = False) -> Tensor:
        if not transposed:
            return self.hf.part(self._name(hf), axis, self.rank, self.size)
        return self.hf.part(self._name(hf), 1 - axis, self.rank, self.size).T.contiguous()

    def _gated(self, value: Gated | FusedGated) -> Tensor:
        if isinstance(value, Gated):
            return self._in_turns([self._part(value.gate, 0), self._part(value.up, 0)])
        halves = self._whole(value.hf).chunk(2)
        return torch.cat([half.chunk(self.size)[self.rank] for half in halves])

    def _in_turns(self, halves: list[Tensor]) -> Tensor:
        """Gate above up, but of an expert in a run that has blocks of them by turns."""
        if self.spec.glu_block is None or not self.expert:
            return torch.cat(halves)
        blocks = (torch.split(half, self.spec.glu_block) for half in halves)
        return torch.cat([block for pair in zip(*blocks, strict=True) for block in pair])

    def _norm(self, hf: str) -> Tensor:
        weight = self._whole(hf)  # between 0.5 and 1.5, where this loses no bit
        return (weight.float() - 1).to(weight.dtype) if self.spec.zero_centred else weight

    def _heads(self, rows: Tensor) -> Tensor:
        """Query or key heads, with what is rotated together side by side if Megatron's are so."""
        if not self.spec.rotary_interleaved:
            return rows
        share = FAMILIES[self.spec.family].arguments(self.spec).get("rotary_percent", 1.0)
        rotated = int(self.spec.head_dim * float(str(share)))
        heads = rows.view(-1, self.spec.head_dim, *rows.shape[1:])
        halves = heads[:, :rotated].chunk(2, dim=1)
        pairs = torch.stack(halves, dim=2).flatten(1, 2)
        return torch.cat([pairs, heads[:, rotated:]], dim=1).flatten(0, 1)

    def _index_heads(self, rows: Tensor) -> Tensor:
        if not self.spec.slime_indexers:
            return rows
        heads = rows.view(-1, INDEX_DIM, *rows.shape[1:])
        rotated, rest = heads[:, : self.spec.qk_rope], heads[:, self.spec.qk_rope :]
        return torch.cat([rest, rotated], dim=1).flatten(0, 1)

    def _groups(self, hf: str, transposed: bool) -> Tensor:
        """All query groups."""
        spec = self.spec
        if "{}" in hf:
            q, k, v = (self._whole(hf.replace("{}", x)) for x in "qkv")
        else:
            rows = [heads * spec.head_dim for heads in (spec.heads, spec.kv_heads, spec.kv_heads)]
            fused = self._whole(hf)
            q, k, v = torch.split(fused.T if transposed else fused, rows)
        q, k = self._heads(q), self._heads(k)
        queries = spec.heads // spec.kv_heads * spec.head_dim
        groups: list[Tensor] = []
        for group in range(spec.kv_heads):
            key = slice(group * spec.head_dim, (group + 1) * spec.head_dim)
            groups += [q[group * queries : (group + 1) * queries], k[key], v[key]]
        return torch.cat(groups)

    def _padded(self, hf: str) -> Tensor:
        rows = self.spec.padded_vocab_size // self.size
        real = self.hf.rows(self._name(hf), self.rank * rows, (self.rank + 1) * rows)
        padding = torch.full(
            (rows - real.shape[0], self.spec.hidden), PADDING_VALUE, dtype=real.dtype
        )
        return torch.cat([real, padding])
