"""Multi-latent attention and multi-token prediction: what shapes prove, what config.json says."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import mcorefs
from mcorefs import catalog
from mcorefs.errors import MappingError
from mcorefs.formats.torch_dist import TorchDist
from mcorefs.mapping.blocks.mla import MLA_KEYS, yarn_expressed
from mcorefs.mapping.facts import gather
from mcorefs.mapping.families.deepseek_v3 import DEEPSEEK_V3
from mcorefs.mapping.family import Facts, Proven, Soft
from mcorefs.mapping.plan import plan
from mcorefs.mapping.reference import NO_REFERENCE
from mcorefs.model import Options, load
from mcorefs.views import View
from tests.checkpoints import Fixture, ensure
from tests.edited import with_args
from tests.test_config import reference, said
from tests.test_plan import unread

AT = "decoder.layers.{}.self_attention."
LATENT, DIRECT = "deepseek_v3-tp2-mtp", "deepseek_v3-moonlight-tp2"
PREDICTS_APART = "qwen3_next-tp2-ep2-mtp"


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure([LATENT, DIRECT, PREDICTS_APART, "deepseek_v3-ep2-two-mtp"])


def canonical(fixture: Fixture) -> dict[str, View]:
    return dict(catalog.build(TorchDist().index(fixture.iteration).tensors).tensors)


def gathered(tensors: Mapping[str, View], **args: object) -> tuple[Facts, list[str]]:
    facts, _, problems = gather(tensors, args, NO_REFERENCE, 301)
    return facts, problems


# -- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LATENT, DIRECT])
def test_shapes_prove_every_size(fixtures: Mapping[str, Fixture], name: str) -> None:
    spec = fixtures[name].spec
    facts, problems = gathered(canonical(fixtures[name]), mtp_num_layers=spec.mtp or None)
    assert problems == []
    assert facts.dims["heads"] == 8
    found = [facts.dims[size] for size in ("kv_lora", "qk_nope", "qk_rope", "v_head")]
    assert found == [spec.kv_lora, spec.qk_nope, spec.qk_rope, spec.v_head]
    assert facts.dims.get("q_lora") == spec.q_lora
    assert facts.dims.get("mtp", 0) == spec.mtp


@pytest.mark.parametrize(
    ("argument", "claim", "shown"),
    [
        ("q_lora_rank", 16, 32),
        ("kv_lora_rank", 512, 24),
        ("qk_head_dim", 128, 12),
        ("qk_pos_emb_head_dim", 64, 8),
        ("v_head_dim", 128, 10),
        ("num_attention_heads", 16, 8),
    ],
)
def test_arguments_that_contradict_shapes(
    fixtures: Mapping[str, Fixture], argument: str, claim: int, shown: int
) -> None:
    tensors = canonical(fixtures[LATENT])
    _, problems = gathered(tensors, **{"mtp_num_layers": 1, argument: claim})
    assert problems == [
        f"{argument} is {claim} in the training arguments but the tensor shapes say {shown}"
    ]


def test_queries_without_the_latent_that_arguments_claim(
    fixtures: Mapping[str, Fixture],
) -> None:
    _, (problem,) = gathered(canonical(fixtures[DIRECT]), q_lora_rank=1536)
    assert "q_lora_rank is 1536" in problem
    assert "queries of the checkpoint have no latent" in problem


@pytest.mark.parametrize(
    ("name", "rows"), [("linear_kv_down_proj", 24), ("linear_kv_up_proj", 80), ("linear_q_proj", 9)]
)
def test_rows_that_no_number_of_heads_explains(
    fixtures: Mapping[str, Fixture], name: str, rows: int
) -> None:
    tensors = canonical(fixtures[DIRECT])
    weight = AT.format(0) + name + ".weight"
    tensors[weight] = unread((rows, tensors[weight].shape[1]))
    _, problems = gathered(tensors)
    assert [problem for problem in problems if "which no number of heads explains" in problem]


def test_both_kinds_of_queries_in_one_model(fixtures: Mapping[str, Fixture]) -> None:
    tensors = canonical(fixtures[DIRECT])
    for other in ("linear_q_down_proj", "linear_q_up_proj"):
        tensors[AT.format(1) + other + ".weight"] = unread((32, 64))
    facts, _ = gathered(tensors)
    problems = plan(DEEPSEEK_V3, tensors, facts)[1]
    assert any("q_a_layernorm.weight needs" in problem for problem in problems)


def test_norms_of_latents_are_wanted(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    """Without --qk-layernorm there are none."""
    tensors = canonical(fixtures[LATENT])
    for layer in range(4):
        for latent in ("q", "kv"):
            del tensors[f"{AT.format(layer)}linear_{latent}_up_proj.layer_norm_weight"]
    facts, _ = gathered(tensors, mtp_num_layers=1)
    problems = plan(DEEPSEEK_V3, tensors, facts)[1]
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        assert any(f"{name}.weight needs" in problem for problem in problems)


# -- rotary embeddings ----------------------------------------------------------------------------


def rope_scaling(**args: object) -> object:
    found = MLA_KEYS["rope_scaling"].value(args_only(**args))
    return found.value if isinstance(found, Soft) else found


def args_only(**args: object) -> Facts:
    return Facts({"layers": 1}, args, frozenset(), False, "bfloat16", frozenset())


def expressed(**args: object) -> str | None:
    return yarn_expressed(args_only(**args))


NEW = {"cache_mla_latents": False}
"""What only arguments of megatron-core 0.14 and later have."""


def test_yarn_as_arguments_say() -> None:
    scaling = {"rotary_scaling_factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert rope_scaling(**NEW, **scaling, max_position_embeddings=163_840) == {
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 4096,
    }
    stated = rope_scaling(
        **NEW, **scaling, beta_fast=16, beta_slow=2, original_max_position_embeddings=8192
    )
    assert isinstance(stated, dict)
    assert (stated["beta_fast"], stated["beta_slow"]) == (16, 2)
    assert stated["original_max_position_embeddings"] == 8192


def test_up_to_core_0_13_the_position_limit_was_stretched() -> None:
    old = rope_scaling(rotary_scaling_factor=40.0, max_position_embeddings=2048)
    assert isinstance(old, dict)
    assert old["original_max_position_embeddings"] == 2048


@pytest.mark.parametrize(
    "args", [{}, {"rotary_scaling_factor": 1.0}, {"rotary_scaling_factor": 40, "rope_type": "rope"}]
)
def test_plain_rotary_embeddings(args: Mapping[str, object]) -> None:
    assert rope_scaling(**NEW, **args) is None


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, None),
        ({"mscale": 0.707, "mscale_all_dim": 0.707}, None),
        ({"mscale": 0.9, "mscale_all_dim": 0.5, **NEW}, None),
        ({"mscale": 1.0, "mscale_all_dim": 0.0, **NEW}, None),
        ({"mscale": 0.707, "mscale_all_dim": 0.0, **NEW}, "a ratio that no config.json can state"),
        ({"mscale": 0.0, "mscale_all_dim": 1.0, **NEW}, "a ratio that no config.json can state"),
        ({"mscale": 1.0, "mscale_all_dim": 0.0}, "by mscale up to its core 0.13"),
        ({"mscale_all_dim": 1.0, "rope_type": "rope"}, "attention even without YaRN"),
        ({"mscale_all_dim": 0.0, "rope_type": "rope"}, None),
    ],
)
def test_scales_that_transformers_cannot_have(
    args: Mapping[str, object], problem: str | None
) -> None:
    found = expressed(rotary_scaling_factor=40.0, **args)
    assert found is None if problem is None else problem in str(found)
    assert expressed(**{**args, "rotary_scaling_factor": 1.0}) is None


def test_a_reference_may_stretch_what_was_trained_unstretched(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures[DIRECT]
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    given = reference(fixture, tmp_path, rope_parameters=..., rope_theta=50_000, rope_scaling=yarn)
    model = load(fixture.root, Options(hf_config=given))
    assert model.config["rope_scaling"] == yarn
    assert said(model, "rope_scaling is")


def test_the_spelling_of_the_hub_agrees(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    """config.json as deepseek-ai/DeepSeek-V3 has it, with what describes other bytes."""
    yarn = {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    }
    given = reference(
        fixtures[LATENT],
        tmp_path,
        rope_parameters=...,
        rope_theta=10_000,
        rope_scaling={**yarn, "type": "yarn"},
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        moe_layer_freq=1,
        ep_size=1,
    )
    config = load(fixtures[LATENT].root, Options(hf_config=given)).config
    assert config["rope_scaling"] == {**yarn, "rope_type": "yarn"}
    assert config["ep_size"] == 1
    assert "quantization_config" not in config


# -- config.json ----------------------------------------------------------------------------------


def test_no_latent_is_said(fixtures: Mapping[str, Fixture]) -> None:
    """Left out, it would be the class's default."""
    assert MLA_KEYS["q_lora_rank"].value(args_only()) == Proven(None)
    config = load(fixtures[DIRECT].root, Options()).config
    assert config["q_lora_rank"] is None
    assert load(fixtures[LATENT].root, Options()).config["q_lora_rank"] == 32


def test_weights_are_interleaved_whatever_a_reference_says(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    given = reference(fixtures[DIRECT], tmp_path, rope_interleave=False)
    with pytest.raises(MappingError, match="rope_interleave is true in the checkpoint but false"):
        load(fixtures[DIRECT].root, Options(hf_config=given))


def test_kimi_k2_is_served_as_deepseek_v3(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    given = reference(fixtures[DIRECT], tmp_path, model_type="kimi_k2", auto_map={"AutoModel": "x"})
    for family in (None, "deepseek_v3", "kimi_k2"):
        model = load(fixtures[DIRECT].root, Options(hf_config=given, family=family))
        assert model.config["model_type"] == "deepseek_v3"
        assert model.config["architectures"] == ["DeepseekV3ForCausalLM"]
        assert "auto_map" not in model.config


# -- multi-token prediction -----------------------------------------------------------------------


def test_a_reference_may_have_more_layers_for_prediction(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    given = reference(fixtures[DIRECT], tmp_path, num_nextn_predict_layers=1)
    model = load(fixtures[DIRECT].root, Options(hf_config=given))
    assert model.config["num_nextn_predict_layers"] == 0
    assert said(model, "num_nextn_predict_layers is 0 as in the checkpoint (--hf-config says 1)")


@pytest.mark.parametrize(
    ("name", "said_layers", "held"),
    [(DIRECT, 1, 0), (LATENT, None, 1), ("deepseek_v3-ep2-two-mtp", 1, 2)],
)
def test_layers_for_prediction_are_as_many_as_arguments_say(
    fixtures: Mapping[str, Fixture], name: str, said_layers: int | None, held: int, tmp_path: Path
) -> None:
    root = with_args(fixtures[name], tmp_path, mtp_num_layers=said_layers)
    with pytest.raises(MappingError) as caught:
        load(root, Options())
    assert caught.value.problems == (
        f"mtp_num_layers is {said_layers or 0} in the training arguments but the checkpoint holds "
        f"{held} layers for multi-token prediction",
    )


def test_one_layer_may_predict_repeatedly(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    root = with_args(fixtures[LATENT], tmp_path, mtp_num_layers=3, mtp_use_repeated_layer=True)
    assert load(root, Options()).config["num_nextn_predict_layers"] == 1


@pytest.mark.parametrize("name", [LATENT, PREDICTS_APART])
def test_layers_for_prediction_are_left_out(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    fixture = fixtures[name]
    config = json.loads((fixture.hf / "config.json").read_bytes())
    behind = f"model.layers.{config['num_hidden_layers']}."
    vocabulary = fixture.spec.vocab_size
    with (
        mcorefs.open(fixture.root, mtp=False, vocab_size=vocabulary) as checkpoint,
        contextlib.ExitStack() as files,
    ):
        real = [
            files.enter_context(safe_open(path, "pt"))
            for path in sorted(fixture.hf.glob("*.safetensors"))
        ]
        kept = {
            key: file
            for file in real
            for key in file.keys()  # noqa: SIM118 - not a mapping
            if not key.startswith((behind, "mtp."))
        }
        assert set(checkpoint.keys()) == set(kept)
        assert sum(len(file.keys()) for file in real) > len(kept)
        for key, file in kept.items():
            tensor = checkpoint.get_tensor(key)
            assert isinstance(tensor, torch.Tensor)
            assert torch.equal(tensor, file.get_tensor(key))
        assert checkpoint.config["num_nextn_predict_layers"] == 0
        (remark,) = (one for one in checkpoint.remarks if one.startswith("left out"))
        assert remark.endswith("tensors for multi-token prediction (--no-mtp)")


def test_what_has_no_place_for_prediction_says_how_to_leave_it_out(
    fixtures: Mapping[str, Fixture],
) -> None:
    problems = refusal(fixtures[LATENT].root, Options(family="llama"))
    told = [problem for problem in problems if "(--no-mtp leaves it out)" in problem]
    assert told
    assert all("holds mtp." in problem for problem in told)


def test_a_layer_for_prediction_that_is_missing(fixtures: Mapping[str, Fixture]) -> None:
    whole = canonical(fixtures["deepseek_v3-ep2-two-mtp"])
    tensors = {name: view for name, view in whole.items() if not name.startswith("mtp.layers.0.")}
    _, problems = gathered(tensors, mtp_num_layers=2)
    assert "layers [0] for multi-token prediction hold no tensor at all" in problems


def test_layers_for_prediction_are_all_there_or_named(fixtures: Mapping[str, Fixture]) -> None:
    tensors = canonical(fixtures[LATENT])
    del tensors["mtp.layers.0.eh_proj.weight"]
    del tensors["mtp.layers.0.transformer_layer.mlp.experts.3.linear_fc2.weight"]
    facts, _ = gathered(tensors, mtp_num_layers=1)
    problems = plan(DEEPSEEK_V3, tensors, facts)[1]
    assert problems == [
        "model.layers.4.eh_proj.weight needs mtp.layers.0.eh_proj.weight, which the checkpoint "
        "does not hold",
        "model.layers.4.mlp.experts.3.down_proj.weight needs mtp.layers.0.transformer_layer.mlp."
        "experts.3.linear_fc2.weight, which the checkpoint does not hold",
    ]


# -- DeepSeek-V2 and V3 ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second() -> Fixture:
    """DeepSeek-V2, of whose four groups a token's experts are chosen from two."""
    return ensure(["deepseek_v2-tp2-ep2"])["deepseek_v2-tp2-ep2"]


def refusal(root: Path, options: Options) -> tuple[str, ...]:
    with pytest.raises(MappingError) as caught:
        load(root, options)
    return caught.value.problems


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"moe_router_pre_softmax": False}, "trained with moe_router_pre_softmax=False"),
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function='sigmoid'"),
        ({"moe_router_topk": 4}, "of experts by the sum of their 2 best scores"),
        ({"multi_latent_attention": False}, "trained with multi_latent_attention=False"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type="),
        ({"experimental_attention_variant": "dsa"}, "experimental_attention_variant='dsa'"),
        ({"mscale": 0.5, "mscale_all_dim": 0.0}, "a ratio that no config.json can state"),
    ],
)
def test_what_deepseek_v2_cannot_express(
    second: Fixture, args: Mapping[str, object], problem: str, tmp_path: Path
) -> None:
    (found,) = refusal(with_args(second, tmp_path, **args), Options())
    assert problem in found
    assert "its output would differ" in found


def test_groups_of_experts_may_be_stated(second: Fixture, tmp_path: Path) -> None:
    """DeepSeek-V2's own: the best six, of three groups, which Megatron chooses by two scores."""
    root = with_args(second, tmp_path, moe_router_topk=4)
    given = reference(second, tmp_path / "given", num_experts_per_tok=4)
    model = load(root, Options(hf_config=given))
    assert said(model, "groups of experts are chosen by their best score, as topk_method in --hf-c")
    assert said(model, "in training it was the sum of their 2 best")
    for change in ({"topk_method": "greedy"}, {"n_group": 2}, {"topk_group": 1}):
        other = reference(second, tmp_path / "other", num_experts_per_tok=4, **change)
        problems = refusal(root, Options(hf_config=other))
        assert any("by the sum of their 2 best scores" in problem for problem in problems)


@pytest.mark.parametrize(
    ("args", "method"),
    [
        ({}, "group_limited_greedy"),
        ({"moe_router_group_topk": None, "moe_router_topk": 4}, "greedy"),
        ({"moe_router_group_topk": 4, "moe_router_topk": 8}, "greedy"),  # all of them
    ],
)
def test_how_deepseek_v2_chooses_experts(
    second: Fixture, args: Mapping[str, object], method: str, tmp_path: Path
) -> None:
    config = load(with_args(second, tmp_path, **args), Options()).config
    assert (config["topk_method"], config["norm_topk_prob"]) == (method, False)


def test_the_bias_of_experts_tells_the_two_apart(
    fixtures: Mapping[str, Fixture], second: Fixture
) -> None:
    problems = refusal(second.root, Options(family="deepseek_v3"))
    assert any("e_score_correction_bias needs" in problem for problem in problems)
    problems = refusal(fixtures[DIRECT].root, Options(family="deepseek_v2"))
    assert any(
        ".mlp.router.expert_bias, which this family has no" in problem for problem in problems
    )
    problems = refusal(fixtures[LATENT].root, Options(family="deepseek_v2"))
    assert any("mtp.layers.0.eh_proj.weight, which this" in problem for problem in problems)


def test_what_only_a_name_tells_from_deepseek_v3_is_served_as_that() -> None:
    fixture = ensure(["glm4_moe_lite-tp2"])["glm4_moe_lite-tp2"]
    model = load(fixture.root, Options())
    assert model.choice.family.name == "deepseek_v3"
    told = "not glm4_moe_lite: only its name tells it apart (--family, --hf-config)"
    assert told in model.choice.evidence
    given = load(fixture.root, Options(hf_config=fixture.hf))
    assert given.choice.family.name == "glm4_moe_lite"
    assert given.config["mlp_layer_types"] == ["dense", "sparse", "sparse", "sparse"]
