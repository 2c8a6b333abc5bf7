"""Hybrids of Mamba layers, attention, MLPs and experts: sections, sizes, and what each layer is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from mcorefs import catalog
from mcorefs.boxes import Shape, row_major_strides
from mcorefs.dtypes import BF16
from mcorefs.errors import MappingError
from mcorefs.files import read_all
from mcorefs.formats.torch_dist import TorchDist
from mcorefs.formats.torch_legacy import mamba
from mcorefs.formats.torch_legacy.tensor_parallel import Cut, Part, how_cut
from mcorefs.index import Span
from mcorefs.mapping.choose import choose
from mcorefs.mapping.facts import gather
from mcorefs.mapping.families.nemotron_h import NEMOTRON_H
from mcorefs.mapping.plan import plan
from mcorefs.mapping.reference import NO_REFERENCE, Reference
from mcorefs.model import Model, Options, load
from mcorefs.tree import build
from mcorefs.views import View
from tests.checkpoints import Fixture, ensure
from tests.edited import with_args
from tests.recordings import assert_same_bytes, differences
from tests.test_config import reference, refusal
from tests.test_megatron_bridge import changed, saved
from tests.test_plan import unread

DENSE, MOE, LATENT = "nemotron_h-tp2", "nemotron_h-moe-tp2-ep2", "nemotron_h-latent-tp2"
AT = "decoder.layers.0.mixer."
GROUPS: Mapping[str, object] = {"mamba_num_groups": 4}


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure([DENSE, MOE, LATENT])


@pytest.fixture
def tensors(fixtures: Mapping[str, Fixture]) -> dict[str, View]:
    return dict(catalog.build(TorchDist().index(fixtures[DENSE].iteration).tensors).tensors)


@pytest.fixture
def experts(fixtures: Mapping[str, Fixture]) -> dict[str, View]:
    return dict(catalog.build(TorchDist().index(fixtures[LATENT].iteration).tensors).tensors)


def problems_of(tensors: Mapping[str, View], **args: object) -> list[str]:
    facts, _, problems = gather(tensors, {**GROUPS, "kv_channels": 16, **args}, NO_REFERENCE, 301)
    return [*problems, *plan(NEMOTRON_H, tensors, facts)[1]]


# -- sections -------------------------------------------------------------------------------------


def test_a_missing_section_is_named(fixtures: Mapping[str, Fixture]) -> None:
    stored = dict(TorchDist().index(fixtures[DENSE].iteration).tensors)
    del stored[AT + "in_proj.weight.dt"], stored[AT + "conv1d.bias.B"]
    assert set(catalog.build(stored).problems) == {
        f"{AT}conv1d.bias.B is missing beside {AT}conv1d.bias.C",
        f"{AT}in_proj.weight.dt is missing beside {AT}in_proj.weight.B",
    }


def part(*shape: int) -> Part:
    return Part(Span("file", 0, 1 << 20), BF16, shape, row_major_strides(shape), 0)


RANK: Mapping[str, Part] = {
    AT + "in_proj.weight": part(2 * 24 + 2 * 10 + 3, 64),
    AT + "conv1d.weight": part(24 + 2 * 10, 1, 4),
    AT + "conv1d.bias": part(24 + 2 * 10),
    AT + "out_proj.weight": part(64, 24),
    AT + "A_log": part(3),
    AT + "D": part(3),
}


def test_a_rank_of_the_legacy_format_is_divided() -> None:
    problems: list[str] = []
    found = mamba.divided(RANK, problems)
    assert problems == []
    shapes: dict[str, Shape] = {name.removeprefix(AT): p.shape for name, p in found.items()}
    assert shapes == {
        "in_proj.weight.z": (24, 64),
        "in_proj.weight.x": (24, 64),
        "in_proj.weight.B": (10, 64),
        "in_proj.weight.C": (10, 64),
        "in_proj.weight.dt": (3, 64),
        "conv1d.weight.x": (24, 1, 4),
        "conv1d.weight.B": (10, 1, 4),
        "conv1d.weight.C": (10, 1, 4),
        "conv1d.bias.x": (24,),
        "conv1d.bias.B": (10,),
        "conv1d.bias.C": (10,),
        "out_proj.weight": (64, 24),
        "A_log": (3,),
        "D": (3,),
    }
    assert found[AT + "in_proj.weight.dt"].first == (2 * 24 + 2 * 10) * 64
    assert found[AT + "conv1d.bias.C"].first == 24 + 10


def test_the_convolution_under_its_newer_names() -> None:
    """megatron-core 0.18 on: parameters of the mixer itself."""
    renamed = {name.replace("conv1d.", "conv1d_"): part for name, part in RANK.items()}
    assert AT + "conv1d_weight" in renamed
    assert mamba.divided(renamed, []) == mamba.divided(RANK, [])


def test_a_rank_whose_sections_do_not_add_up() -> None:
    problems: list[str] = []
    mamba.divided({**RANK, AT + "A_log": part(4)}, problems)
    (problem,) = problems
    assert problem.startswith(f"{AT}in_proj.weight has 71 rows on a rank and {AT}conv1d.weight 44")


def test_which_norm_is_cut() -> None:
    parts = {AT + "norm.weight": part(24), "decoder.layers.0.norm.weight": part(64)}
    cuts = [how_cut(name, parts, 2, {}) for name in parts]
    assert cuts == [(Cut.ROWS, None), (Cut.WHOLE, None)]


def test_rows_in_an_order_that_nothing_tells_are_refused(tensors: Mapping[str, View]) -> None:
    """As formats hold them that keep what a rank has."""
    bare = {name.removesuffix(".joined"): view for name, view in tensors.items()}
    for sizes in ({}, {"tensor_model_parallel_size": 2}):
        (problem,) = problems_of(bare, **sizes)
        assert problem.startswith("the rows of mixer.in_proj.weight lie in an order that nothing")
    assert problems_of(bare, tensor_model_parallel_size=1) == []


# -- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "claim", "shown"),
    [
        ("mamba_num_heads", 4, 8),
        ("mamba_head_dim", 24, 12),
        ("mamba_state_dim", 20, 10),
        ("num_attention_heads", 4, 8),
        ("ffn_hidden_size", 48, 96),
    ],
)
def test_args_that_contradict_shapes(
    tensors: Mapping[str, View], argument: str, claim: int, shown: int
) -> None:
    assert problems_of(tensors) == []
    (problem,) = problems_of(tensors, **{argument: claim})
    assert problem == (
        f"{argument} is {claim} in the training arguments but the tensor shapes say {shown}"
    )


def test_the_width_of_a_latent_is_proven(experts: Mapping[str, View]) -> None:
    assert problems_of(experts, moe_latent_size=24) == []
    (problem,) = problems_of(experts, moe_latent_size=64)
    assert "moe_latent_size is 64" in problem


def test_the_number_of_groups_needs_a_source(tensors: Mapping[str, View]) -> None:
    args: Mapping[str, object] = {"kv_channels": 16}
    problems = gather(tensors, args, NO_REFERENCE)[2]
    assert any("mamba_num_groups is recorded nowhere" in problem for problem in problems)
    facts, _, problems = gather(tensors, args, Reference({"n_groups": 2}, "--hf-config"))
    assert problems == []
    assert (facts.dims["mamba_groups"], facts.dims["mamba_state"]) == (2, 20)
    (problem,) = gather(tensors, {**args, "mamba_num_groups": 3}, NO_REFERENCE)[2]
    assert problem.endswith("which 3 groups do not explain")


def test_sizes_that_do_not_add_up(tensors: dict[str, View]) -> None:
    tensors[AT + "A_log"] = unread((7,))
    assert any("which no number of Mamba heads explains" in p for p in problems_of(tensors))


# -- what each layer is ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        {"hybrid_override_pattern": "M-M*-M*-"},
        {"hybrid_layer_pattern": "M-M*|-M*-"},
        {"hybrid_layer_pattern": "M-M*-M*-/*E"},
        {},
    ],
)
def test_the_pattern_is_that_of_the_tensors(
    tensors: Mapping[str, View], said: Mapping[str, object]
) -> None:
    assert problems_of(tensors, **said) == []


def test_another_pattern_is_refused(tensors: Mapping[str, View]) -> None:
    (problem,) = problems_of(tensors, hybrid_layer_pattern="M-M*-M-*")
    assert problem.startswith("the layers are M-M*-M-* by the training arguments but M-M*-M*- by")


def test_a_layer_of_two_modules_is_refused(tensors: dict[str, View]) -> None:
    tensors["decoder.layers.3.mlp.linear_fc1.weight"] = unread((96, 64))
    tensors["decoder.layers.3.mlp.linear_fc2.weight"] = unread((64, 96))
    problems = problems_of(tensors)
    assert any(p.startswith("layers [3] are not one of a Mamba mixer, attention") for p in problems)


def test_a_layer_with_an_absurd_number_is_told(tensors: dict[str, View]) -> None:
    tensors["decoder.layers.99999.mixer.D"] = tensors[AT + "D"]
    assert any("a tensor is named after layer 99999" in p for p in problems_of(tensors))


def test_without_attention_transformers_cannot_run(tensors: dict[str, View]) -> None:
    kept = {n: v for n, v in tensors.items() if not n.startswith("decoder.layers.6.")}
    moved = {n.replace("layers.7.", "layers.6."): v for n, v in kept.items()}
    for name in [name for name in moved if name.startswith("decoder.layers.3.")]:
        del moved[name]
        moved[name.replace("layers.3.", "layers.1.")] = tensors[name]
    without = {n: v for n, v in moved.items() if ".self_attention." not in n}
    assert any(p.startswith("no layer is one of attention") for p in problems_of(without))


def test_multi_token_prediction_is_refused(tensors: dict[str, View]) -> None:
    tensors["mtp.layers.0.mtp_model_layer.layers.0.mixer.D"] = tensors[AT + "D"]
    problems = problems_of(tensors, mtp_num_layers=1)
    assert any("which no release of megatron-core (up to 0.16) can save" in p for p in problems)
    facts = gather(tensors, {}, NO_REFERENCE)[0]
    with pytest.raises(MappingError, match="what speaks against nemotron_h:") as caught:
        choose(tensors, facts, None, NO_REFERENCE)
    assert caught.value.problems == ("has mtp.layers.*.mtp_model_layer.layers.*.mixer.D",)


def test_other_layers_in_a_hybrid_are_named(tensors: dict[str, View]) -> None:
    """Gated delta nets, say, or norms of heads."""
    tensors["decoder.layers.3.self_attention.q_layernorm.weight"] = unread((16,))
    facts = gather(tensors, {}, NO_REFERENCE)[0]
    problems = refusal(lambda: choose(tensors, facts, None, NO_REFERENCE))
    assert problems == ("has decoder.layers.*.self_attention.q_layernorm.weight",)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        (DENSE, "position_embedding_type", "rope"),
        (DENSE, "squared_relu", False),
        (DENSE, "swiglu", True),
        (DENSE, "layernorm_epsilon", 1e-6),  # that of the norm in a mixer is another
        (DENSE, "normalization", "LayerNorm"),
        (DENSE, "window_size", [128, 0]),
        (MOE, "moe_router_score_function", "softmax"),
        (MOE, "moe_router_load_balancing_type", "sinkhorn"),
    ],
)
def test_arguments_that_mean_another_model_are_refused(
    fixtures: Mapping[str, Fixture], name: str, key: str, value: object, tmp_path: Path
) -> None:
    root = with_args(fixtures[name], tmp_path, **{key: value})
    (problem,) = refusal(lambda: load(root, Options()))
    assert f"{key}={value!r}" in problem
    assert "its output would differ" in problem


@pytest.mark.parametrize("task", ["seq_cls", "embedding"])
def test_there_are_no_other_heads(fixtures: Mapping[str, Fixture], task: str) -> None:
    with pytest.raises(MappingError, match=f"no class of that family for {task}"):
        load(fixtures[DENSE].root, Options(task=task))


def test_a_tied_output_layer_is_served_as_a_copy(tensors: dict[str, View]) -> None:
    """transformers' model has an output layer of its own, whatever tie_word_embeddings says."""
    del tensors["output_layer.weight"]
    facts, _, problems = gather(tensors, {**GROUPS, "kv_channels": 16}, NO_REFERENCE, 301)
    planned, more = plan(NEMOTRON_H, tensors, facts)
    assert [*problems, *more] == []
    views = {tensor.name: tensor.view for tensor in planned}
    assert views["lm_head.weight"] == views["backbone.embeddings.weight"]
    assert facts.tied


# -- config.json ----------------------------------------------------------------------------------


def with_reference(fixture: Fixture, directory: Path, **changes: object) -> Model:
    """The model with the config of the oracle, changed, as a reference; ... takes a key away."""
    given = reference(fixture, directory, **changes)
    return load(fixture.root, Options(hf_config=given, vocab_size=307))


def test_a_model_without_experts_has_no_keys_of_theirs(fixtures: Mapping[str, Fixture]) -> None:
    dense = set(load(fixtures[DENSE].root, Options()).config)
    moe = set(load(fixtures[MOE].root, Options()).config)
    assert dense < moe
    assert moe - dense == {
        "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size",
        "moe_shared_expert_intermediate_size", "moe_latent_size", "norm_topk_prob", "n_group",
        "topk_group", "routed_scaling_factor",
    }  # fmt: skip


_LAST = ("mlp", "linear_attention", "full_attention", "mlp")


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"layers_block_type": ..., "hybrid_override_pattern": "M-M*-M*-"},
        {"layers_block_type": ["mamba", "mlp", "mamba", "attention", *_LAST]},
    ],
)
def test_every_way_to_state_the_layers(
    fixtures: Mapping[str, Fixture], stated: Mapping[str, object], tmp_path: Path
) -> None:
    """The hub's way is kept: code on the hub cannot be given the other."""
    config = with_reference(fixtures[DENSE], tmp_path, **stated).config
    assert config["hybrid_override_pattern"] == "M-M*-M*-"
    assert "layers_block_type" not in config


def test_a_reference_with_other_layers_is_refused(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    other = ["mlp"] * 8
    (problem,) = refusal(lambda: with_reference(fixtures[DENSE], tmp_path, layers_block_type=other))
    assert problem.startswith('hybrid_override_pattern is "M-M*-M*-" in the checkpoint but "------')


def test_the_shortest_step_of_a_reference_is_overruled(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """The hub's configs have 0.001, a range to initialise by: Megatron lengthens no step."""
    model = with_reference(fixtures[DENSE], tmp_path, time_step_min=0.001)
    assert model.config["time_step_min"] == 1e-45
    assert any(remark.startswith("time_step_min is 1e-45 as in the") for remark in model.remarks)


def test_a_model_can_be_initialised_from_the_config(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """transformers takes the logarithm of the shortest step."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tree, _ = build(load(fixtures[DENSE].root, Options()), "50GB", 1 << 20)
    (tmp_path / "config.json").write_bytes(read_all(tree.files["config.json"]))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))


# -- Megatron-Bridge ------------------------------------------------------------------------------


def _callable(name: str) -> Mapping[str, object]:
    return {"_target_": name, "_call_": False}


@pytest.mark.parametrize("name", [DENSE, MOE])
def test_everything_comes_from_the_run_config_of_megatron_bridge(
    fixtures: Mapping[str, Fixture], tmp_path: Path, name: str
) -> None:
    """The fields of Megatron-Bridge:src/megatron/bridge/models/nemotronh/nemotron_h_provider.py
    NemotronHModelProvider, and of its ancestors as they were recorded of another."""
    spec = fixtures[name].spec
    experts: Mapping[str, object] = {
        "num_moe_experts": spec.experts,
        "moe_ffn_hidden_size": spec.moe_ffn,
        "moe_shared_expert_intermediate_size": spec.shared_ffn,
        "moe_router_topk": spec.topk,
        "moe_router_topk_scaling_factor": spec.routed_scaling,
    }
    text = changed(
        "megatron_bridge/0.3.1/llama-tp2.yaml",
        _target_="megatron.bridge.models.nemotronh.nemotron_h_provider.NemotronHModelProvider",
        hf_model_id="nvidia/Nemotron-H-8B-Base-8K",
        num_layers=spec.layers,
        hidden_size=spec.hidden,
        ffn_hidden_size=spec.ffn,
        num_attention_heads=spec.heads,
        num_query_groups=spec.kv_heads,
        kv_channels=spec.head_dim,
        vocab_size=spec.vocab_size,
        seq_length=spec.max_positions,
        layernorm_epsilon=1e-5,
        hybrid_override_pattern=spec.pattern,
        mamba_num_heads=8,
        mamba_head_dim=12,
        mamba_num_groups=4,
        mamba_state_dim=10,
        position_embedding_type="none",
        gated_linear_unit=False,
        activation_func=_callable("megatron.core.activations.squared_relu"),
        share_embeddings_and_output_weights=False,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="seq_aux_loss",
        is_hybrid_model=True,
        **(experts if spec.is_moe else {}),
    )
    model = load(saved(fixtures[name], tmp_path, text), Options())
    assert model.choice.evidence == ("the trainer names model_type nemotron_h",)
    assert differences(model, fixtures[name], tmp_path) == {}
    assert_same_bytes(model, fixtures[name])
