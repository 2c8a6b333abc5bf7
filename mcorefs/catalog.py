"""The dialect stage: whatever a format's keys look like -> canonical Megatron tensors.

Canonical: TransformerEngine-style names, one per layer and one per expert, gate above up:

    decoder.layers.{l}.self_attention.linear_qkv.weight
    decoder.layers.{l}.mlp.linear_fc1.weight                 [2F, H]: gate rows, then up rows
    decoder.layers.{l}.mlp.experts.{e}.linear_fc1.weight     [2F, H]

Knows no model family. Layout facts, all in Megatron-LM:megatron/core/:
transformer/transformer_block.py (layer axis), transformer/moe/experts.py (expert axis, the doubled
`experts.experts`), transformer/mlp.py apply_swiglu_sharded_factory (gate and up; `_w`/`_v` keys).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mcorefs.index import StoredTensor
from mcorefs.names import expert_of, unwrapped
from mcorefs.views import Cat, Flatten, Permute, Select, Stored, Unflatten, View

LAYER_STACKS = ("decoder.layers.",)
"""Prefixes under which a tensor has a leading layer axis when no layer number follows."""

NOT_WEIGHTS = re.compile(r"(^|\.)(local_tokens_per_expert|global_tokens_per_expert|ga_steps)$")
"""Router counters (megatron/core/transformer/moe/router.py): training state, never a weight."""

_ADAPTER = re.compile(
    r"\.(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|modules_to_save|adapter)\."
)
"""PEFT's names, as ms-swift saves them, and Megatron-Bridge's (peft/adapter_wrapper.py)."""

_EXPERTS = ".mlp.experts.experts."
_SPLIT = re.compile(r"(.*\.linear_fc1\.(?:weight|bias))_([wv])$")


@dataclass(frozen=True)
class Catalog:
    """Canonical tensors of one checkpoint, by name."""

    tensors: Mapping[str, View]
    problems: tuple[str, ...]


def build(
    stored: Mapping[str, StoredTensor], fc1_ranks: Mapping[str, int] | None = None
) -> Catalog:
    """The canonical tensors that `stored` (fqn -> tensor, in any dialect) amounts to.

    `fc1_ranks`: fqns whose rows are the gate, then the up rows of each of so many ranks in turn.
    """
    problems: list[str] = []
    tensors: dict[str, View] = {}
    named = _without_adapters(_unwrapped(stored), problems)
    layers = _by_layer(named, fc1_ranks or {})
    for name, view in _joined_halves(_by_expert(layers), problems):
        if name in tensors:
            problems.append(f"{name} is stored twice, in two dialects")
        tensors[name] = view
    return Catalog(tensors, tuple(problems))


def _unwrapped(stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor]]:
    """Names from the root of the model; without what is never a weight."""
    for fqn, tensor in stored.items():
        if not NOT_WEIGHTS.search(fqn):
            yield unwrapped(fqn), tensor


def _without_adapters(
    named: Iterator[tuple[str, StoredTensor]], problems: list[str]
) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of the base model; adapters, which change what it computes, are a problem."""
    adapters: list[str] = []
    for fqn, tensor in named:
        if _ADAPTER.search(fqn):
            adapters.append(fqn)
        else:
            yield fqn, tensor
    if adapters:
        problems.append(
            f"the checkpoint holds {len(adapters)} tensors of a LoRA adapter ({adapters[0]}, ...), "
            "which cannot be merged on read yet; merge it into its base model with the framework "
            "that trained it (ms-swift: --merge_lora true; Megatron-Bridge: "
            "examples/peft/merge_lora.py)"
        )


def _by_layer(
    named: Iterator[tuple[str, StoredTensor]], fc1_ranks: Mapping[str, int]
) -> Iterator[tuple[str, View]]:
    """Layer axis -> one tensor per layer."""
    for fqn, tensor in named:
        prefix = next((p for p in LAYER_STACKS if fqn.startswith(p)), None)
        view: View = Stored(tensor)
        if prefix is None or fqn[len(prefix) :][:1].isdigit() or not tensor.shape:
            ranks = fc1_ranks.get(tensor.fqn)
            yield fqn, view if ranks is None else _gate_above_up(view, ranks)
            continue
        rest = fqn[len(prefix) :]
        for layer in range(tensor.shape[0]):
            yield f"{prefix}{layer}.{rest}", Select(view, 0, layer)


def _gate_above_up(view: View, ranks: int) -> View:
    """All gate rows, then all up rows, of what holds both for one rank after the other."""
    parts = Unflatten(view, 0, (ranks, 2, view.shape[0] // (2 * ranks)))
    axes = (1, 0, *range(2, len(parts.shape)))
    return Flatten(Permute(parts, axes), 0, 3)


def _by_expert(tensors: Iterator[tuple[str, View]]) -> Iterator[tuple[str, View]]:
    """Expert axis -> one tensor per expert, and every way to name one -> `experts.{e}.`."""
    for name, view in tensors:
        before, experts, rest = name.partition(_EXPERTS)
        if not experts:
            named = expert_of(name)
            yield name if named is None else "{}.{}.{}".format(*named), view
        elif rest[:1].isdigit() or not view.shape:
            yield f"{before}.mlp.experts.{rest}", view
        else:
            for expert in range(view.shape[0]):
                yield f"{before}.mlp.experts.{expert}.{rest}", Select(view, 0, expert)


def _joined_halves(
    tensors: Iterator[tuple[str, View]], problems: list[str]
) -> Iterator[tuple[str, View]]:
    """`weight_w` (gate) and `weight_v` (up), as singleton_local_shards writes them -> `weight`."""
    halves: dict[str, dict[str, View]] = {}
    for name, view in tensors:
        if match := _SPLIT.match(name):
            halves.setdefault(match[1], {})[match[2]] = view
        else:
            yield name, view
    for name, pair in halves.items():
        if missing := {"w", "v"} - set(pair):
            problems.append(f"{name}_{missing.pop()} is missing beside its other half")
        elif pair["w"].shape != pair["v"].shape or pair["w"].dtype != pair["v"].dtype:
            problems.append(f"{name}_w and {name}_v differ in shape or dtype")
        else:
            yield name, Cat((pair["w"], pair["v"]), 0)
