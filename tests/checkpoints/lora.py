"""The oracle of an adapter: LoRA matrices for a Hugging Face model, and what the model becomes.

An adapter is kept as one tensor for each matrix of each Hugging Face layer:
`model.layers.0.self_attn.q_proj.lora_A.weight`. Where Megatron has one weight for several of them
(q, k and v; gate and up) they have A in common, unless CanonicalLoRA adapts each by itself.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Container, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .spec import Spec

HF_NAMES = {
    "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_proj": ("self_attn.o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
    "router": ("mlp.gate",),
    "linear_q_proj": ("self_attn.q_proj",),
    "linear_q_down_proj": ("self_attn.q_a_proj",),
    "linear_q_up_proj": ("self_attn.q_b_proj",),
    "linear_kv_down_proj": ("self_attn.kv_a_proj_with_mqa",),
    "linear_kv_up_proj": ("self_attn.kv_b_proj",),
    "in_proj": tuple(f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a")),
    "out_proj": ("linear_attn.out_proj",),
}
"""Layers in the terms of Hugging Face, by Megatron's."""


def shared_experts(spec: Spec) -> str:
    """Where a layer has them."""
    return "mlp.shared_expert." if spec.family.startswith("qwen") else "mlp.shared_experts."


def save_adapter(spec: Spec, base: Path, adapter: Path, merged: Path) -> None:
    """Write an adapter of the model in `base`, and the model with it to `merged`."""
    generator = torch.Generator().manual_seed(spec.seed + 1000)
    shutil.copytree(base, merged)
    files = {path: load_file(path) for path in sorted(merged.glob("*.safetensors"))}
    weights = {name: tensor for file in files.values() for name, tensor in file.items()}
    tensors: dict[str, Tensor] = {}
    for group in _groups(spec, weights):
        a = None
        for module in group:
            weight = weights[f"{module}.weight"]
            if a is None or spec.adapter == "canonical":
                a = _matrix(spec, generator, spec.lora_rank, weight.shape[1])
            b = _matrix(spec, generator, weight.shape[0], spec.lora_rank)
            tensors |= {f"{module}.lora_A.weight": a.clone(), f"{module}.lora_B.weight": b}
            weights[f"{module}.weight"] = merge(spec, weight, b, a)
    if spec.trains_head:
        weights["lm_head.weight"] = tensors["lm_head.weight"] = torch.randn(
            weights["lm_head.weight"].shape, generator=generator
        ).to(weights["lm_head.weight"].dtype)
    adapter.mkdir()
    save_file(tensors, adapter / "model.safetensors")
    for path, file in files.items():
        save_file({name: weights[name] for name in file}, path, {"format": "pt"})


def merge(spec: Spec, weight: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """As the framework does: mcore_bridge/tuners/lora.py get_delta_weights and merge,
    megatron/bridge/models/conversion/peft_bridge.py _merge_single_adapter_weight."""
    scale = scale_of(spec)
    if spec.adapter == "ms-swift":
        merged = weight.clone()
        merged += (b @ a) * scale
        return merged
    return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)


def scale_of(spec: Spec) -> float:
    rank = spec.lora_rank
    return spec.lora_alpha / (math.sqrt(rank) if spec.rank_stabilised else rank)


_OF_SOME_LAYERS = ("linear_qkv", "linear_proj", "in_proj", "out_proj")


def _groups(spec: Spec, weights: Container[str]) -> Iterator[tuple[str, ...]]:
    """Modules of the Hugging Face model that are one in Megatron."""
    for layer in range(spec.layers):
        at = f"model.layers.{layer}."
        for target in spec.lora_targets:
            names = HF_NAMES[target]
            if target == "router" and not spec.has_experts(layer):
                continue
            if f"{at}{names[0]}.weight" not in weights and target in _OF_SOME_LAYERS:
                continue
            if not target.startswith("linear_fc"):
                yield tuple(at + name for name in names)
            elif spec.has_experts(layer):
                for expert in range(spec.experts):
                    yield tuple(f"{at}mlp.experts.{expert}.{name}" for name in names)
                if spec.shared_ffn:
                    yield tuple(f"{at}{shared_experts(spec)}{name}" for name in names)
            else:
                yield tuple(f"{at}mlp.{name}" for name in names)


def _matrix(spec: Spec, generator: torch.Generator, rows: int, columns: int) -> Tensor:
    """Random values of few bits: float32 sums their products exactly, in whatever order."""
    from .hf import TORCH_DTYPES

    values = torch.randint(-15, 16, (rows, columns), generator=generator) / 64.0
    return values.to(TORCH_DTYPES[spec.dtype])
