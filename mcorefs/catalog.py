"""The dialect stage: whatever a format's keys look like -> canonical Megatron tensors.

Canonical: TransformerEngine-style names, one per layer and one per expert, gate above up:

    decoder.layers.{l}.self_attention.linear_qkv.weight
    decoder.layers.{l}.mlp.linear_fc1.weight                 [2F, H]: gate rows, then up rows
    decoder.layers.{l}.mlp.experts.{e}.linear_fc1.weight     [2F, H]
    mtp.layers.{i}.transformer_layer.mlp.linear_fc1.weight   [2F, H]: no layer axis, ever
    decoder.layers.{l}.self_attention.linear_qkv.weight._gate  [heads, H]: where heads have gates
    decoder.layers.{l}.self_attention.in_proj.weight.joined  query, key, value, z, beta, alpha
    decoder.layers.{l}.self_attention.conv1d.weight.joined   query, key, value
    decoder.layers.{l}.mixer.in_proj.weight.joined           z, x, B, C, dt
    decoder.layers.{l}.mixer.conv1d.{weight,bias}.joined     x, B, C
    decoder.layers.{l}.mamba_mixer....                       likewise, beside attention
    vision_model.{name in transformers' module}              where that is what sees
    vision_model.decoder.layers.{l}....                      where Megatron's layers do

(megatron-core stores what is joined in sections; `in_proj.weight` itself has rows in another
order.)
Knows no model family. Layout facts, all in Megatron-LM:megatron/core/:
transformer/transformer_block.py (layer axis), transformer/moe/experts.py (expert axis, the doubled
`experts.experts`), ssm/gated_delta_net.py and ssm/mamba_mixer.py (sections), transformer/mlp.py
apply_swiglu_sharded_factory (gate and up; `_w`/`_v` keys), transformer/multi_token_prediction.py
(what is around the layer inside), on the branch dev transformer/attention.py
apply_head_wise_attn_gate_sharded_factory (`_qkv` and `_gate`); and in Megatron-Bridge:src/megatron/
bridge/models/qwen_vl/modelling_qwen3_vl/transformer_block.py (the axis of deepstack mergers).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from mcorefs.errors import CheckpointError
from mcorefs.index import StoredTensor
from mcorefs.names import expert_of, is_of_adapter, of_base, of_mtp, unwrapped
from mcorefs.views import Cat, Flatten, Permute, Select, Stored, Unflatten, View

LAYER_STACKS = (
    "decoder.layers.",
    "vision_model.decoder.layers.",
    "vision_model.decoder.deepstack_merger_list.",
)
"""Prefixes under which a tensor has a leading layer axis when no layer number follows."""

NOT_WEIGHTS = re.compile(r"(^|\.)(local_tokens_per_expert|global_tokens_per_expert|ga_steps)$")
"""Router counters (megatron/core/transformer/moe/router.py): training state, never a weight."""

MAX_TENSORS = 1 << 19
"""Of one model: the largest have a hundred thousand."""
_EXPERTS = ".mlp.experts.experts."
_SECTIONS = {
    "self_attention.in_proj": ("query", "key", "value", "z", "beta", "alpha"),
    "self_attention.conv1d": ("query", "key", "value"),
    **dict.fromkeys(("mixer.in_proj", "mamba_mixer.in_proj"), ("z", "x", "B", "C", "dt")),
    **dict.fromkeys(("mixer.conv1d", "mamba_mixer.conv1d"), ("x", "B", "C")),
}
_SECTION = re.compile(
    rf"(.*\.({'|'.join(map(re.escape, _SECTIONS))})\.(?:weight|bias))"
    rf"\.({'|'.join(sorted({part for parts in _SECTIONS.values() for part in parts}))})$"
)
_SPLIT = re.compile(r"(.*\.linear_fc1\.(?:weight|bias))_([wv])$")
_GATED = re.compile(r"(.*\.linear_qkv\.(?:weight|bias))\._(qkv|gate)$")


Named = list[tuple[str, StoredTensor]]


@dataclass(frozen=True)
class Catalog:
    """Canonical tensors of one checkpoint, by name."""

    tensors: Mapping[str, View]
    problems: tuple[str, ...]
    adapter: Mapping[str, View] = field(default_factory=dict)
    """What a LoRA adapter adds, named alike: ...linear_qkv.lora_A.default.weight. What all experts
    of a layer share goes by ...experts.*.linear_fc1....; the rows of linear_fc1 are as stored."""

    def without(self, is_left_out: Callable[[str], bool]) -> Catalog:
        """Of what is not left out by its canonical name."""
        tensors, adapter = (
            {name: view for name, view in named.items() if not is_left_out(name)}
            for named in (self.tensors, self.adapter)
        )
        return replace(self, tensors=tensors, adapter=adapter)


def build(
    stored: Mapping[str, StoredTensor], fc1_ranks: Mapping[str, int] | None = None
) -> Catalog:
    """The canonical tensors that `stored` (fqn -> tensor, in any dialect) amounts to.

    `fc1_ranks`: fqns whose rows are the gate, then the up rows of each of so many ranks in turn.
    """
    problems: list[str] = []
    base, adapter = _split(stored)
    layers = _by_layer(base, fc1_ranks or {})
    experts = _joined_halves(_counted(_by_expert(layers)), problems)
    named = _without_gates(_joined_sections(experts, problems), problems)
    tensors = _unique(named, problems)
    added = _unique(_counted(_by_expert(_by_layer(adapter, {}))), problems)
    return Catalog(tensors, tuple(problems), added)


def _split(stored: Mapping[str, StoredTensor]) -> tuple[Named, Named]:
    """(tensors of the model, those of an adapter) by their names from the root of the model;
    without what is never a weight."""
    base: Named = []
    adapter: Named = []
    for fqn, tensor in stored.items():
        name = of_mtp(unwrapped(fqn))
        if is_of_adapter(name):
            adapter.append((name, tensor))
        elif not NOT_WEIGHTS.search(name):
            base.append((of_base(name), tensor))
    return base, adapter


def _counted(tensors: Iterator[tuple[str, View]]) -> Iterator[tuple[str, View]]:
    """All of them, if they are as many as a model can have: an axis of layers or experts may be of
    any length where there are no elements. Raises CheckpointError."""
    for count, item in enumerate(tensors):
        if count == MAX_TENSORS:
            raise CheckpointError(
                f"its layers and experts make more than {MAX_TENSORS} tensors, which no model has "
                f"({item[0]:.200} is one): it is damaged"
            )
        yield item


def _unique(named: Iterator[tuple[str, View]], problems: list[str]) -> dict[str, View]:
    tensors: dict[str, View] = {}
    for name, view in named:
        if name in tensors:
            problems.append(f"{name} is stored twice, in two dialects")
        tensors[name] = view
    return tensors


def _by_layer(named: Named, fc1_ranks: Mapping[str, int]) -> Iterator[tuple[str, View]]:
    """Layer axis -> one tensor per layer."""
    for fqn, tensor in named:
        prefix = next((p for p in LAYER_STACKS if fqn.startswith(p)), None)
        view: View = Stored(tensor)
        if prefix is None or fqn[len(prefix) :][:1].isdigit() or not tensor.shape:
            ranks = fc1_ranks.get(tensor.fqn)
            yield fqn, view if ranks is None else gate_above_up(view, ranks)
            continue
        rest = fqn[len(prefix) :]
        for layer in range(tensor.shape[0]):
            yield f"{prefix}{layer}.{rest}", Select(view, 0, layer)


def gate_above_up(view: View, ranks: int) -> View:
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
        elif is_of_adapter(name) and len(view.shape) == 2:
            yield f"{before}.mlp.experts.*.{rest}", view
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


def _joined_sections(
    tensors: Iterator[tuple[str, View]], problems: list[str]
) -> Iterator[tuple[str, View]]:
    """The sections of the layers of gated delta nets and of Mamba, one above the other."""
    found: dict[tuple[str, str], dict[str, View]] = {}
    for name, view in tensors:
        if match := _SECTION.match(name):
            found.setdefault((match[1], match[2]), {})[match[3]] = view
        else:
            yield name, view
    for (name, layer), sections in found.items():
        expected = _SECTIONS[layer]
        if missing := [section for section in expected if section not in sections]:
            problems.append(f"{name}.{missing[0]} is missing beside {name}.{min(sections)}")
            continue
        try:
            joined = Cat(tuple(sections[section] for section in expected), 0)
        except ValueError as problem:
            problems.append(f"{name}.{{{','.join(expected)}}} do not fit together: {problem}")
            continue
        yield f"{name}.joined", joined


def _without_gates(
    tensors: Iterator[tuple[str, View]], problems: list[str]
) -> Iterator[tuple[str, View]]:
    """`linear_qkv.weight._qkv`, which gates of heads lie beside -> `linear_qkv.weight`."""
    found: dict[str, set[str]] = {}
    for name, view in tensors:
        match = _GATED.match(name)
        if match:
            found.setdefault(match[1], set()).add(match[2])
        yield match[1] if match and match[2] == "qkv" else name, view
    for name, parts in found.items():
        if missing := {"qkv", "gate"} - parts:
            problems.append(f"{name}._{missing.pop()} is missing beside its other part")
