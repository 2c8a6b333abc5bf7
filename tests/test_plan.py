"""Which family a checkpoint is, and every way in which it can fail to be one: all told at once."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from mcorefs import catalog
from mcorefs.boxes import Box, Shape
from mcorefs.dtypes import BF16, BY_NAME, F32
from mcorefs.errors import MappingError
from mcorefs.formats.torch_dist import TorchDist
from mcorefs.index import Chunk, Span, stored_tensor
from mcorefs.mapping.blocks.attention import (
    fused_qkv,
    head_gamma,
    in_halves,
    key,
    query,
    value,
)
from mcorefs.mapping.blocks.delta_net import zero_centred
from mcorefs.mapping.blocks.indexer import index_gamma
from mcorefs.mapping.blocks.model import gamma
from mcorefs.mapping.choose import Choice, choose
from mcorefs.mapping.facts import gather
from mcorefs.mapping.families import FAMILIES
from mcorefs.mapping.families.olmoe import OLMOE
from mcorefs.mapping.families.phi3 import PHI3
from mcorefs.mapping.families.qwen3 import QWEN3
from mcorefs.mapping.families.qwen3_moe import QWEN3_MOE
from mcorefs.mapping.family import Family, Rule
from mcorefs.mapping.plan import natural_key, plan
from mcorefs.mapping.reference import NO_REFERENCE, Reference
from mcorefs.model import Options, load
from mcorefs.names import VISION
from mcorefs.views import Stored, View
from tests.checkpoints import Fixture, ensure
from tests.checkpoints.families import FAMILIES as FIXTURES
from tests.checkpoints.families import family_to_name
from tests.edited import rename, with_args

Tensors = dict[str, View]


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure(["qwen3", "qwen3_moe", "qwen3_moe-mixed-pp2"])


def canonical(fixture: Fixture) -> Tensors:
    return dict(catalog.build(TorchDist().index(fixture.iteration).tensors).tensors)


@pytest.fixture
def dense(fixtures: Mapping[str, Fixture]) -> Tensors:
    return canonical(fixtures["qwen3"])


@pytest.fixture
def moe(fixtures: Mapping[str, Fixture]) -> Tensors:
    return canonical(fixtures["qwen3_moe"])


def unread(shape: Shape, dtype: str = "BF16") -> View:
    """A tensor of `shape` whose values nobody asks for."""
    whole = Box.whole(shape)
    span = Span("unread", 0, whole.volume * BY_NAME[dtype].itemsize)
    tensor, problem = stored_tensor("x", BY_NAME[dtype], shape, (Chunk(whole, span),))
    assert tensor is not None, problem
    return Stored(tensor)


LAYER = "decoder.layers.2."


def chosen(
    tensors: Tensors,
    named: str | None = None,
    reference: Reference = NO_REFERENCE,
    hint: str | None = None,
    **args: object,
) -> Choice:
    """The family of `tensors` trained with `args`."""
    facts, _, _ = gather(tensors, args, reference, 307)
    return choose(tensors, facts, named, reference, hint)


def problems_of(tensors: Tensors, **args: object) -> list[str]:
    """What gathering and planning say of `tensors`, as Qwen3 or, with a router, as Qwen3-MoE."""
    family = QWEN3_MOE if any(".router." in name for name in tensors) else QWEN3
    facts, _, problems = gather(tensors, args, NO_REFERENCE, 307)
    return [*problems, *plan(family, tensors, facts)[1]]


# -- planning -------------------------------------------------------------------------------------


def test_no_problem_with_a_whole_model(dense: Tensors, moe: Tensors) -> None:
    assert problems_of(dense) == problems_of(moe) == []


def test_a_missing_tensor_names_what_needs_it(dense: Tensors) -> None:
    del dense[LAYER + "self_attention.linear_proj.weight"]
    (problem,) = problems_of(dense)
    assert problem == (
        "model.layers.2.self_attn.o_proj.weight needs decoder.layers.2.self_attention.linear_proj."
        "weight, which the checkpoint does not hold"
    )


def test_alternatives_are_all_named(moe: Tensors) -> None:
    del moe[LAYER + "pre_mlp_layernorm.weight"]
    (problem,) = problems_of(moe)
    assert "mlp.linear_fc1.layer_norm_weight or decoder.layers.2.pre_mlp_layernorm" in problem


def test_many_of_one_kind_are_one_line(dense: Tensors, moe: Tensors) -> None:
    for layer in range(4):
        del dense[f"decoder.layers.{layer}.self_attention.k_layernorm.weight"]
        dense[f"decoder.layers.{layer}.self_attention.linear_qkv.bias"] = unread((256,))
    lacks, holds = problems_of(dense)
    assert "layers.0.self_attn.k_norm.weight needs" in lacks
    assert lacks.endswith("(and 3 more like it)")
    assert "holds decoder.layers.0.self_attention.linear_qkv.bias" in holds
    assert holds.endswith("(and 3 more like it)")
    for layer, expert in itertools.product(range(4), range(1, 8)):
        del moe[f"decoder.layers.{layer}.mlp.experts.{expert}.linear_fc2.weight"]
    (problem,) = problems_of(moe)
    assert "experts.1.down_proj.weight needs" in problem
    assert problem.endswith("(and 27 more like it)")


def test_a_tensor_without_a_place_is_a_problem(dense: Tensors) -> None:
    dense["decoder.layers.1.mlp.adaptor.weight"] = dense["mtp.layers.0.eh_proj.weight"] = unread(
        (2,)
    )
    problems = problems_of(dense)
    for name in ("decoder.layers.1.mlp.adaptor.weight", "mtp.layers.0.eh_proj.weight"):
        hint = " (--no-mtp leaves it out)" if name.startswith("mtp.") else ""
        text = f"the checkpoint holds {name}, which this family has no place for{hint}"
        assert text in problems


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        (
            LAYER + "self_attention.linear_proj.weight",
            (64, 64),
            "layers.2.self_attn.o_proj.weight has shape [64, 64], expected [64, 128] (hidden x q_",
        ),
        (
            LAYER + "mlp.linear_fc1.weight",
            (192, 32),
            "layers.2.mlp.gate_proj.weight has shape [96, 32], expected [96, 64] (ffn x hidden)",
        ),
        (
            LAYER + "self_attention.linear_qkv.weight",
            (255, 64),
            "layers.2.self_attn.q_proj.weight cannot be made from its source [255, 64]: unflatten",
        ),
        (
            LAYER + "self_attention.q_layernorm.weight",
            (1,),
            "layers.2.self_attn.q_norm.weight has shape [1], expected [16] (head_dim)",
        ),
        (
            "output_layer.weight",
            (300, 64),
            "lm_head.weight cannot be made from its source [300, 64]",
        ),
        (
            "decoder.final_layernorm.weight",
            (64, 1),
            "model.norm.weight has shape [64, 1], expected",
        ),
        ("decoder.final_layernorm.weight", (), "model.norm.weight has shape [], expected [64]"),
    ],
)
def test_wrong_shapes(dense: Tensors, name: str, shape: Shape, problem: str) -> None:
    dense[name] = unread(shape)
    assert any(problem in found for found in problems_of(dense))


def test_experts_that_differ_in_size(moe: Tensors) -> None:
    moe[LAYER + "mlp.experts.5.linear_fc1.weight"] = unread((64, 64))
    moe[LAYER + "mlp.router.weight"] = unread((7, 64))
    problems = problems_of(moe)
    assert any("experts.5.gate_proj.weight has shape [32, 64], expected [48" in p for p in problems)
    assert any("2.mlp.gate.weight has shape [7, 64], expected [8, 64]" in p for p in problems)


def test_what_is_no_number_cannot_be_cast(dense: Tensors) -> None:
    dense["decoder.final_layernorm.weight"] = unread((64,), "I32")
    facts, _, _ = gather(dense, {}, NO_REFERENCE, 307)
    _, problems = plan(QWEN3, dense, facts, F32)
    assert problems == ["model.norm.weight cannot be made from its source [64]: to F32 from I32"]
    assert plan(QWEN3, dense, facts)[1] == []


def test_the_router_is_not_cast(moe: Tensors) -> None:
    facts, _, _ = gather(moe, {}, NO_REFERENCE, 301)
    dtypes = {t.name: t.dtype for t in plan(QWEN3_MOE, moe, facts, F32)[0]}
    routers = {name for name in dtypes if name.endswith("mlp.gate.weight")}
    assert {dtypes.pop(name) for name in routers} == {BF16}
    assert set(dtypes.values()) == {F32}


def test_natural_order_is_transformers_own(moe: Tensors) -> None:
    from transformers.core_model_loading import dot_natural_key

    facts, _, _ = gather(moe, {}, NO_REFERENCE, 301)
    names = [f"{t.name.replace('layers.1.', 'layers.10.')}" for t in plan(QWEN3_MOE, moe, facts)[0]]
    random.Random(1).shuffle(names)
    assert sorted(names, key=natural_key) == sorted(names, key=dot_natural_key)


# -- facts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "claim", "shown"),
    [
        ("hidden_size", 128, 64),
        ("num_layers", 5, 4),
        ("num_attention_heads", 16, 8),
        ("kv_channels", 8, 16),
        ("padded_vocab_size", 512, 384),
        ("num_experts", 16, 8),
        ("num_moe_experts", 16, 8),
        ("moe_ffn_hidden_size", 96, 48),
    ],
)
def test_args_that_contradict_shapes(moe: Tensors, argument: str, claim: int, shown: int) -> None:
    (problem,) = problems_of(moe, **{argument: claim})
    assert problem == (
        f"{argument} is {claim} in the training arguments but the tensor shapes say {shown}"
    )


def test_groups_count_only_with_group_query_attention(dense: Tensors) -> None:
    """num_query_groups is 1 by default, even where there are none."""
    assert problems_of(dense, num_query_groups=1, group_query_attention=False) == []
    (problem,) = problems_of(dense, num_query_groups=1, group_query_attention=True)
    assert problem.startswith("num_query_groups is 1 in the training arguments but the tensor")


def test_expert_size_defaults_to_the_dense_size(moe: Tensors) -> None:
    assert problems_of(moe, ffn_hidden_size=48) == []
    (problem,) = problems_of(moe, ffn_hidden_size=96)
    assert problem.startswith("ffn_hidden_size is 96 in the training arguments")
    assert problems_of(moe, ffn_hidden_size=96, moe_ffn_hidden_size=48) == []


def test_layers_that_are_missing(dense: Tensors) -> None:
    without = {name: view for name, view in dense.items() if ".layers.1." not in name}
    problems = problems_of(without)
    assert "layers [1] hold no tensor at all although layer 3 does" in problems
    only_three = {name: view for name, view in dense.items() if ".layers.3." not in name}
    (problem,) = problems_of(only_three, num_layers=4)
    assert problem.startswith(
        "num_layers is 4 in the training arguments but the tensor shapes say 3"
    )


def test_an_absurd_layer_number_is_no_endless_loop(dense: Tensors) -> None:
    dense[f"decoder.layers.{10**15}.mlp.linear_fc1.weight"] = unread((192, 64))
    problems = problems_of(dense)
    assert f"a tensor is named after layer {10**15}: the checkpoint is damaged" in problems


def test_head_size_needs_a_source(dense: Tensors) -> None:
    """Without q/k norms only args or a reference know it."""
    plain = {name: view for name, view in dense.items() if "_layernorm.weight" not in name}
    _, _, problems = gather(plain, {}, NO_REFERENCE)
    assert any("number of attention heads is recorded nowhere" in p for p in problems)
    sources: tuple[dict[str, object], ...] = ({"num_attention_heads": 8}, {"kv_channels": 16})
    for args in sources:
        assert gather(plain, args, NO_REFERENCE)[0].dims["head_dim"] == 16
    for reference in ({"num_attention_heads": 8}, {"head_dim": 16}):
        facts, _, problems = gather(plain, {}, Reference(reference, "--hf-config"))
        assert (facts.dims["heads"], facts.dims["groups"], facts.dims["kv_rows"]) == (8, 4, 64)


@pytest.mark.parametrize(("rows", "columns"), [(257, 128), (128, 128), (64, 128), (256, 120)])
def test_head_counts_that_no_size_explains(dense: Tensors, rows: int, columns: int) -> None:
    for layer in range(4):
        at = f"decoder.layers.{layer}.self_attention."
        dense[at + "linear_qkv.weight"] = unread((rows, 64))
        dense[at + "linear_proj.weight"] = unread((64, columns))
    problems = problems_of(dense)
    assert any("no number of heads of size 16 explains" in p for p in problems)


def test_heads_must_share_groups_evenly(dense: Tensors) -> None:
    for layer in range(4):  # 8 heads, 3 groups
        dense[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"] = unread((224, 64))
    assert "8 heads cannot share 3 query groups" in problems_of(dense)


def test_a_model_without_its_first_stage(dense: Tensors) -> None:
    del dense["embedding.word_embeddings.weight"]
    problems = problems_of(dense)
    assert any("embedding.word_embeddings.weight is missing or is no matrix" in p for p in problems)


# -- the family -----------------------------------------------------------------------------------


def test_the_family_is_seen_with_its_evidence(
    fixtures: Mapping[str, Fixture], dense: Tensors, moe: Tensors
) -> None:
    mixed = canonical(fixtures["qwen3_moe-mixed-pp2"])
    for tensors, family in ((dense, QWEN3), (moe, QWEN3_MOE), (mixed, QWEN3_MOE)):
        found = chosen(tensors)
        assert found.family is family
        assert "has decoder.layers.*.self_attention.k_layernorm.weight" in found.evidence
        assert len(found.evidence) <= 5
    assert "has decoder.layers.*.mlp.router.weight" in found.evidence


@pytest.mark.parametrize(
    ("extra", "family"),
    [
        ("decoder.layers.0.mlp.shared_experts.linear_fc1.weight", "qwen3_moe"),
        ("decoder.layers.0.mlp.router.bias", "qwen3_moe"),
        ("mtp.layers.0.enorm.weight", "qwen3"),
    ],
)
def test_near_misses_are_told(fixtures: Mapping[str, Fixture], extra: str, family: str) -> None:
    tensors = {**canonical(fixtures[family]), extra: unread((8,))}
    with pytest.raises(MappingError) as caught:
        chosen(tensors)
    assert "no supported model family fits" in str(caught.value)
    assert "--family NAME or --hf-config DIR" in str(caught.value)
    assert len(caught.value.problems) == 5
    assert caught.value.problems[0].startswith(f"{family}: has ")  # the nearest comes first
    assert extra.replace(".0.", ".*.") in caught.value.problems[0]


@pytest.mark.parametrize("name", [name for family in FIXTURES.values() for name in family.specs])
def test_each_family_is_seen_by_itself(name: str) -> None:
    fixture = ensure([name])[name]
    family = family_to_name(fixture.spec)
    if fixture.spec.needs_reference:  # its tensors tell the family, but not all of its config
        (name,) = json.loads((fixture.hf / "config.json").read_bytes())["architectures"]
        with pytest.raises(MappingError, match=f"as {name}:"):
            load(fixture.root, Options())
        return
    assert load(fixture.root, Options(family=family)).choice.family.name == fixture.spec.family


def test_what_only_a_name_tells_from_llama_is_served_as_llama() -> None:
    """And computes the same: Phi-3's tensors are Llama's one above the other, and what ERNIE holds
    as neighbours Llama has as halves."""
    names = ("phi3-tp2", "ernie4_5-tp2")
    for name, fixture in ensure(names).items():
        model = load(fixture.root, Options())
        assert model.choice.family.name == "llama"
        told = f"not {fixture.spec.family}: only its name tells it apart (--family, --hf-config)"
        assert told in model.choice.evidence, name
        given = load(fixture.root, Options(hf_config=fixture.hf))
        assert given.choice.family.name == fixture.spec.family
    partial = ensure(["torch-phi3-tp2"])["torch-phi3-tp2"]
    with pytest.raises(MappingError, match="several model families fit") as caught:
        load(partial.root, Options())
    assert any("phi3: only its name" in problem for problem in caught.value.problems)


def test_hy_v3_without_its_name_is_served_as_glm4_moe() -> None:
    """And computes the same."""
    model = load(ensure(["hy_v3-tp2-ep2"])["hy_v3-tp2-ep2"].root, Options())
    assert model.choice.family.name == "glm4_moe"
    told = "not hy_v3: only its name tells it apart (--family, --hf-config)"
    assert told in model.choice.evidence


def test_norms_of_minimax_m2_have_names_of_their_own_in_ms_swift() -> None:
    tensors = canonical(ensure(["minimax_m2-tp2-ep2"])["minimax_m2-tp2-ep2"])
    swift = {re.sub(r"\.([qk])_layernorm\.", r".\1_norm.", name): v for name, v in tensors.items()}
    assert not set(swift) >= set(tensors)
    planned = [
        plan(family, tensors, facts)
        for tensors in (tensors, swift)
        for facts in [gather(tensors, {"kv_channels": 16}, NO_REFERENCE, 301)[0]]
        for family in [choose(tensors, facts, None, NO_REFERENCE).family]
    ]
    assert planned[0] == planned[1]
    assert planned[1][1] == []


def test_heads_of_phi3_fill_the_hidden_size(dense: Tensors) -> None:
    plain = {name: view for name, view in dense.items() if not re.search(r"[qk]_layernorm", name)}
    facts, _, _ = gather(plain, {"num_attention_heads": 8}, NO_REFERENCE, 307)
    (problem,) = plan(PHI3, plain, facts)[1]
    assert "fill the hidden size of 64, and are not 128 rows" in problem


def of_language(family: Family) -> list[Rule]:
    """The rules of the language model: what sees for it is built the same for every run."""
    return [rule for rule in family.rules if not rule.sources[0].startswith(VISION)]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_is_rotated_together_is_nobodys_oversight(family: Family) -> None:
    """Each q and k is put in the order of transformers, or the family says which Megatron has."""
    positions = family.requires.get("position_embedding_type")
    if "rotary_interleaved" in family.requires or positions in (("learned_absolute",), ("none",)):
        return
    sources = re.compile(r"self_attention\.(linear_qkv\.(weight|bias)|[qk]_layernorm\.weight)$")
    rules = [rule for rule in of_language(family) if any(map(sources.search, rule.sources))]
    blocks = {rule.block for rule in rules} - {value}
    assert blocks
    aware = {query, key, in_halves, head_gamma}
    # Those of these two are made of the first ones (tests/test_olmoe.py).
    assert blocks <= aware | {fused_qkv} or family in (PHI3, OLMOE)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_norms_around_zero_are_nobodys_oversight(family: Family) -> None:
    """Each norm has 1 added, or the family says what its norms are to be. That in a Mamba mixer is
    never around zero (Megatron-LM:megatron/core/ssm/mamba_mixer.py ExtendedRMSNorm)."""
    norms = [
        rule
        for rule in of_language(family)
        if any(re.search(r"norm[._]weight$", source) for source in rule.sources)
        and not rule.sources[0].endswith("mixer.norm.weight")
    ]
    assert norms
    names = ("layernorm_zero_centered_gamma", "apply_layernorm_1p")
    known = (gamma, head_gamma, index_gamma)
    said = all(len(family.requires.get(name, ())) == 1 for name in names)
    if not said and zero_centred not in family.checks:
        assert [rule.hf for rule in norms if rule.block not in known] == []


def test_arguments_tell_families_with_the_same_tensors_apart(tmp_path: Path) -> None:
    fixture = ensure(["mistral-tp2"])["mistral-tp2"]
    tensors = canonical(fixture)
    found = chosen(tensors, window_size=[7, 0], num_attention_heads=8)
    assert found.family.name == "mistral"
    (llama,) = [reason for reason in found.evidence if reason.startswith("not llama")]
    assert "not llama: the model was trained with window_size=[7, 0]" in llama
    found = chosen(tensors, num_attention_heads=8)
    assert found.family.name == "llama"
    assert "not mistral: window_size is not set" in found.evidence
    assert chosen(tensors, "mistral").family.name == "mistral"


def test_a_gate_of_gelu_is_no_swiglu() -> None:
    """Gemma's tensors are Llama's."""
    tensors = canonical(ensure(["gemma-tp2"])["gemma-tp2"])
    known: dict[str, object] = {"num_attention_heads": 8, "layernorm_zero_centered_gamma": True}
    gated = {**known, "swiglu": False, "gated_linear_unit": True}

    def choice(args: Mapping[str, object], hint: str | None = None) -> str:
        facts, _, _ = gather(tensors, args, NO_REFERENCE, 307)
        return choose(tensors, facts, None, NO_REFERENCE, hint).family.name

    assert choice({**gated, "activation_func": "fast_gelu"}, hint="gemma") == "gemma"
    assert choice({**known, "swiglu": True}) == choice(known) == "llama"
    with pytest.raises(MappingError, match="several model families fit"):
        choice({**gated, "activation_func": "fast_gelu"})  # is the embedding scaled?
    for other in ("gelu", "quick_gelu", "mish"):
        args = {**gated, "activation_func": other}
        facts, _, _ = gather(tensors, args, NO_REFERENCE, 307)
        for family in FAMILIES:
            assert plan(family, tensors, facts)[1], family.name


def test_biases_tell_families_apart() -> None:
    llama = canonical(ensure(["llama-tp2-biased"])["llama-tp2-biased"])
    kept = re.compile(r"linear_(proj|fc[12])\.bias$")
    qwen2 = {name: view for name, view in llama.items() if not kept.search(name)}
    assert chosen(llama).family.name == "llama"
    assert chosen(qwen2).family.name == "qwen2"
    some = {
        name: view for name, view in llama.items() if ".2.self_attention.linear_proj.b" not in name
    }
    facts, _, _ = gather(some, {"num_attention_heads": 8}, NO_REFERENCE, 307)
    (problem,) = plan(chosen(some).family, some, facts)[1]
    assert problem == (
        "model.layers.2.self_attn.o_proj.bias needs decoder.layers.2.self_attention.linear_proj."
        "bias, which the checkpoint does not hold"
    )


def without(tensors: Tensors, pattern: str) -> Tensors:
    return {name: view for name, view in tensors.items() if not re.search(pattern, name)}


def test_tensors_tell_mixtures_of_experts_apart(moe: Tensors) -> None:
    assert chosen(moe).family.name == "qwen3_moe"
    plain = without(moe, r"\.[qk]_layernorm\.")
    assert chosen(plain, num_attention_heads=8).family.name == "mixtral"
    qwen2_moe = canonical(ensure(["qwen2_moe-tp2-mixed"])["qwen2_moe-tp2-mixed"])
    assert chosen(qwen2_moe, num_attention_heads=8).family.name == "qwen2_moe"
    olmoe = canonical(ensure(["olmoe-normalised"])["olmoe-normalised"])
    found = chosen(olmoe, num_attention_heads=8)
    assert found.family.name == "olmoe"
    assert "has shape [64], expected [8] (head_dim)" in found.evidence[-1]
    glm4_moe = canonical(ensure(["glm4_moe-tp2-ep2"])["glm4_moe-tp2-ep2"])
    for tensors in (glm4_moe, without(glm4_moe, r"\.[qk]_layernorm\.|linear_qkv\.bias")):
        assert chosen(tensors, num_attention_heads=8).family.name == "glm4_moe"
    alone = without(qwen2_moe, r"shared_experts\.gate_weight")
    with pytest.raises(MappingError, match="no supported model family fits") as caught:
        chosen(alone, num_attention_heads=8)
    assert caught.value.problems[0] == (
        "qwen2_moe: lacks decoder.layers.*.mlp.shared_experts.gate_weight"
    )


def test_a_layer_for_multi_token_prediction_is_whole() -> None:
    name = "glm4_moe-tp2-ep2-mtp"
    tensors = canonical(ensure([name])[name])
    found = chosen(tensors, num_attention_heads=8, mtp_num_layers=1)
    assert found.family.name == "glm4_moe"
    lacking = without(tensors, r"mtp.*(hnorm|linear_fc2|expert_bias)")
    facts, _, _ = gather(lacking, {"num_attention_heads": 8}, NO_REFERENCE, 307)
    lacks = [problem for problem in plan(found.family, lacking, facts)[1] if "needs" in problem]
    assert len(lacks) == 4
    for text in (
        "model.layers.4.hnorm.weight needs mtp.layers.0.hnorm.weight",
        "model.layers.4.mlp.experts.0.down_proj.weight needs mtp.layers.0.transformer_layer.mlp",
        "model.layers.4.mlp.shared_experts.down_proj.weight needs mtp.layers.0.transformer_layer",
        "model.layers.4.mlp.gate.e_score_correction_bias needs mtp.layers.0.transformer_layer",
    ):
        assert any(problem.startswith(text) for problem in lacks), text


def test_mixtral_has_experts_in_every_layer(fixtures: Mapping[str, Fixture]) -> None:
    mixed = without(canonical(fixtures["qwen3_moe-mixed-pp2"]), r"\.[qk]_layernorm\.")
    with pytest.raises(MappingError, match="no supported model family fits") as caught:
        chosen(mixed, num_attention_heads=8)
    problems = dict(problem.split(": ", 1) for problem in caught.value.problems)
    assert "has decoder.layers.*.mlp.linear_fc1.weight" in problems["mixtral"]


def test_what_still_speaks_against_the_nearest_is_for_planning_to_tell(dense: Tensors) -> None:
    """No family takes these arguments: the one they contradict least is chosen, and refuses."""
    plain = {
        name: view
        for name, view in dense.items()
        if "q_layernorm" not in name and "k_layernorm" not in name
    }
    found = chosen(plain, normalization="LayerNorm", num_attention_heads=8)
    assert found.family.name == "llama"


def test_several_that_fit_are_told(dense: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = replace(QWEN3, name="qwen3_twin")
    monkeypatch.setattr("mcorefs.mapping.choose.FAMILIES", (QWEN3, twin))
    with pytest.raises(MappingError, match="several model families fit") as caught:
        chosen(dense)
    assert caught.value.problems == ("qwen3: fits", "qwen3_twin: fits")
    assert chosen(dense, "qwen3_twin").family is twin


def test_the_user_and_the_reference_name_the_family(dense: Tensors) -> None:
    assert chosen(dense, "qwen3_moe").family is QWEN3_MOE
    assert chosen(dense, "Qwen3MoeForCausalLM").evidence == ("--family Qwen3MoeForCausalLM",)
    found = chosen(dense, None, Reference({"model_type": "qwen3_moe"}, "--hf-config"))
    assert found.evidence == ("model_type qwen3_moe in --hf-config",)
    assert chosen(dense, "qwen3", Reference({"model_type": "qwen3"}, "--hf-config")).family is QWEN3
    with pytest.raises(MappingError, match="--family is 'bloom', which is not supported yet"):
        chosen(dense, "bloom")
    with pytest.raises(
        MappingError, match="--family is qwen3 but model_type in --hf-config is qwen3_"
    ):
        chosen(dense, "qwen3", Reference({"model_type": "qwen3_moe"}, "--hf-config"))


def test_a_trainer_hints_at_the_family(dense: Tensors) -> None:
    found = chosen(dense, hint="qwen3_moe")
    assert found.family is QWEN3_MOE
    assert found.evidence == ("the trainer names model_type qwen3_moe",)
    assert chosen(dense, hint="a type of its own").family is QWEN3
    assert chosen(dense, "qwen3", hint="qwen3_moe").family is QWEN3


def test_a_wrong_family_cannot_pass(fixtures: Mapping[str, Fixture]) -> None:
    with pytest.raises(MappingError) as caught:
        load(fixtures["qwen3_moe"].root, Options(family="qwen3"))
    assert any(
        "mlp.router.weight, which this family has no place for" in p for p in caught.value.problems
    )
    with pytest.raises(MappingError) as caught:
        load(fixtures["qwen3"].root, Options(family="qwen3_moe"))
    assert any("num_experts is unknown" in problem for problem in caught.value.problems)


# -- everything at once ---------------------------------------------------------------------------


def test_all_problems_of_a_checkpoint_come_in_one_error(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    root = with_args(
        fixtures["qwen3"],
        tmp_path,
        num_layers=6,
        rotary_percent=0.5,
        rotary_base=...,
        tokenizer_model="nowhere",
    )
    names = {
        "decoder.layers.self_attention.linear_proj.weight": "decoder.layers.typo.weight",
        "decoder.final_layernorm.weight": "decoder.layers.mlp.linear_fc1.weight_w",
    }
    rename(root / "iter_0000100", lambda fqn: names.get(fqn, fqn))
    with pytest.raises(MappingError) as caught:
        load(root, Options(family="qwen3", vocab_size=9999, require_tokenizer=True))
    expected = (
        "--vocab-size is 9999 but the embedding has 384 rows",
        "num_layers is 6 in the training arguments but the tensor shapes say 4",
        "linear_fc1.weight_v is missing beside its other half",
        "o_proj.weight needs decoder.layers.0.self_attention.linear_proj.weight",
        "model.norm.weight needs decoder.final_layernorm.weight",
        "holds decoder.layers.0.typo.weight, which this family has no place for",
        "trained with rotary_percent=0.5",
        "rope_theta is unknown: no argument says",
        "--require-tokenizer: none found in",
    )
    for text in expected:
        assert any(text in problem for problem in caught.value.problems), text
    assert str(root / "iter_0000100") in str(caught.value)
    assert "Qwen3ForCausalLM" in str(caught.value)
