"""The dialect stage: every way to store a model gives the same canonical tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pytest

from mcorefs.boxes import Box, Shape
from mcorefs.catalog import Catalog, build
from mcorefs.dtypes import BY_NAME
from mcorefs.index import Chunk, Span, StoredTensor, stored_tensor
from mcorefs.names import unwrapped
from mcorefs.views import Array, View

QKV = "self_attention.linear_qkv.weight"
LORA = "self_attention.linear_qkv."
LAYERS, EXPERTS, ROWS, COLUMNS = 3, 4, 6, 5


def array(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).integers(0, 1 << 32, shape, np.uint32)


def stored(fqn: str, shape: Shape, dtype: str = "F32") -> StoredTensor:
    whole = Box.whole(shape)
    chunk = Chunk(whole, Span("unread", 0, whole.volume * BY_NAME[dtype].itemsize))
    tensor, problem = stored_tensor(fqn, BY_NAME[dtype], shape, (chunk,))
    assert tensor is not None, problem
    return tensor


def catalog_of(arrays: Mapping[str, Array], fc1_ranks: Mapping[str, int] | None = None) -> Catalog:
    return build({fqn: stored(fqn, data.shape) for fqn, data in arrays.items()}, fc1_ranks)


def values(view: View, arrays: Mapping[str, Array]) -> Array:
    def leaf(tensor: StoredTensor, box: Box, out: Array) -> None:
        out[...] = arrays[tensor.fqn][box.slices()]

    out = np.empty(view.shape, np.uint32)
    view.read_into(Box.whole(view.shape), out, leaf)
    return out


def assert_canonical(
    arrays: Mapping[str, Array],
    expected: Mapping[str, Array],
    fc1_ranks: Mapping[str, int] | None = None,
) -> None:
    catalog = catalog_of(arrays, fc1_ranks)
    assert catalog.problems == ()
    assert set(catalog.tensors) == set(expected)
    for name, data in expected.items():
        np.testing.assert_array_equal(values(catalog.tensors[name], arrays), data, name)


FC1 = array(1, LAYERS, EXPERTS, 2 * ROWS, COLUMNS)
DENSE = array(2, LAYERS, 2 * ROWS, COLUMNS)
EMBEDDING = array(3, ROWS, COLUMNS)
CANONICAL = {
    "embedding.word_embeddings.weight": EMBEDDING,
    **{f"decoder.layers.{i}.mlp.linear_fc1.weight": DENSE[i] for i in range(LAYERS)},
    **{
        f"decoder.layers.{i}.mlp.experts.{e}.linear_fc1.weight": FC1[i, e]
        for i in range(LAYERS)
        for e in range(EXPERTS)
    },
}


def stacked() -> dict[str, Array]:
    return {
        "embedding.word_embeddings.weight": EMBEDDING,
        "decoder.layers.mlp.linear_fc1.weight": DENSE,
        "decoder.layers.mlp.experts.experts.linear_fc1.weight": FC1,
    }


def per_layer() -> dict[str, Array]:
    found = {"embedding.word_embeddings.weight": EMBEDDING}
    for i in range(LAYERS):
        found[f"decoder.layers.{i}.mlp.linear_fc1.weight"] = DENSE[i]
        found[f"decoder.layers.{i}.mlp.experts.experts.linear_fc1.weight"] = FC1[i]
    return found


def singleton() -> dict[str, Array]:
    """singleton_local_shards: a key for each layer and expert, gate (w) and up (v) apart."""
    found = {"embedding.word_embeddings.weight": EMBEDDING}
    for i in range(LAYERS):
        dense = f"decoder.layers.{i}.mlp.linear_fc1.weight"
        found |= {f"{dense}_w": DENSE[i, :ROWS], f"{dense}_v": DENSE[i, ROWS:]}
        for e in range(EXPERTS):
            expert = f"decoder.layers.{i}.mlp.experts.experts.{e}.linear_fc1.weight"
            found |= {f"{expert}_v": FC1[i, e, ROWS:], f"{expert}_w": FC1[i, e, :ROWS]}
    return found


def stacked_halves() -> dict[str, Array]:
    return {
        "embedding.word_embeddings.weight": EMBEDDING,
        "decoder.layers.mlp.linear_fc1.weight_w": DENSE[:, :ROWS],
        "decoder.layers.mlp.linear_fc1.weight_v": DENSE[:, ROWS:],
        "decoder.layers.mlp.experts.experts.linear_fc1.weight_w": FC1[:, :, :ROWS],
        "decoder.layers.mlp.experts.experts.linear_fc1.weight_v": FC1[:, :, ROWS:],
    }


def grouped() -> dict[str, Array]:
    """A state dict of modules, with TEGroupedMLP; FSDP2 saves it as it is."""
    found = {"embedding.word_embeddings.weight": EMBEDDING}
    for i in range(LAYERS):
        found[f"decoder.layers.{i}.mlp.linear_fc1.weight"] = DENSE[i]
        for e in range(EXPERTS):
            found[f"decoder.layers.{i}.mlp.experts.linear_fc1.weight{e}"] = FC1[i, e]
    return found


def grouped_halves() -> dict[str, Array]:
    """What Megatron-FSDP makes of it."""
    found = {"embedding.word_embeddings.weight": EMBEDDING}
    for name, data in grouped().items():
        if "linear_fc1" in name:
            found |= {f"{name}_w": data[:ROWS], f"{name}_v": data[ROWS:]}
    return found


def sequential_halves() -> dict[str, Array]:
    """With SequentialMLP."""
    return {
        re.sub(r"linear_fc1\.weight(\d+)", r"local_experts.\1.linear_fc1.weight", name): data
        for name, data in grouped_halves().items()
    }


DIALECTS = (
    stacked,
    per_layer,
    singleton,
    stacked_halves,
    grouped,
    grouped_halves,
    sequential_halves,
)


@pytest.mark.parametrize("inside", ["transformer_layer", "mtp_model_layer"])
@pytest.mark.parametrize("wrapper", ["", "module.", "model."])
def test_the_layer_inside_one_for_multi_token_prediction(inside: str, wrapper: str) -> None:
    """It never has a layer axis, and its experts have theirs."""
    at = f"{wrapper}mtp.layers.1."
    assert_canonical(
        {
            f"{at}eh_proj.weight": EMBEDDING,
            f"{at}{inside}.input_layernorm.weight": EMBEDDING[0],
            f"{at}{inside}.mlp.experts.experts.linear_fc1.weight": FC1[0],
        },
        {
            "mtp.layers.1.eh_proj.weight": EMBEDDING,
            "mtp.layers.1.transformer_layer.input_layernorm.weight": EMBEDDING[0],
            **{
                f"mtp.layers.1.transformer_layer.mlp.experts.{e}.linear_fc1.weight": FC1[0, e]
                for e in range(EXPERTS)
            },
        },
    )


def test_a_stack_of_layers_inside_is_no_layer() -> None:
    """Of a hybrid model."""
    name = "mtp.layers.0.mtp_model_layer.layers.0.mixer.D"
    assert_canonical({name: EMBEDDING}, {name: EMBEDDING})


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "model.module.", "module.module."])
def test_every_dialect_is_the_same_model(dialect: type[dict[str, Array]], prefix: str) -> None:
    arrays = {prefix + fqn: data for fqn, data in dialect().items()}
    assert_canonical(arrays, CANONICAL)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("tail", [(COLUMNS,), ()], ids=["weight", "bias"])
def test_gate_and_up_rows_by_rank_are_put_in_order(ranks: int, tail: Shape) -> None:
    name, prefix = "decoder.layers.7.mlp.experts.5.linear_fc1.weight", "model.module."
    gate, up = array(1, ROWS, *tail), array(2, ROWS, *tail)
    pairs = zip(np.split(gate, ranks), np.split(up, ranks), strict=True)
    stored_as = np.concatenate([half for pair in pairs for half in pair])
    fqn = f"{prefix}decoder.layers.7.mlp.experts.linear_fc1.weight5"
    expected = {name: np.concatenate([gate, up])}
    assert_canonical({fqn: stored_as}, expected, {fqn: ranks})


def test_numbers_that_are_none_are_left_alone() -> None:
    names = (
        "decoder.layers.0.mlp.experts.linear_fc1.weight" + "7" * 5000,
        "decoder.layers.0.mlp.experts.linear_fc1.weight_w7",
        "decoder.layers.0.mlp.experts.linear_fc1.weight7_x",
        "decoder.layers.0.mlp.experts.local_experts.x.linear_fc1.weight",
    )
    arrays = {name: array(0, 2) for name in names}
    assert_canonical(arrays, arrays)


def test_dialects_may_be_mixed_in_one_checkpoint() -> None:
    """MTP layers are stored one by one even where the decoder's are stacked."""
    mtp = "mtp.layers.0.transformer_layer."
    arrays = {
        f"decoder.layers.{QKV}": (qkv := array(4, LAYERS, ROWS, COLUMNS)),
        f"{mtp}{QKV}": array(5, ROWS, COLUMNS),
        f"{mtp}mlp.experts.experts.linear_fc2.weight": (fc2 := array(6, EXPERTS, ROWS, COLUMNS)),
        "decoder.final_layernorm.weight": array(7, COLUMNS),
    }
    expected = {f"decoder.layers.{i}.{QKV}": qkv[i] for i in range(LAYERS)}
    expected |= {f"{mtp}mlp.experts.{e}.linear_fc2.weight": fc2[e] for e in range(EXPERTS)}
    for name in (f"{mtp}{QKV}", "decoder.final_layernorm.weight"):
        expected[name] = arrays[name]
    assert_canonical(arrays, expected)


def test_other_prefixes_are_left_alone() -> None:
    """A wrapper before nothing known stays."""
    names = (
        "thinker.language_model.decoder.layers.0.x",
        "module.vision.y",
        "model.z",
        "embedding.module.w",
    )
    arrays = {name: array(0, 2) for name in names}
    assert_canonical(arrays, arrays)


@pytest.mark.parametrize("wrapper", ["", "module.", "model.module.", "base_model.model."])
@pytest.mark.parametrize("vision", ["visual.visual.", "visual.", "vision_model."])
def test_models_that_see(wrapper: str, vision: str) -> None:
    """A language model from its root, and what sees for it under one name."""
    stored = {
        f"{wrapper}language_model.decoder.layers.mlp.linear_fc2.weight": array(0, 2, 3, 4),
        f"{wrapper}{vision}blocks.0.attn.qkv.weight": array(1, 2),
        f"{wrapper}{vision}decoder.layers.mlp.linear_fc2.weight": array(2, 2, 3),
        f"{wrapper}{vision}decoder.deepstack_merger_list.linear_fc1.bias": array(3, 2, 3),
    }
    fc2, qkv, vision_fc2, merger = stored.values()
    expected = {
        **{f"decoder.layers.{i}.mlp.linear_fc2.weight": fc2[i] for i in range(2)},
        "vision_model.blocks.0.attn.qkv.weight": qkv,
        **{f"vision_model.decoder.layers.{i}.mlp.linear_fc2.weight": vision_fc2[i] for i in (0, 1)},
        **{
            f"vision_model.decoder.deepstack_merger_list.{i}.linear_fc1.bias": merger[i]
            for i in (0, 1)
        },
    }
    assert_canonical(stored, expected)


def test_router_counters_are_no_weights() -> None:
    router = "decoder.layers.mlp.router."
    kept = {
        f"{router}weight": array(1, 2, EXPERTS, COLUMNS),
        f"{router}expert_bias": array(2, 2, 4),
    }
    counters = {
        f"{router}local_tokens_per_expert": array(3, 2, EXPERTS),
        f"{router}global_tokens_per_expert": array(4, 2, EXPERTS),
        "decoder.layers.0.mlp.router.ga_steps": array(5, 1),
    }
    expected = {
        name.replace("layers.", f"layers.{i}."): data[i]
        for name, data in kept.items()
        for i in range(2)
    }
    assert_canonical(kept | counters, expected)


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        (f"decoder.layers.1.{QKV}", f"decoder.layers.1.{QKV} is stored twice, in two dialects"),
        (f"module.decoder.layers.1.{QKV}", f"decoder.layers.1.{QKV} is stored twice"),
        (f"model.decoder.layers.{QKV}", f"decoder.layers.0.{QKV} is stored twice"),
    ],
)
def test_a_tensor_in_two_dialects_is_a_problem(extra: str, problem: str) -> None:
    arrays = {f"decoder.layers.{QKV}": array(1, LAYERS, ROWS, COLUMNS)}
    arrays[extra] = array(2, LAYERS, ROWS, COLUMNS)
    assert any(problem in found for found in catalog_of(arrays).problems)


def test_halves_that_do_not_fit_are_problems() -> None:
    at = "decoder.layers.{}.mlp.linear_fc1.weight".format
    halves = {
        f"{at(0)}_w": ((6, 5), "F32"),
        f"{at(1)}_v": ((6, 5), "F32"),
        f"{at(2)}_w": ((6, 5), "F32"),
        f"{at(2)}_v": ((4, 5), "F32"),
        f"{at(3)}_w": ((6, 5), "F32"),
        f"{at(3)}_v": ((6, 5), "BF16"),
    }
    tensors = {name: stored(name, shape, dtype) for name, (shape, dtype) in halves.items()}
    catalog = build(tensors)
    assert catalog.tensors == {}
    assert set(catalog.problems) == {
        f"{at(0)}_v is missing beside its other half",
        f"{at(1)}_w is missing beside its other half",
        f"{at(2)}_w and {at(2)}_v differ in shape or dtype",
        f"{at(3)}_w and {at(3)}_v differ in shape or dtype",
    }


@pytest.mark.parametrize(
    ("name", "shape", "canonical"),
    [
        # ms-swift
        (
            f"decoder.layers.{LORA}lora_A.default.weight",
            (2, 4, 5),
            f"decoder.layers.1.{LORA}lora_A",
        ),
        ("base_model.model.decoder.layers.1.mlp.linear_fc2.lora_B.default.weight", (4, 2), ""),
        ("output_layer.modules_to_save.default.weight", (4, 2), ""),
        # Megatron-Bridge
        ("module.decoder.layers.1.mlp.linear_fc1.adapter.linear_in.weight", (4, 2), ""),
        (
            f"decoder.layers.{LORA}adapter.adapter_q.linear_out.weight",
            (2, 4, 5),
            f"decoder.layers.1.{LORA}adapter.adapter_q",
        ),
        (
            "decoder.layers.mlp.experts.experts.linear_fc1.adapter.linear_in.weight",
            (2, 3, 4, 5),
            "decoder.layers.1.mlp.experts.2.linear_fc1.adapter",
        ),
        (
            "decoder.layers.mlp.experts.experts.linear_fc1.adapter.linear_in.weight",
            (2, 4, 5),
            "decoder.layers.1.mlp.experts.*.linear_fc1.adapter",
        ),
        (
            "decoder.layers.1.mlp.experts.experts.2.linear_fc1.lora_A.default.weight",
            (4, 5),
            "decoder.layers.1.mlp.experts.2.linear_fc1.lora_A",
        ),
    ],
)
def test_what_an_adapter_adds_is_kept_apart(name: str, shape: Shape, canonical: str) -> None:
    arrays = {"embedding.word_embeddings.weight": EMBEDDING, name: array(1, *shape)}
    catalog = catalog_of(arrays)
    assert catalog.problems == ()
    assert set(catalog.tensors) == {"embedding.word_embeddings.weight"}
    last = list(catalog.adapter)[-1]
    assert last.startswith(canonical or unwrapped(name))
    assert catalog.adapter[last].shape == shape[-2:]
    picked = arrays[name][(-1,) * (len(shape) - 2)]
    np.testing.assert_array_equal(values(catalog.adapter[last], arrays), picked)


@pytest.mark.parametrize("name", ["vision_model.adapter.linear_fc1.weight", "x.adapter.weight"])
def test_modules_of_other_kinds_by_that_name(name: str) -> None:
    assert_canonical({name: array(1, 2, 3)}, {name: array(1, 2, 3)})


def test_modules_that_peft_wraps_keep_their_names() -> None:
    layer = "decoder.layers.mlp.linear_fc1."
    arrays = {
        f"{layer}base_layer.weight": (fc1 := array(1, LAYERS, 2 * ROWS, COLUMNS)),
        f"{layer}layer_norm_weight": (norm := array(2, LAYERS, COLUMNS)),
        "output_layer.original_module.weight": (head := array(3, ROWS, COLUMNS)),
    }
    expected = {"output_layer.weight": head}
    for i in range(LAYERS):
        expected[f"decoder.layers.{i}.mlp.linear_fc1.weight"] = fc1[i]
        expected[f"decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight"] = norm[i]
    assert_canonical(arrays, expected)


@pytest.mark.parametrize("name", ["decoder.layers.", "decoder.layers.0.mlp.experts.experts.", ""])
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_names_cut_short_are_survived(name: str, shape: Shape) -> None:
    build({name: stored(name, shape)})
