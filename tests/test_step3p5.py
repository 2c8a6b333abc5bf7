"""Step-3.5: gates among the rows of linear_qkv, layers of two shapes, what Megatron-Bridge saves
nowhere, and what the Hugging Face model cannot express."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from mcorefs import catalog
from mcorefs.adapters import Adapter, Pair, Saved, Terms, merge
from mcorefs.errors import MappingError
from mcorefs.files import read_all
from mcorefs.formats.torch_dist import TorchDist
from mcorefs.mapping import step
from mcorefs.mapping.choose import choose
from mcorefs.mapping.facts import gather
from mcorefs.mapping.families.step3p5 import STEP3P5
from mcorefs.mapping.plan import plan
from mcorefs.mapping.reference import NO_REFERENCE, Reference, read_reference
from mcorefs.model import Model, Options, load
from mcorefs.trainers.base import LoraTraining
from mcorefs.tree import build
from mcorefs.views import View
from tests.checkpoints import Fixture, ensure
from tests.checkpoints.families import FAMILIES
from tests.checkpoints.families.step3p5 import SLIDING_HEADS
from tests.edited import copy, saved_anew, with_args
from tests.recordings import assert_same_bytes, differences
from tests.test_config import reference, refusal, said
from tests.test_megatron_bridge import DENSE_CONFIG, changed, saved
from tests.test_plan import unread

NAME, PIPELINE, LEGACY = "step3p5-tp2-ep2", "step3p5-pp2-ep2", "torch-step3p5-tp4"
GATE = "self_attention.linear_qkv.weight._gate"
UNSAVED = ("rotary_percents", "swiglu_limits", "swiglu_limits_shared")
"""Attributes of Megatron-Bridge's provider that are no fields of it."""


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure([NAME, PIPELINE, LEGACY])


@pytest.fixture
def tensors(fixtures: Mapping[str, Fixture]) -> dict[str, View]:
    return dict(catalog.build(TorchDist().index(fixtures[NAME].iteration).tensors).tensors)


@pytest.fixture
def args(fixtures: Mapping[str, Fixture]) -> dict[str, object]:
    return dict(TorchDist().index(fixtures[NAME].iteration).args)


def problems_of(
    tensors: Mapping[str, View], args: Mapping[str, object], given: Reference = NO_REFERENCE
) -> list[str]:
    facts, _, problems = gather(tensors, args, given, 301)
    return [*problems, *plan(STEP3P5, tensors, facts)[1]]


def hub(fixture: Fixture, directory: Path, mtp: int = 0, **changes: object) -> Path:
    """The directory of a model with the config.json that the hub's has, `mtp` entries longer."""
    config = dict(FAMILIES["step3p5"].config(fixture.spec))
    of_layers = ("layer_types", "rope_theta", "partial_rotary_factors", *UNSAVED[1:])
    for name in of_layers:
        listed = config[name]
        assert isinstance(listed, list)
        config[name] = [*listed, *listed[-1:] * mtp]
    config |= {
        "model_type": "step3p5",
        "architectures": ["Step3p5ForCausalLM"],
        "vocab_size": fixture.spec.vocab_size,
        "num_nextn_predict_layers": mtp,
        **changes,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


# -- where gates are ------------------------------------------------------------------------------


def test_ranks_that_do_not_say_so_are_refused(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """Their rows of queries, keys, values and gates lie rank by rank."""
    import torch

    iteration = copy(fixtures[LEGACY], tmp_path)
    for file in iteration.glob("*/model_optim_rng.pt"):
        state = torch.load(file, weights_only=False)
        del state["args"].head_wise_attn_gate
        torch.save(state, file)
    problems = refusal(lambda: load(iteration.parent, Options(family="step3p5", vocab_size=301)))
    assert any("linear_qkv.weight._gate, which the checkpoint does not hold" in p for p in problems)


def test_a_gate_for_each_element_is_refused(tensors: Mapping[str, View]) -> None:
    """Whoever says that it is a Step-3.5."""
    gates = {"attention_output_gate": True}
    setting = {"window_size": [512, 0]}
    given = Reference({"model_type": "step3p5"}, "--hf-config")
    for extra, named, known, hint in (
        ({}, "step3p5", NO_REFERENCE, None),
        ({}, None, given, "glm4_moe"),
        ({}, None, NO_REFERENCE, "step3p5"),
        ({"head_wise_attn_gate": True}, None, NO_REFERENCE, None),
        ({"sliding_attention_setting": setting}, None, NO_REFERENCE, None),
    ):
        facts, _, _ = gather(tensors, {**gates, **extra}, NO_REFERENCE)
        with pytest.raises(MappingError, match="each element of a head a gate of its own"):
            choose(tensors, facts, named, known, hint)


# -- layers of two shapes -------------------------------------------------------------------------


def test_it_is_known_by_its_gates(fixtures: Mapping[str, Fixture]) -> None:
    choice = load(fixtures[NAME].root, Options()).choice
    assert choice.family is STEP3P5
    assert choice.evidence == (f"has decoder.layers.*.{GATE}",)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_attention_heads": 10}, "num_attention_heads is 10 in sliding_attention_setting"),
        ({"num_query_groups": 2}, "num_query_groups is 2 in sliding_attention_setting but the"),
        ({"kv_channels": 32}, "kv_channels is 32 in sliding_attention_setting but the tensor"),
    ],
)
def test_a_setting_that_shapes_disprove(
    tensors: Mapping[str, View], args: dict[str, object], changes: dict[str, object], why: str
) -> None:
    assert problems_of(tensors, args) == []
    setting = args["sliding_attention_setting"]
    assert isinstance(setting, dict)
    (problem,) = problems_of(tensors, {**args, "sliding_attention_setting": {**setting, **changes}})
    assert why in problem


def test_layers_that_are_not_of_the_kind_that_is_said(
    tensors: Mapping[str, View], args: dict[str, object]
) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    problems = problems_of(tensors, {**args, "layer_types": kinds})
    assert any("layers.2.self_attn.g_proj.weight has shape [12, 64]" in p for p in problems)
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    problems = problems_of(tensors, {**args, "layer_types": kinds})
    assert any("num_attention_heads is 8 in the training arguments" in p for p in problems)
    assert any("num_attention_heads is 12 in sliding_attention_setting" in p for p in problems)


def test_heads_of_two_sizes(tensors: dict[str, View], args: dict[str, object]) -> None:
    for layer in (1, 2, 3):
        for x in "qk":
            name = f"decoder.layers.{layer}.self_attention.{x}_layernorm.weight"
            tensors[name] = unread((8,))
    problems = problems_of(tensors, args)
    assert any("with a window are 8 elements large, those of others 16" in p for p in problems)


def test_layers_of_an_unknown_kind(tensors: Mapping[str, View], args: dict[str, object]) -> None:
    kinds = ["full_attention", *["sliding_attention"] * 2, "chunked_attention"]
    problems = problems_of(tensors, {**args, "layer_types": kinds})
    assert "layer_types has chunked_attention, which is not known" in problems


@pytest.mark.parametrize(("skipped", "lost"), [([1, 1, 0, 1], [2]), (3, [2]), (4, [3])])
def test_windows_that_are_skipped(
    tensors: Mapping[str, View], args: dict[str, object], skipped: object, lost: list[int]
) -> None:
    assert problems_of(tensors, {**args, "window_attn_skip_freq": [0, 1, 1, 1]}) == []
    (problem,) = problems_of(tensors, {**args, "window_attn_skip_freq": skipped})
    assert f"window_attn_skip_freq={skipped!r} layers {lost} have no window although" in problem


# -- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NAME, PIPELINE])
def test_config_is_in_the_words_of_the_hub(fixtures: Mapping[str, Fixture], name: str) -> None:
    fixture = fixtures[name]
    config = load(fixture.root, Options(vocab_size=301)).config
    expected = FAMILIES["step3p5"].config(fixture.spec)
    assert {key: config.get(key) for key in expected} == expected
    assert "rope_parameters" not in config


def as_bridge_saves_it(fixture: Fixture, directory: Path) -> Path:
    """As its run_config.yaml says: fields of a Step35ModelProvider, no others."""
    args = TorchDist().index(fixture.iteration).args
    kept = (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
        "kv_channels", "layernorm_epsilon", "moe_ffn_hidden_size", "moe_router_topk",
        "moe_shared_expert_intermediate_size", "moe_router_score_function", "moe_layer_freq",
        "moe_router_enable_expert_bias", "moe_router_topk_scaling_factor", "moe_router_dtype",
        "head_wise_attn_gate", "attention_output_gate", "layer_types", "rotary_base",
        "sliding_attention_setting", "rotary_base_per_layer", "qk_layernorm", "vocab_size",
        "make_vocab_size_divisible_by", "tensor_model_parallel_size",
    )  # fmt: skip
    text = changed(
        DENSE_CONFIG,
        _target_="megatron.bridge.models.stepfun.step35_provider.Step35ModelProvider",
        num_moe_experts=fixture.spec.experts,
        attention_other_setting=FAMILIES["step3p5"].config(fixture.spec)["attention_other_setting"],
        layernorm_zero_centered_gamma=True,
        share_embeddings_and_output_weights=False,
        moe_router_pre_softmax=False,
        rotary_percent=1.0,
        hf_model_id=None,
        seq_length=256,
        init_method_std=0.02,
        **{name: args[name] for name in kept},
    )
    return saved(fixture, directory, text)


def test_what_megatron_bridge_saves_nowhere_must_be_told(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures[NAME]
    root = as_bridge_saves_it(fixture, tmp_path)
    problems = refusal(lambda: load(root, Options()))
    unknown = {problem.partition(" ")[0] for problem in problems if "is unknown" in problem}
    assert unknown == {"partial_rotary_factors", *UNSAVED[1:]}
    assert len(problems) == len(unknown)
    given = hub(fixture, tmp_path / "hub", mtp=3)
    model = load(root, Options(hf_config=given))
    assert_same_bytes(model, fixture)
    assert differences(model, fixture, tmp_path) == {}
    assert model.config["num_nextn_predict_layers"] == 0


def test_a_reference_in_the_words_of_transformers(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """As transformers saves what it reads of the hub's."""
    for name in (NAME, PIPELINE):
        fixture = fixtures[name]
        model = load(fixture.root, Options(hf_config=fixture.hf))
        expected = FAMILIES["step3p5"].config(fixture.spec)
        assert {key: model.config.get(key) for key in expected} == expected
        assert not {"per_layer_config", "mlp_layer_types", "rope_parameters"} & set(model.config)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_sliding_attention_heads": 8}, "attention_other_setting is"),
        ({"mlp_layer_types": ["sparse"] * 4}, "moe_layers_enum is"),
        ({"num_key_value_heads": 2}, "num_attention_groups is 4 in the checkpoint but 2"),
        ({"n_routed_experts": 16}, "moe_num_experts is 8 in the checkpoint but 16"),
        ({"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 16 in the checkpoint but 64"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ({"gating": "per-element"}, 'gating is "per-element"'),
    ],
)
def test_a_reference_of_transformers_that_contradicts(
    fixtures: Mapping[str, Fixture], changes: dict[str, object], why: str, tmp_path: Path
) -> None:
    fixture = fixtures[NAME]
    given = reference(fixture, tmp_path, **changes)
    problems = refusal(lambda: load(fixture.root, Options(hf_config=given)))
    assert any(problem.startswith(why) for problem in problems)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_theta", 10_000.0),
        ("partial_rotary_factors", [0.5, 1.0, 1.0, 0.5]),
        ("layer_types", ["full_attention"] * 4),
        ("moe_layers_enum", "2,3"),
        ("moe_router_activation", "softmax"),
        ("moe_router_scaling_factor", 2.0),
        ("zero_centered", False),
        ("use_head_wise_attn_gate", False),
        ("use_qk_norm", False),
        ("use_rope_layers", [True, True, False, True]),
        ("swiglu_limits", [0.0, 0.0, 0.0, 8.0]),
        ("swiglu_limits_shared", None),
        ("attention_other_setting", {"num_attention_heads": 8, "num_attention_groups": 4}),
    ],
)
def test_a_reference_of_the_hub_that_contradicts(
    fixtures: Mapping[str, Fixture], name: str, value: object, tmp_path: Path
) -> None:
    fixture = fixtures[NAME]
    given = hub(fixture, tmp_path / "hub", 0, **{name: value})
    (problem,) = refusal(lambda: load(fixture.root, Options(hf_config=given)))
    assert problem.startswith(f"{name} is ")


def test_other_words_of_the_hub(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    """Which say the same."""
    fixture = fixtures[NAME]
    given = hub(
        fixture,
        tmp_path / "hub",
        moe_layers_enum=[1, 2, 3],
        use_rope_layers=[True] * 4,
        swiglu_limits=[None, 0, 0.0, 7],
    )
    assert load(fixture.root, Options(hf_config=given)).config["moe_layers_enum"] == "1,2,3"
    none = read_reference(hub(fixture, tmp_path / "none", swiglu_limits=None, rope_theta=10_000))
    assert none.config["swiglu_limits"] == [0.0] * 4
    assert none.config["rope_theta"] == [10_000] * 4


def test_a_reference_may_extend_the_context_and_names_the_window(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures[NAME]
    scaling = {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 256}
    given = hub(fixture, tmp_path / "hub", rope_scaling=scaling, sliding_window=7)
    model = load(fixture.root, Options(hf_config=given))
    assert model.config["rope_scaling"] == scaling
    assert model.config["sliding_window"] == 7
    assert said(model, "sliding_window is 7 as in --hf-config (training used 8)")
    assert said(model, "rope_scaling is ")


def test_whose_rotations_are_scaled(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    """The hub's code scales those of all layers unless it is told of some, transformers those of
    layers without a window."""
    fixture = fixtures[NAME]
    scaling = {"rope_type": "llama3", "factor": 2.0}
    given = hub(fixture, tmp_path / "hub", rope_scaling=scaling)
    model = load(fixture.root, Options(hf_config=given))
    assert model.config["yarn_only_types"] == ["full_attention"]
    config = json.loads((given / "config.json").read_text())
    del config["yarn_only_types"]
    (given / "config.json").write_text(json.dumps(config))
    assert "yarn_only_types" not in load(fixture.root, Options(hf_config=given)).config
    rope = json.loads((fixture.hf / "config.json").read_text())["rope_parameters"]
    rope["full_attention"] |= scaling
    given = reference(fixture, tmp_path / "saved", rope_parameters=rope, yarn_only_types=...)
    model = load(fixture.root, Options(hf_config=given))
    assert model.config["rope_scaling"] == scaling
    assert model.config["yarn_only_types"] == ["full_attention"]


# -- what it cannot express -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("apply_layernorm_1p", None, "norms are not around zero as those of this model are"),
        ("apply_layernorm_1p", False, "apply_layernorm_1p=False"),
        ("rotary_interleaved", True, "rotary_interleaved=True"),
        ("head_wise_attn_gate", False, "head_wise_attn_gate=False"),
        ("moe_router_topk", 1, "with moe_router_topk=1"),
        ("moe_router_score_function", "softmax", "moe_router_score_function='softmax'"),
        ("use_rope_scaling", True, "use_rope_scaling=True"),
        ("rotary_seq_len_interpolation_factor", 2, "interpolation_factor=2"),
        ("window_size", [7, 0], "window_size=[7, 0]"),
        ("no_rope_freq", [1, 0, 0, 0], "no_rope_freq=[1, 0, 0, 0]"),
        ("activation_func_clamp_value", 7.0, "activation_func_clamp_value=7.0"),
        ("swiglu_limits", [7.0, 0.0, 0.0, 7.0], "layer 0 was trained with gates limited to 7.0"),
        ("swiglu_limits", [0, 0, 9.0, 7.0], "layer 2 was trained with those of the shared expert"),
        ("swiglu_limits", [0, 0, 0, 6.0], "swiglu_limits or swiglu_limits_shared has 6.0"),
        ("swiglu_limits_shared", [0, 0, 0, 2], "swiglu_limits or swiglu_limits_shared has 2"),
    ],
)
def test_arguments_that_it_cannot_express(
    tensors: Mapping[str, View], args: dict[str, object], name: str, value: object, why: str
) -> None:
    (problem,) = problems_of(tensors, {**args, name: value})
    assert why in problem


def test_limits_that_a_reference_alone_states(
    tensors: Mapping[str, View], args: dict[str, object]
) -> None:
    unsaid = {name: value for name, value in args.items() if name not in UNSAVED}
    for where in ("--hf-config", "beside the checkpoint"):
        given = Reference({"swiglu_limits": [0.0, 0.0, 0.0, 3.0]}, where)
        problems = problems_of(tensors, unsaid, given)
        assert any("swiglu_limits_shared has 3.0" in problem for problem in problems)


def test_where_limits_hold_is_said(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    model = load(fixtures[NAME].root, Options())
    assert said(model, "limits of gates (7.0, 16.0) hold before the activation")
    none = {"swiglu_limits": [0.0] * 4, "swiglu_limits_shared": [None] * 4}
    model = load(with_args(fixtures[NAME], tmp_path, **none), Options())
    assert not said(model, "limits of gates")


def test_limits_are_the_same_to_bf16() -> None:
    """From where they are allowed on."""
    import torch

    from mcorefs.mapping.families.step3p5 import _high

    allowed = [limit / 16 for limit in range(1, 512) if _high(limit / 16)]
    assert 6.2 < allowed[0] < 6.3
    for limit in allowed:
        exact = torch.tensor(limit)
        gate = torch.nn.functional.silu(exact)
        assert (exact - gate) / exact < 2**-9


def test_a_run_of_megatron_lm_whose_layers_are_all_alike(
    tensors: Mapping[str, View], args: dict[str, object]
) -> None:
    """Nothing then differs from layer to layer."""
    bridge = ("layer_types", "sliding_attention_setting", "rotary_base_per_layer", *UNSAVED)
    plain = {name: value for name, value in args.items() if name not in bridge}
    first = "decoder.layers.0.self_attention."
    alike = dict(tensors)
    for name in tensors:
        layer, _, inside = name.removeprefix("decoder.layers.").partition(".self_attention.")
        if inside and layer in "123":
            alike[name] = tensors[first + inside]
    facts, _, problems = gather(alike, {**plain, "rotary_percent": 0.5}, NO_REFERENCE, 301)
    assert problems == []
    assert plan(STEP3P5, alike, facts)[1] == []
    found = {name: key.value(facts) for name, key in STEP3P5.config.items()}
    assert found["layer_types"] == ["full_attention"] * 4
    assert found["partial_rotary_factors"] == [0.5] * 4
    assert found["rope_theta"] == [5_000_000.0] * 4
    assert found["swiglu_limits"] == [0.0] * 4
    assert found["attention_other_setting"] is None


def test_multi_token_prediction_is_refused_with_words(
    tensors: dict[str, View], args: dict[str, object]
) -> None:
    at = "mtp.layers.0."
    tensors |= {at + "enorm.weight": unread((64,)), at + "hnorm.weight": unread((64,))}
    problems = problems_of(tensors, {**args, "mtp_num_layers": 1})
    assert any("--no-mtp serves the model without them" in problem for problem in problems)


def test_no_mtp_cuts_what_is_said_of_it(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    """Arguments have an entry for each layer for multi-token prediction, too."""
    fixture = fixtures[NAME]
    args = TorchDist().index(fixture.iteration).args
    longer: dict[str, object] = {"mtp_num_layers": 2}
    for name in ("layer_types", "rotary_base_per_layer", *UNSAVED):
        listed = args[name]
        assert isinstance(listed, list)
        longer[name] = [*listed, *listed[-1:] * 2]
    root = with_args(fixture, tmp_path, **longer)
    model = load(root, Options(mtp=False))
    assert_same_bytes(model, fixture)
    assert differences(model, fixture, tmp_path) == {}


def test_a_lora_adapter_of_gated_attention_is_refused(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """The rows of its B lie rank by rank, gates among them."""
    import torch

    fixture = fixtures[NAME]
    root = with_args(fixture, tmp_path)
    at = "decoder.layers.0.self_attention.linear_qkv.lora_"

    def add(state: dict[str, object]) -> None:
        state[f"{at}A.default.weight"] = torch.zeros(4, 64)
        state[f"{at}B.default.weight"] = torch.zeros(256 + 8, 4)

    saved_anew(fixture, root, add)
    (problem,) = refusal(lambda: load(root, Options(adapter_scale=1.0)))
    assert "the adapter of decoder.layers.0.self_attention.linear_qkv.weight does not" in problem


def test_an_adapter_of_queries_and_keys_in_layers_of_two_shapes(
    fixtures: Mapping[str, Fixture],
) -> None:
    """Whose linear_qkv has as many rows in one as in the other."""
    whole = TorchDist().index(fixtures[PIPELINE].iteration)
    tensors = dict(catalog.build(whole.tensors).tensors)
    facts, _, _ = gather(tensors, whole.args, NO_REFERENCE, 301)
    modules = [f"decoder.layers.{layer}.self_attention.linear_qkv" for layer in (3, 0)]
    full, sliding = (tensors[f"{module}.weight"].shape for module in modules)
    assert full == sliding
    pair = Pair(unread((4, 64), "F32"), unread((facts.dims["kv_rows"], 4), "F32"))
    terms = Terms(LoraTraining(rank=4, alpha=8.0), 1.0, facts.dims, Saved(1, 1))
    adapter = Adapter("bridge", {module: {"k": pair} for module in modules}, {})
    (problem,) = merge(adapter, tensors, terms)[1]
    assert problem.startswith(
        f"the adapter of {modules[1]}.weight does not fit: it has other heads"
    )


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), -(10**400), "7", True, []])
def test_limits_that_are_no_numbers(
    tensors: Mapping[str, View], args: dict[str, object], value: object
) -> None:
    unsaid = {name: one for name, one in args.items() if name not in UNSAVED}
    given = Reference({"swiglu_limits_shared": [0.0, 0.0, 0.0, value]}, "--hf-config")
    assert any("output would differ" in one for one in problems_of(tensors, unsaid, given))


@pytest.mark.parametrize(
    "rope", [None, [], {"full_attention": 1}, {"sliding_attention": {}}, {"full_attention": {}}]
)
@pytest.mark.parametrize("kinds", [None, ["sliding_attention"] * 4, [1, {}, None, []]])
def test_references_of_any_kind(rope: object, kinds: object) -> None:
    """Are read, and say nothing or something else."""
    config = {
        "model_type": "step3p5",
        "num_hidden_layers": 4,
        "mlp_layer_types": ["sparse", 1, None, {}],
        "layer_types": kinds,
        "rope_parameters": rope,
        "per_layer_config": [],
        "attention_other_setting": [],
        "swiglu_limits": {},
        "moe_layers_enum": [None],
    }
    found = step.of_decoder(step.from_transformers(config))
    assert found["swiglu_limits"] == [0.0] * 4


def served_config(model: Model) -> dict[str, object]:
    tree, _ = build(model, "50GB", 1 << 20)
    found: dict[str, object] = json.loads(read_all(tree.files["config.json"]))
    return found


def test_transformers_own_class_reads_the_config(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """Which it has for Step-3.7, and gives to whoever asks for a step3p5."""
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

    fixture = fixtures[NAME]
    config = Step3p7TextConfig(**served_config(load(fixture.root, Options())))
    assert config.num_sliding_attention_heads == SLIDING_HEADS
    assert config.mlp_layer_types == ["dense", "sparse", "sparse", "sparse"]
    assert config.n_routed_experts == 8
    assert config.num_experts_per_tok == 3
    assert config.rope_parameters == {
        "full_attention": {
            "rope_type": "default",
            "rope_theta": 5_000_000.0,
            "partial_rotary_factor": 0.5,
        },
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 1.0,
        },
    }
