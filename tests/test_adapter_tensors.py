"""Adapters sorted out and merged by the names and shapes of their tensors, against torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from mcorefs.adapters import Saved, Terms, merge, sort_out
from mcorefs.boxes import Box
from mcorefs.dtypes import BY_TORCH
from mcorefs.trainers import LoraTraining
from mcorefs.views import Stored, View
from tests.graphs import Memory

L = "decoder.layers.0."
FC1, FC2, QKV = f"{L}mlp.linear_fc1", f"{L}mlp.linear_fc2", f"{L}self_attention.linear_qkv"
FFN, HIDDEN, RANK = 6, 8, 2
TRAINED = LoraTraining(rank=RANK, alpha=8)
MEMORY = Memory()


def matrix(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values whose products are summed exactly."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-15, 16, shape, generator=generator) / 32.0).to(dtype)


def view(values: Tensor) -> View:
    dtype = BY_TORCH[str(values.dtype).removeprefix("torch.")]
    tensor = MEMORY.add(dtype, tuple(values.shape), [Box.whole(tuple(values.shape))])
    raw = values.contiguous().reshape(-1).view(torch.uint8).numpy()
    MEMORY.arrays[tensor] = raw.view(dtype.carrier).reshape(tuple(values.shape))
    return Stored(tensor)


def views(tensors: Mapping[str, Tensor]) -> dict[str, View]:
    return {name: view(values) for name, values in tensors.items()}


def value(found: View) -> Tensor:
    out = np.empty(found.shape, found.dtype.carrier)
    found.read_into(Box.whole(found.shape), out, MEMORY.leaf)
    kind: torch.dtype = getattr(torch, found.dtype.torch)
    return torch.from_numpy(out.reshape(-1).view(np.uint8)).view(kind).reshape(found.shape)


def base(*names: str, rows: int = 2 * FFN) -> dict[str, Tensor]:
    return {f"{name}.weight": matrix(i, rows, HIDDEN) for i, name in enumerate(names)} | {
        f"{name.removesuffix('1')}2.weight": matrix(50 + i, HIDDEN, FFN)
        for i, name in enumerate(names)
        if name.endswith("linear_fc1")
    }


def peft(module: str, rows: int = 2 * FFN, name: str = "default") -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.{name}.weight": matrix(100, RANK, HIDDEN),
        f"{module}.lora_B.{name}.weight": matrix(101, rows, RANK),
    }


def bridge(module: str, rows: int = 2 * FFN) -> dict[str, Tensor]:
    return {
        f"{module}.adapter.linear_in.weight": matrix(100, RANK, HIDDEN),
        f"{module}.adapter.linear_out.weight": matrix(101, rows, RANK),
    }


def merged(
    adapter: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    saved: Saved | None = None,
    training: LoraTraining = TRAINED,
    dims: Mapping[str, int] | None = None,
) -> tuple[dict[str, View], list[str]]:
    tensors = views(model)
    found = sort_out(views(adapter), tensors)
    terms = Terms(training, None, dims or {}, saved or Saved(1, 1))
    result, problems = merge(found, {**tensors, **found.whole}, terms)
    return result, [*found.problems, *problems]


def product(adapter: Mapping[str, Tensor]) -> Tensor:
    a, b = adapter.values()
    return 4.0 * (b @ a)


@pytest.mark.parametrize("make", [peft, bridge])
def test_one_matrix_of_each(make: Callable[[str], dict[str, Tensor]]) -> None:
    model, adapter = base(QKV), make(QKV)
    tensors, problems = merged(adapter, model)
    assert problems == []
    assert torch.equal(value(tensors[f"{QKV}.weight"]), model[f"{QKV}.weight"] + product(adapter))


def test_rank_stabilised_scale() -> None:
    model, adapter = base(QKV), peft(QKV)
    training = LoraTraining(rank=RANK, alpha=8, is_rank_stabilised=True)
    tensors, _ = merged(adapter, model, training=training)
    a, b = adapter.values()
    assert torch.equal(
        value(tensors[f"{QKV}.weight"]), model[f"{QKV}.weight"] + (b @ a) * (8 / 2**0.5)
    )


def by_rank(plain: Tensor, ranks: int) -> Tensor:
    """[gate; up] as the gate, then the up rows of each rank in turn."""
    gate, up = plain.chunk(2)
    pairs = zip(gate.chunk(ranks), up.chunk(ranks), strict=True)
    return torch.cat([torch.cat(pair) for pair in pairs])


@pytest.mark.parametrize("module", [FC1, f"{L}mlp.shared_experts.linear_fc1"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_rows_of_ms_swift_lie_rank_by_rank(module: str, ranks: int) -> None:
    model, plain = base(module), peft(module)
    stored = dict(plain)
    stored[f"{module}.lora_B.default.weight"] = by_rank(
        plain[f"{module}.lora_B.default.weight"], ranks
    )
    tensors, problems = merged(stored, model, Saved(ranks, 1))
    assert problems == []
    assert torch.equal(
        value(tensors[f"{module}.weight"]), model[f"{module}.weight"] + product(plain)
    )


def test_rows_of_experts_lie_as_their_own_ranks_cut_them() -> None:
    module = f"{L}mlp.experts.3.linear_fc1"
    model, adapter = base(module), peft(module)
    tensors, _ = merged(adapter, model, Saved(2, 1))
    assert torch.equal(
        value(tensors[f"{module}.weight"]), model[f"{module}.weight"] + product(adapter)
    )


def test_rows_of_what_is_not_gated_lie_in_order() -> None:
    model, adapter = base(FC1, rows=FFN), peft(FC1, rows=FFN)
    tensors, problems = merged(adapter, model, Saved(2, 2))
    assert problems == []
    assert torch.equal(value(tensors[f"{FC1}.weight"]), model[f"{FC1}.weight"] + product(adapter))


def test_rows_of_megatron_bridge_that_cannot_be_told() -> None:
    _, problems = merged(bridge(FC1, rows=FFN), base(FC1, rows=FFN), Saved(2, 2))
    assert problems == [
        f"the adapter of {FC1}.weight does not fit: how 2 ranks cut a linear_fc1 that is not gated "
        "cannot be told"
    ]


@pytest.mark.parametrize(("tp", "fits"), [(1, True), (2, False), (None, False)])
def test_formats_in_which_ranks_cut_otherwise(tp: int | None, fits: bool) -> None:
    for make in (peft, bridge):
        _, problems = merged(make(FC1) | make(QKV), base(FC1, QKV), Saved(tp, tp, "fsdp_dtensor"))
        said = "how ranks cut linear_fc1 in format fsdp_dtensor is not known"
        assert problems == ([] if fits else [f"the adapter of {FC1}.weight does not fit: {said}"])


@pytest.mark.parametrize("shared", ["linear_in", "linear_out", "both"])
def test_what_experts_share(shared: str) -> None:
    """All of an adapter, or one of its matrices (experts_shared_outer_loras)."""
    modules = [f"{L}mlp.experts.{expert}.linear_fc1" for expert in (0, 1, 12)]
    model = base(*modules)
    adapter: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for seed, module in enumerate(modules):
        sides = {"linear_in": (RANK, HIDDEN), "linear_out": (2 * FFN, RANK)}
        used = []
        for side, shape in sides.items():
            is_shared = shared in (side, "both")
            at = f"{L}mlp.experts.*.linear_fc1" if is_shared else module
            tensor = matrix(200 if is_shared else 201 + seed, *shape)
            adapter[f"{at}.adapter.{side}.weight"] = tensor
            used.append(tensor)
        expected[module] = model[f"{module}.weight"] + 4.0 * (used[1] @ used[0])
    tensors, problems = merged(adapter, model)
    assert problems == []
    for module in modules:
        assert torch.equal(value(tensors[f"{module}.weight"]), expected[module])


def test_experts_may_have_a_smaller_rank() -> None:
    """Megatron-Bridge's normalize_moe_lora: the same alpha over fewer."""
    expert = f"{L}mlp.experts.0.linear_fc1"
    model, adapter = base(expert), bridge(expert)
    tensors, problems = merged(adapter, model, training=LoraTraining(rank=8, alpha=8))
    assert problems == []
    assert torch.equal(
        value(tensors[f"{expert}.weight"]), model[f"{expert}.weight"] + product(adapter)
    )


def test_an_embedding() -> None:
    """peft/tuners/lora/layer.py Embedding.get_delta_weight: the product is turned over."""
    name = "embedding.word_embeddings"
    model = {f"{name}.weight": matrix(1, 5, HIDDEN)}
    a, b = matrix(2, RANK, 5), matrix(3, HIDDEN, RANK)
    adapter = {f"{name}.lora_embedding_A.default": a, f"{name}.lora_embedding_B.default": b}
    tensors, problems = merged(adapter, model)
    assert problems == []
    assert torch.equal(value(tensors[f"{name}.weight"]), model[f"{name}.weight"] + 4.0 * (b @ a).T)


def test_modules_trained_whole() -> None:
    model = {"output_layer.weight": matrix(1, 5, HIDDEN), "x.weight": matrix(2, 3)}
    trained = matrix(3, 5, HIDDEN)
    tensors, problems = merged({"output_layer.modules_to_save.default.weight": trained}, model)
    assert problems == []
    assert torch.equal(value(tensors["output_layer.weight"]), trained)
    assert torch.equal(value(tensors["x.weight"]), model["x.weight"])


@pytest.mark.parametrize(
    ("kind", "adapter_dtype"),
    [("peft", torch.bfloat16), ("peft", torch.float32), ("bridge", torch.bfloat16)],
)
def test_rounding_is_that_of_the_framework(kind: str, adapter_dtype: torch.dtype) -> None:
    make = peft if kind == "peft" else bridge
    weight = torch.randn(2 * FFN, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    adapter = {name: tensor.to(adapter_dtype) for name, tensor in make(QKV).items()}
    tensors, _ = merged(adapter, {f"{QKV}.weight": weight}, training=LoraTraining(alpha=1.4))
    a, b = adapter.values()
    if kind == "peft":
        expected = weight.clone()
        expected += (b @ a) * (1.4 / RANK)
    else:
        expected = (weight.float() + 1.4 / RANK * (b.float() @ a.float())).bfloat16()
    assert torch.equal(value(tensors[f"{QKV}.weight"]), expected)


def test_a_second_adapter_is_left_aside() -> None:
    model, adapter = base(QKV), peft(QKV)
    other = {name: tensor + 1 for name, tensor in peft(QKV, name="ref_adapter").items()}
    tensors, problems = merged(adapter | other, model)
    assert problems == []
    assert torch.equal(value(tensors[f"{QKV}.weight"]), model[f"{QKV}.weight"] + product(adapter))
    found = sort_out(views(adapter | other), views(model))
    assert found.remarks == ("of the adapters that it holds, ref_adapter is left aside",)


def test_the_only_adapter_may_have_any_name() -> None:
    model, adapter = base(QKV), peft(QKV, name="style")
    tensors, problems = merged(adapter, model)
    assert problems == []
    assert torch.equal(value(tensors[f"{QKV}.weight"]), model[f"{QKV}.weight"] + product(adapter))


def test_two_adapters_without_a_default() -> None:
    adapter = peft(QKV, name="one") | peft(QKV, name="two")
    assert sort_out(views(adapter), {}).problems == ("it holds several adapters: one, two",)


CANONICAL = {"groups": 2, "q_rows": 8, "kv_rows": 4}


@pytest.mark.parametrize(
    ("adapter", "model", "dims", "said"),
    [
        (
            {f"{QKV}.lora_magnitude_vector.default.weight": matrix(1, 4)},
            base(QKV),
            {},
            f"the adapter is a DoRA ({QKV}.lora_magnitude_vector.default.weight)",
        ),
        (
            {f"{QKV}.adapter.weight_magnitude": matrix(1, 4)},
            base(QKV),
            {},
            f"the adapter is a DoRA ({QKV}.adapter.weight_magnitude)",
        ),
        (
            {f"{QKV}.lora_B.default.bias": matrix(1, 4)},
            base(QKV),
            {},
            f"the adapter holds {QKV}.lora_B.default.bias, which is not known",
        ),
        (
            {f"{L}mixer.in_proj.adapter.linear_out.weight.z": matrix(1, 4)},
            {},
            {},
            "the adapter holds decoder.layers.0.mixer.in_proj.adapter.linear_out.weight.z",
        ),
        (
            dict(list(peft(QKV).items())[:1]),
            base(QKV),
            {},
            f"the adapter of {QKV} has only its A matrix",
        ),
        (
            peft(QKV),
            {},
            {},
            f"the adapter changes {QKV}.weight, which the base model does not hold",
        ),
        (
            peft(QKV) | bridge(FC1),
            base(QKV, FC1),
            {},
            "it holds adapters of two frameworks, which round differently",
        ),
        (
            {name: tensor[0] for name, tensor in peft(FC1).items()},
            base(FC1),
            {},
            f"the adapter of {FC1}.weight does not fit: not all are matrices: [[12, 8], [8], [2]]",
        ),
        (
            peft(FC1),
            base(FC1) | {f"{FC1}.weight": torch.zeros(())},
            {},
            f"the adapter of {FC1}.weight does not fit: not all are matrices",
        ),
        (peft(QKV, rows=5), base(QKV), {}, f"the adapter of {QKV}.weight does not fit: addmm of"),
        (
            {name: t.bfloat16() if "_A" in name else t for name, t in peft(QKV).items()},
            base(QKV),
            {},
            f"the adapter of {QKV}.weight does not fit: A is bfloat16 but B is float32",
        ),
        (
            peft(QKV),
            {f"{QKV}.weight": torch.zeros(2 * FFN, HIDDEN).to(torch.float8_e4m3fn)},
            {},
            f"the adapter of {QKV}.weight does not fit: addmm of ['F8_E4M3'",
        ),
        (
            bridge(f"{QKV}", rows=8),
            base(QKV, rows=16),
            CANONICAL,
            f"the adapter of {QKV}.weight does not fit",
        ),
        (
            {n.replace("adapter.", "adapter.adapter_q."): t for n, t in bridge(QKV, 8).items()},
            base(QKV, rows=16),
            {},
            f"the adapter of {QKV}.weight does not fit: the number of heads is not known",
        ),
        (
            {n.replace("adapter.", "adapter.adapter_q."): t for n, t in bridge(QKV, 8).items()},
            base(QKV, rows=18),
            CANONICAL,
            f"the adapter of {QKV}.weight does not fit: unflatten",
        ),
        (
            {n.replace("adapter.", "adapter.adapter_up."): t for n, t in bridge(FC1, 4).items()},
            base(FC1),
            {},
            f"the adapter of {FC1}.weight does not fit: addmm of",
        ),
    ],
)
def test_what_cannot_be_merged(
    adapter: dict[str, Tensor], model: dict[str, Tensor], dims: dict[str, int], said: str
) -> None:
    tensors, problems = merged(adapter, model, dims=dims)
    (problem,) = problems
    assert problem.startswith(said)
    assert {name: found.shape for name, found in tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in model.items()
    }


def test_problems_of_one_kind_are_one_line() -> None:
    adapter: dict[str, Tensor] = {}
    for layer in range(20):
        adapter |= peft(f"decoder.layers.{layer}.mlp.linear_fc2")
    _, problems = merged(adapter, {})
    assert len(problems) == 1
    assert problems[0].endswith("does not hold (and 19 more like it)")


# -- gated delta nets -----------------------------------------------------------------------------

IN_PROJ = f"{L}self_attention.in_proj"
SECTIONS = (8, 8, 12, 12, 4, 4)
"""Rows of query, key, value, z, beta and alpha."""
DELTA = {"linear_mixed": 28, "linear_values": 12, "linear_value_heads": 4}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_sections_of_megatron_cores_gated_delta_nets_lie_rank_by_rank(ranks: int) -> None:
    rows = sum(SECTIONS)
    model = {f"{IN_PROJ}.weight.joined": matrix(1, rows, HIDDEN)}
    plain = bridge(IN_PROJ, rows)
    a, b = plain.values()
    shares = [section.chunk(ranks) for section in b.split(SECTIONS)]  # type: ignore[no-untyped-call]
    by_rank = torch.cat([share[rank] for rank in range(ranks) for share in shares])
    adapter = dict(zip(plain, (a, by_rank), strict=True))
    tensors, problems = merged(adapter, model, Saved(ranks, ranks), dims=DELTA)
    assert problems == []
    (weight,) = model.values()
    assert torch.equal(value(tensors[f"{IN_PROJ}.weight.joined"]), weight + product(plain))


def test_rows_of_ms_swifts_gated_delta_nets_lie_as_the_weights() -> None:
    model, adapter = base(IN_PROJ), peft(IN_PROJ)
    tensors, problems = merged(adapter, model, Saved(2, 2))
    assert problems == []
    weight = model[f"{IN_PROJ}.weight"]
    assert torch.equal(value(tensors[f"{IN_PROJ}.weight"]), weight + product(adapter))


@pytest.mark.parametrize(
    ("make", "saved", "dims", "problem"),
    [
        (peft, Saved(1, 1), DELTA, "ms-swift's gated delta nets have their rows in another order"),
        (bridge, Saved(8, 8), DELTA, "8 ranks and the sizes [8, 8, 12, 12, 4, 4] do not explain"),
        (bridge, Saved(2, 2), {}, "2 ranks and the sizes [0, 0, 0, 0, 0, 0] do not explain"),
        (bridge, Saved(2, 2, "torch"), DELTA, "how ranks cut in_proj in format torch is not"),
    ],
)
def test_gated_delta_nets_whose_rows_cannot_be_told(
    make: Callable[[str, int], dict[str, Tensor]],
    saved: Saved,
    dims: Mapping[str, int],
    problem: str,
) -> None:
    rows = sum(SECTIONS)
    model = {f"{IN_PROJ}.weight.joined": matrix(1, rows, HIDDEN)}
    (found,) = merged(make(IN_PROJ, rows), model, saved, dims=dims)[1]
    assert problem in found
