"""Gated delta nets: their sections, how many heads they have, and whose order their rows are in."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mcorefs import catalog
from mcorefs.boxes import Shape, row_major_strides
from mcorefs.dtypes import BF16
from mcorefs.files import read_all
from mcorefs.formats.torch_dist import TorchDist
from mcorefs.formats.torch_legacy.delta_net import divided
from mcorefs.formats.torch_legacy.tensor_parallel import Part
from mcorefs.index import Span
from mcorefs.mapping.facts import gather
from mcorefs.mapping.families.qwen3_next import QWEN3_NEXT
from mcorefs.mapping.plan import plan
from mcorefs.mapping.reference import NO_REFERENCE, Reference
from mcorefs.model import Options, load
from mcorefs.tree import build
from mcorefs.views import View
from tests.checkpoints import Fixture, ensure
from tests.edited import State, saved_anew, with_args
from tests.test_config import refusal

KEY_HEADS = 2
IN_PROJ = ("query", "key", "value", "z", "beta", "alpha")
AT = "decoder.layers.0.self_attention."
NEXT, DENSE, EXPERTS = "qwen3_next-tp2-ep2", "qwen3_5_text-tp2", "qwen3_5_moe_text-tp2-ep2"
PREDICTS, DENSE_PREDICTS = "qwen3_next-tp2-ep2-mtp", "qwen3_5_text-tp2-mtp-tied"


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure([NEXT, DENSE, EXPERTS, PREDICTS, DENSE_PREDICTS, "qwen3-tp2"])


def canonical(fixture: Fixture) -> tuple[dict[str, View], tuple[str, ...]]:
    built = catalog.build(TorchDist().index(fixture.iteration).tensors)
    return dict(built.tensors), built.problems


# -- sections -------------------------------------------------------------------------------------


def test_a_missing_section_is_named(fixtures: Mapping[str, Fixture]) -> None:
    stored = dict(TorchDist().index(fixtures[NEXT].iteration).tensors)
    del stored[AT + "in_proj.weight.z"]
    problems = catalog.build(stored).problems
    assert problems == (f"{AT}in_proj.weight.z is missing beside {AT}in_proj.weight.alpha",)


def test_sections_that_do_not_fit_together(fixtures: Mapping[str, Fixture]) -> None:
    stored = dict(TorchDist().index(fixtures[NEXT].iteration).tensors)
    stored[AT + "conv1d.weight.key"] = stored[AT + "in_proj.weight.key"]
    (problem,) = catalog.build(stored).problems
    assert problem.startswith(f"{AT}conv1d.weight.{{query,key,value}} do not fit together")


def part(*shape: int) -> Part:
    return Part(Span("file", 0, 1 << 20), BF16, shape, row_major_strides(shape), 0)


def test_a_rank_of_the_legacy_format_is_divided() -> None:
    parts = {
        AT + "in_proj.weight": part(2 * 8 + 2 * 24 + 2 * 2, 64),
        AT + "conv1d.weight": part(2 * 8 + 24, 1, 4),
        AT + "out_proj.weight": part(64, 24),
        AT + "A_log": part(2),
    }
    problems: list[str] = []
    found = divided(parts, problems)
    assert problems == []
    shapes: dict[str, Shape] = {name.removeprefix(AT): p.shape for name, p in found.items()}
    assert shapes["in_proj.weight.value"] == shapes["in_proj.weight.z"] == (24, 64)
    assert shapes["in_proj.weight.alpha"] == (2, 64)
    assert shapes["conv1d.weight.key"] == (8, 1, 4)
    assert found[AT + "in_proj.weight.alpha"].first == (2 * 8 + 2 * 24 + 2) * 64
    assert AT + "in_proj.weight" not in found
    divided({**parts, AT + "A_log": part(3)}, problems)
    (problem,) = problems
    assert problem.startswith(f"{AT}in_proj.weight has 68 rows on a rank and {AT}conv1d.weight 40")


# -- facts ----------------------------------------------------------------------------------------


def problems_of(tensors: Mapping[str, View], **args: object) -> list[str]:
    known = {"linear_num_key_heads": 2, "apply_layernorm_1p": True, **args}
    facts, _, problems = gather(tensors, known, NO_REFERENCE, 301)
    return [*problems, *plan(QWEN3_NEXT, tensors, facts)[1]]


@pytest.mark.parametrize(
    ("argument", "claim", "shown"),
    [
        ("linear_num_value_heads", 8, 4),
        ("linear_key_head_dim", 16, 8),
        ("linear_value_head_dim", 24, 12),
        ("linear_conv_kernel_dim", 2, 4),
        ("num_attention_heads", 16, 8),
    ],
)
def test_args_that_contradict_shapes(
    fixtures: Mapping[str, Fixture], argument: str, claim: int, shown: int
) -> None:
    tensors, _ = canonical(fixtures[NEXT])
    assert problems_of(tensors) == []
    (problem,) = problems_of(tensors, **{argument: claim})
    assert problem == (
        f"{argument} is {claim} in the training arguments but the tensor shapes say {shown}"
    )


def test_the_number_of_key_heads_needs_a_source(fixtures: Mapping[str, Fixture]) -> None:
    tensors, _ = canonical(fixtures[NEXT])
    problems = gather(tensors, {}, NO_REFERENCE)[2]
    assert any("linear_num_key_heads is recorded nowhere" in problem for problem in problems)
    reference = Reference({"linear_num_key_heads": 2}, "--hf-config")
    facts, _, problems = gather(tensors, {}, reference)
    assert problems == []
    assert (facts.dims["linear_key_heads"], facts.dims["linear_key_dim"]) == (2, 8)
    (problem,) = gather(tensors, {"linear_num_key_heads": 3}, NO_REFERENCE)[2]
    assert problem.endswith("which 3 key heads do not explain")


def test_gated_attention_is_counted_without_its_gates(fixtures: Mapping[str, Fixture]) -> None:
    tensors, _ = canonical(fixtures[NEXT])
    dims = gather(tensors, {"attention_output_gate": True}, NO_REFERENCE)[0].dims
    assert (dims["heads"], dims["groups"], dims["gated_q_rows"]) == (8, 4, 256)
    dense, _ = canonical(fixtures["qwen3-tp2"])
    assert gather(dense, {}, NO_REFERENCE)[0].dims["groups"] == 4


# -- which model ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_output_gate", False),
        ("apply_layernorm_1p", False),
        ("experimental_attention_variant", "dsa"),
        ("rotary_interleaved", True),
        ("add_bias_linear", True),
        ("moe_router_score_function", "sigmoid"),
    ],
)
def test_arguments_that_mean_another_model_are_refused(
    fixtures: Mapping[str, Fixture], name: str, value: object, tmp_path: Path
) -> None:
    root = with_args(fixtures[NEXT], tmp_path, **{name: value})
    problems = refusal(lambda: load(root, Options()))
    assert any(f"{name}={value!r}" in problem for problem in problems)


def test_norms_that_are_not_around_zero_are_refused(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    root = with_args(fixtures[NEXT], tmp_path, apply_layernorm_1p=...)
    (problem,) = refusal(lambda: load(root, Options()))
    assert "apply_layernorm_1p is set, so that norms are not around zero" in problem


def test_rows_in_an_order_that_nothing_tells_are_refused(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """As formats hold them that keep what a rank has; ms-swift's are known by its arguments."""
    tensors, _ = canonical(fixtures[NEXT])
    bare = {name.removesuffix(".joined"): view for name, view in tensors.items()}
    (problem,) = problems_of(bare)
    assert problem.startswith("the rows of self_attention.in_proj.weight lie in an order that noth")
    assert problems_of(bare, tuner_type="full") == []
    (problem,) = problems_of(tensors, tuner_type="full")
    assert problem.startswith(
        "ms-swift trained it, which orders the rows of self_attention.in_proj.w"
    )


def test_multi_token_prediction_is_whole_and_apart(fixtures: Mapping[str, Fixture]) -> None:
    tensors, _ = canonical(fixtures[PREDICTS])
    assert problems_of(tensors, mtp_num_layers=1) == []
    facts, _, _ = gather(tensors, {"linear_num_key_heads": 2}, NO_REFERENCE, 301)
    names = {t.name for t in plan(QWEN3_NEXT, tensors, facts)[0]}
    assert len([name for name in names if name.startswith("mtp.layers.0.")]) == 37
    assert {name for name in names if name.startswith("mtp.") and "layers" not in name} == {
        "mtp.fc.weight",
        "mtp.norm.weight",
        "mtp.pre_fc_norm_embedding.weight",
        "mtp.pre_fc_norm_hidden.weight",
    }
    for name in ("enorm.weight", "transformer_layer.mlp.shared_experts.gate_weight"):
        del tensors[f"mtp.layers.0.{name}"]
    assert problems_of(tensors, mtp_num_layers=1) == [
        "mtp.layers.0.mlp.shared_expert_gate.weight needs mtp.layers.0.transformer_layer.mlp."
        "shared_experts.gate_weight, which the checkpoint does not hold",
        "mtp.pre_fc_norm_embedding.weight needs mtp.layers.0.enorm.weight, which the checkpoint "
        "does not hold",
    ]


def test_one_layer_for_multi_token_prediction_at_most(fixtures: Mapping[str, Fixture]) -> None:
    tensors, _ = canonical(fixtures[PREDICTS])
    again = {
        name.replace("mtp.layers.0.", "mtp.layers.1."): view
        for name, view in tensors.items()
        if name.startswith("mtp.")
    }
    (problem,) = problems_of({**tensors, **again}, mtp_num_layers=2)
    assert problem.startswith("it has 2 layers for multi-token prediction, each with an eh_proj of")


def test_multi_token_prediction_of_slimes_qwen3_next_is_refused(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """It swaps the halves of eh_proj, in some versions and modes; of Qwen3.5 it does not."""
    root = with_args(fixtures[PREDICTS], tmp_path / "next", hf_checkpoint="Qwen/Qwen3-Next")
    (problem,) = refusal(lambda: load(root, Options(family="qwen3_next")))
    assert problem.startswith("slime trained it, which swaps the halves of mtp.layers.0.eh_proj")
    assert load(root, Options(family="qwen3_5_moe_text")).config["mtp_num_hidden_layers"] == 1
    root = with_args(fixtures[NEXT], tmp_path / "without", hf_checkpoint="Qwen/Qwen3-Next")
    assert load(root, Options()).config["num_nextn_predict_layers"] == 0


def test_the_norm_of_a_gated_delta_net_is_not_around_zero(fixtures: Mapping[str, Fixture]) -> None:
    """(w + 1) of what training made of it, rounded once, for all bits that it may have."""
    tensors, _ = canonical(fixtures[NEXT])
    facts, _, _ = gather(tensors, {"linear_num_key_heads": 2}, NO_REFERENCE, 301)
    planned = {tensor.name: tensor for tensor in plan(QWEN3_NEXT, tensors, facts)[0]}
    norm = planned["model.layers.0.linear_attn.norm.weight"].view
    assert type(norm).__name__ == "Add"
    assert norm.sources == (tensors[AT + "out_norm.weight"],)
    assert planned["model.layers.0.input_layernorm.weight"].view is not norm


def test_a_model_of_experts_is_qwen3_next_unless_something_tells(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """megatron-core holds both alike, and they compute the same."""
    mrope = load(fixtures[EXPERTS].root, Options()).choice
    assert mrope.family.name == "qwen3_5_moe_text"
    root = with_args(fixtures[EXPERTS], tmp_path, position_embedding_type="rope", mrope_section=...)
    choice = load(root, Options()).choice
    assert choice.family.name == "qwen3_next"
    assert choice.evidence[-1] == "not qwen3_5_moe_text: mrope_section is not set"
    named = load(root, Options(family="qwen3_5_moe_text"))
    assert named.choice.family.name == "qwen3_5_moe_text"
    served = {tensor.name for tensor in named.tensors}
    assert "model.layers.0.linear_attn.in_proj_b.weight" in served
    assert load(fixtures[DENSE].root, Options()).choice.family.name == "qwen3_5_text"


# -- ms-swift -------------------------------------------------------------------------------------


def grouped(*sections: Tensor) -> Tensor:
    """As mcore-bridge:src/mcore_bridge/bridge/gpt_bridge.py _set_linear_in_proj has them."""
    heads = [section.reshape(KEY_HEADS, -1, *section.shape[1:]) for section in sections]
    return torch.cat(heads, dim=1).flatten(0, 1)


def each_gate_behind_its_query(qkv: Tensor) -> Tensor:
    """As mcore-bridge:src/mcore_bridge/model/modules/gated_self_attention.py takes them apart."""
    groups = [
        torch.cat([rows[[0, 2, 1, 3]].flatten(0, 1), others.flatten(0, 1)])
        for rows, others in ((group[:4], group[4:]) for group in qkv.view(4, 6, 16, -1))
    ]  # two queries, their two gates, key, value
    return torch.cat(groups)


def modules_of(state: State) -> list[str]:
    """Where its gated delta nets are."""
    return sorted(fqn.removesuffix("A_log") for fqn in state if fqn.endswith("A_log"))


def with_gates_of_ms_swift(state: State) -> None:
    for fqn in [fqn for fqn in state if fqn.endswith("linear_qkv.weight")]:
        state[fqn] = each_gate_behind_its_query(state[fqn])


def as_ms_swift_has_it(state: State) -> None:
    for module in modules_of(state):
        for layer, sections in (("in_proj", IN_PROJ), ("conv1d", IN_PROJ[:3])):
            held = [state.pop(f"{module}{layer}.weight.{section}") for section in sections]
            state[f"{module}{layer}.weight"] = grouped(*held)
        norm = state[module + "out_norm.weight"]
        state[module + "out_norm.weight"] = (norm.float() + 1).to(norm.dtype)
    with_gates_of_ms_swift(state)


def decoupled(state: State) -> None:
    """As ms-swift's linear_decoupled_in_proj has them."""
    as_ms_swift_has_it(state)
    for module in modules_of(state):
        heads = state.pop(f"{module}in_proj.weight").unflatten(0, (KEY_HEADS, -1))
        state[f"{module}in_proj_qkvz.weight"] = heads[:, :-4].flatten(0, 1)
        state[f"{module}in_proj_ba.weight"] = heads[:, -4:].flatten(0, 1)
        norm = state.pop(f"{module}in_proj.layer_norm_weight")
        state[module.replace("self_attention.", "input_layernorm.weight")] = norm


def with_transformers_module(fixture: Fixture, inside: str, fused_norms: bool) -> Any:
    """With `linear_attn` of the Hugging Face model in place of megatron-core's gated delta nets,
    `inside` self_attention; norms that are part of the linear layer behind them, or all apart."""
    oracle = {
        name: tensor
        for file in fixture.hf.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }

    def change(state: State) -> None:
        for module in modules_of(state):
            layer = module.split(".")[2]
            norm = state[f"{module}in_proj.layer_norm_weight"]
            for fqn in [fqn for fqn in state if fqn.startswith(module)]:
                del state[fqn]
            at = f"model.layers.{layer}.linear_attn."
            for name in [name for name in oracle if name.startswith(at)]:
                state[module + inside + name.removeprefix(at)] = oracle[name]
            if inside:
                state[module + "input_layernorm.weight"] = norm
            else:
                state[f"decoder.layers.{layer}.input_layernorm.weight"] = norm
        for fqn in [fqn for fqn in state if fqn.endswith(".layer_norm_weight") and not fused_norms]:
            place, _, linear = fqn.removesuffix(".layer_norm_weight").rpartition(".")
            name = {"linear_qkv": "input_layernorm", "linear_fc1": "pre_mlp_layernorm"}[linear]
            state[f"{place.rpartition('.')[0]}.{name}.weight"] = state.pop(fqn)
        if not inside:
            with_gates_of_ms_swift(state)

    return change


def as_ms_swift_saves(fixture: Fixture, directory: Path) -> Path:
    """The fixture with its gated delta nets as ms-swift's module holds them."""
    return saved_anew(fixture, with_args(fixture, directory, tuner_type="full"), as_ms_swift_has_it)


def is_served_whole(root: Path, fixture: Fixture) -> None:
    model = load(root, Options())
    assert model.choice.family.name == fixture.spec.family
    tree, _ = build(model, fixture.spec.hf_max_shard_size or "50GB", 1 << 20)
    files = sorted(fixture.hf.glob("*.safetensors"))
    assert files
    for file in files:
        assert read_all(tree.files[file.name]) == file.read_bytes(), file.name


@pytest.mark.parametrize("name", [DENSE, EXPERTS, DENSE_PREDICTS])
def test_the_rows_of_ms_swift(fixtures: Mapping[str, Fixture], name: str, tmp_path: Path) -> None:
    is_served_whole(as_ms_swift_saves(fixtures[name], tmp_path), fixtures[name])


@pytest.mark.parametrize("name", [DENSE, NEXT])
def test_ms_swifts_linear_layers_in_two(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    root = with_args(fixtures[name], tmp_path, tuner_type="full")
    is_served_whole(saved_anew(fixtures[name], root, decoupled), fixtures[name])


@pytest.mark.parametrize("name", [NEXT, DENSE, DENSE_PREDICTS])
def test_transformers_module_in_ms_swift(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    """Its norms are around zero by themselves: 3.x records that megatron-core's are not."""
    fixture = fixtures[name]
    swift = {"train_type": "full", "apply_layernorm_1p": False}
    root = with_args(fixture, tmp_path, **swift, experimental_attention_variant=...)
    is_served_whole(
        saved_anew(fixture, root, with_transformers_module(fixture, "", fused_norms=False)), fixture
    )


@pytest.mark.parametrize("name", [NEXT, EXPERTS, DENSE])
def test_transformers_module_in_slime(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    fixture = fixtures[name]
    root = with_args(fixture, tmp_path, hf_checkpoint="Qwen/x", experimental_attention_variant=...)
    change = with_transformers_module(fixture, "linear_attn.", fused_norms=True)
    is_served_whole(saved_anew(fixture, root, change), fixture)


def test_norms_of_old_versions_of_ms_swift_are_refused(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures[NEXT]
    root = with_args(fixture, tmp_path, train_type="full", apply_layernorm_1p=False)
    saved_anew(fixture, root, with_transformers_module(fixture, "", fused_norms=True))
    (problem,) = refusal(lambda: load(root, Options()))
    assert "ms-swift added 1 to their weights before 3.12" in problem


def test_the_rows_of_ms_swift_taken_for_megatron_cores_are_seen(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    root = as_ms_swift_saves(fixtures[DENSE], tmp_path / "swift")
    args = dict(TorchDist().index(root / fixtures[DENSE].iteration.name).args)
    del args["tuner_type"]
    common = root / fixtures[DENSE].iteration.name / "common.pt"
    torch.save({"args": Namespace(**args), "checkpoint_version": 3.0}, common)
    problems = refusal(lambda: load(root, Options()))
    assert any("lie in an order that nothing tells" in problem for problem in problems)
