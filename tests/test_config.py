"""config.json and generation_config.json: what transformers makes of them, against the config of
the model that each checkpoint was made from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mcorefs.arithmetic import Add
from mcorefs.errors import CheckpointError, MappingError
from mcorefs.files import read_all
from mcorefs.model import Model, Options, load
from mcorefs.tree import build
from tests.checkpoints import SPECS, Fixture, ensure
from tests.checkpoints.families import FAMILIES, family_to_name
from tests.edited import with_args

NAMES = [
    name
    for name, spec in SPECS.items()
    if spec.common != "no_args" and spec.is_whole and not spec.vision
]


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure(SPECS)


def materialise(model: Model, directory: Path) -> Path:
    tree, _ = build(model, "50GB", 1 << 20)
    for name, file in tree.files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(read_all(file))
    return directory


def write_config(model: Model, directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(model.config)))
    return directory


def reference(fixture: Fixture, directory: Path, **changes: object) -> Path:
    """A directory with the oracle's config.json changed; ... takes a key away."""
    config = {**json.loads((fixture.hf / "config.json").read_bytes()), **changes}
    directory.mkdir(exist_ok=True)
    kept = {name: value for name, value in config.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


def attributes(directory: Path) -> dict[str, Any]:
    """What transformers knows of the config in `directory`."""
    from transformers import AutoConfig

    from tests.checkpoints import own_code

    own_code.register()
    found: dict[str, Any] = AutoConfig.from_pretrained(directory).to_dict()
    ours = ("transformers_version", "_name_or_path")
    return {name: value for name, value in found.items() if name not in ours}


def refusal(call: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(MappingError) as caught:
        call()
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def said(model: Model, text: str) -> bool:
    return any(text in remark for remark in model.remarks)


ONLY_IN_TRANSFORMERS_4 = (
    "rope_theta",
    "rope_scaling",
    "torch_dtype",
    "num_experts",
    "partial_rotary_factor",
)
ONLY_IN_ENGINES = (
    "scoring_func",
    "topk_method",
    "moe_layer_freq",
    "first_k_dense_replace",
    "num_nextn_predict_layers",
    "mtp_num_hidden_layers",
    "rotary_dim",
    "use_routing_bias",
    "use_qk_norm",
    "qk_norm_type",
    "use_mtp",
    "num_mtp_modules",
    "moe_router_use_sigmoid",
    "moe_router_enable_expert_bias",
    "qk_norm",
    "route_norm",
    "indexer_rope_interleave",
    "index_topk_freq",
    "index_skip_topk_offset",
    "layernorm_epsilon",
    "hybrid_layer_pattern",
    "sliding_window_size",
    "swa_rope_theta",
    "swa_num_attention_heads",
    "swa_num_key_value_heads",
    "swa_head_dim",
    "swa_v_head_dim",
    "add_swa_attention_sink_bias",
    "add_full_attention_sink_bias",
)

# -- without a reference: all from the checkpoint -------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_what_the_model_had(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    fixture = fixtures[name]
    options = Options(
        vocab_size=fixture.spec.vocab_size,
        weights=fixture.spec.oracle_weights,
        family=family_to_name(fixture.spec),
    )
    model = load(fixture.root, options)
    found = attributes(write_config(model, tmp_path))
    expected = attributes(fixture.hf)
    if model.tokenizer.found:
        expected["pad_token_id"] = 0  # the oracle's config has no tokenizer to ask
    else:
        for key in ("bos_token_id", "eos_token_id"):
            expected[key] = None
    # What only others read stays as an attribute.
    extra = {*ONLY_IN_TRANSFORMERS_4, *ONLY_IN_ENGINES} - set(expected)
    assert {key: value for key, value in found.items() if key not in extra} == expected


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe-mixed-pp2"])
def test_both_spellings_are_there(fixtures: Mapping[str, Fixture], name: str) -> None:
    """transformers 4, vLLM and SGLang read the hub's keys, transformers 5 writes others."""
    fixture = fixtures[name]
    config = load(fixture.root, Options(vocab_size=fixture.spec.vocab_size)).config
    assert config["rope_theta"] == 1_000_000
    assert config["rope_scaling"] is None
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 1_000_000}
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    if fixture.spec.is_moe:
        assert config["num_experts"] == 8
        assert "num_local_experts" not in config
    hub = {
        "architectures", "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id",
        "head_dim", "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
        "max_position_embeddings", "model_type", "num_attention_heads", "num_hidden_layers",
        "num_key_value_heads", "rms_norm_eps", "rope_scaling", "rope_theta", "sliding_window",
        "tie_word_embeddings", "torch_dtype", "use_cache", "use_sliding_window", "vocab_size",
    }  # fmt: skip
    moe = {
        "decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob",
        "num_experts", "num_experts_per_tok", "output_router_logits", "router_aux_loss_coef",
    }  # fmt: skip
    # Every key that Qwen's own config.json has, but for transformers_version and max_window_layers.
    assert hub | (moe if fixture.spec.is_moe else set()) <= set(config)


def test_config_says_the_dtype_that_is_served(fixtures: Mapping[str, Fixture]) -> None:
    for name, dtype in (
        ("qwen3-pp2-uneven", "float32"),
        ("qwen3-cp2-fp16", "float16"),
        ("qwen3_moe-fp32-router", "bfloat16"),
    ):
        assert load(fixtures[name].root, Options()).config["torch_dtype"] == dtype
        cast = load(fixtures[name].root, Options(dtype="float32")).config
        assert cast["torch_dtype"] == cast["dtype"] == "float32"


LOGITS = (
    "qwen3",
    "qwen3-tp2-pp2-tied",
    "qwen3_moe",  # norm_topk_prob false
    "qwen3_moe-tp2-ep2-etp1",  # tied, norm_topk_prob true
    "qwen3_moe-mixed-pp2",
    *(
        name
        for family in FAMILIES.values()
        if not family.vision  # test_vision
        for name in itertools.islice(family.specs, 2)
    ),
)
OTHERWISE: Mapping[str, object] = {
    "rms_norm_eps": 1e-2,
    "norm_eps": 1e-2,
    "layer_norm_epsilon": 1e-2,
    "time_step_min": 0.01,
    "mlp_hidden_act": "silu",
    "mamba_hidden_act": "relu",
    "rope_theta": 3e3,
    "partial_rotary_factor": 0.25,
    "rope_local_base_freq": 3e3,
    "query_pre_attn_scalar": 64,
    "attn_logit_softcapping": 0.1,
    "final_logit_softcapping": 0.1,
    "norm_topk_prob": True,
    "sliding_window": 9,
    "rope_interleave": False,
    "rope_scaling": None,
    "routed_scaling_factor": 0.5,
    "index_topk": 3,
    "topk_group": 1,
    "swiglu_limit": 0.1,
    "embedding_multiplier": 1.5,
    "lm_head_multiplier": 1.5,
    "key_multiplier": 1.5,
    "attention_in_multiplier": 1.1,
    "attention_out_multiplier": 1.5,
    "ssm_in_multiplier": 1.5,
    "ssm_out_multiplier": 1.5,
    "mlp_multipliers": [1.7, 0.8838834764831844],
    "ssm_multipliers": [1.3, 0.85, 0.5, 1.9, 0.4],
    "mamba_norm_before_gate": True,
    "partial_rotary_factors": [0.25] * 4,
    "swiglu_limits": [0.001] * 4,
    "swiglu_limits_shared": [0.001] * 4,
    "moe_top_k": 2,
    "moe_router_scaling_factor": 0.5,
}
"""Changes no tensor, only what is computed with it."""
UNREAD = {("deepseek_v2", "norm_topk_prob")}
"""What transformers has no use for: it never divides these by their sum."""


@pytest.mark.parametrize("name", LOGITS)
def test_the_model_computes_the_same_logits(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from tests.checkpoints import own_code

    own_code.register()
    fixture = fixtures[name]
    family = family_to_name(fixture.spec)
    loaded = load(fixture.root, Options(vocab_size=fixture.spec.vocab_size, family=family))
    materialise(loaded, tmp_path)
    tokens = torch.arange(0, fixture.spec.vocab_size, 7)[None]
    # Layers for multi-token prediction, which it knows only by the numbers they have on the hub.
    behind = tuple(f"model.layers.{fixture.spec.layers + i}." for i in range(fixture.spec.mtp))

    def logits(directory: Path) -> torch.Tensor:
        model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert all(name.startswith(behind) for name in info.pop("unexpected_keys"))
        assert not any(info.values())
        with torch.no_grad():
            found: torch.Tensor = model(tokens).logits
        return found

    expected = logits(fixture.hf)
    assert torch.equal(logits(tmp_path), expected)
    # The test would see a wrong key.
    for key, value in OTHERWISE.items():
        config = dict(loaded.config)
        if config.get(key) not in (None, value) and (fixture.spec.family, key) not in UNREAD:
            config[key] = value
            config.pop("rope_parameters", None)
            (tmp_path / "config.json").write_text(json.dumps(config))
            assert not torch.equal(logits(tmp_path), expected), key


def test_code_of_its_own_is_served_where_a_reference_has_it(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """And neither read nor run."""
    fixture = fixtures["mimo-tp2"]
    alone = load(fixture.root, Options(family="mimo"))
    assert "auto_map" not in alone.config
    assert said(alone, "transformers has no code of its own for this model")
    named = {
        "AutoConfig": "configuration_mimo.MiMoConfig",
        "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM",
        "AutoTokenizer": ["../../secret.Tokenizer", None, "else/where--tokenization.Tokenizer"],
    }
    given = reference(fixture, tmp_path, auto_map=named)
    (given / "modeling_mimo.py").write_bytes(b"raise SystemExit\n")
    (given / "setup.py").write_bytes(b"raise SystemExit\n")
    model = load(fixture.root, Options(hf_config=given))
    assert model.choice.family.name == "mimo"
    assert model.config["auto_map"] == named
    assert said(model, "auto_map names configuration_mimo.py, which is not beside --hf-config")
    tree, _ = build(model, "50GB", 1 << 20)
    code = {name: read_all(file) for name, file in tree.files.items() if name.endswith(".py")}
    assert code == {"modeling_mimo.py": b"raise SystemExit\n"}


def test_what_is_assumed_is_said(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    gone = ("max_position_embeddings", "seq_length", "init_method_std", "attention_dropout")
    root = with_args(fixtures["qwen3"], tmp_path, **dict.fromkeys(gone, ...))
    model = load(root, Options(vocab_size=307))
    (assumed,) = [remark for remark in model.remarks if remark.startswith("assumed")]
    for text in ("max_position_embeddings=32768", "initializer_range=0.02"):
        assert text in assumed
    assert "rope_theta" not in assumed
    everything = load(fixtures["qwen3"].root, Options(vocab_size=307))
    assert not said(everything, "assumed")


def test_sequence_length_stands_in_for_the_position_limit(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    root = with_args(fixtures["qwen3"], tmp_path, max_position_embeddings=...)
    assert load(root, Options()).config["max_position_embeddings"] == 256
    assert load(fixtures["qwen3"].root, Options()).config["max_position_embeddings"] == 512


def test_llama3_rope_scaling(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    root = with_args(
        fixtures["qwen3"],
        tmp_path,
        use_rope_scaling=True,
        rope_scaling_factor=4.0,
        max_position_embeddings=32768,
    )
    model = load(root, Options(vocab_size=307))
    rope = attributes(write_config(model, tmp_path / "config"))["rope_parameters"]
    assert rope == {
        "rope_type": "llama3",
        "rope_theta": 1_000_000,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert model.config["rope_scaling"] == {k: v for k, v in rope.items() if k != "rope_theta"}


def test_linear_rope_scaling(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    root = with_args(fixtures["qwen3"], tmp_path, rotary_seq_len_interpolation_factor=2)
    config = load(root, Options()).config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("normalization", "LayerNorm"),
        ("swiglu", False),
        ("position_embedding_type", "learned_absolute"),
        ("position_embedding_type", "yarn"),
        ("rotary_percent", 0.5),
        ("add_bias_linear", True),
        ("add_qkv_bias", True),
        ("window_size", [128, 0]),
        ("multi_latent_attention", True),
        ("attention_output_gate", True),
    ],
)
def test_arguments_that_mean_another_model_are_refused(
    fixtures: Mapping[str, Fixture], name: str, value: object, tmp_path: Path
) -> None:
    root = with_args(fixtures["qwen3"], tmp_path, **{name: value})
    (problem,) = refusal(lambda: load(root, Options()))
    assert f"{name}={value!r}" in problem
    assert "Qwen3ForCausalLM cannot express" in problem


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_router_score_function", "sigmoid"),
        ("moe_router_topk_scaling_factor", 2.5),
        ("moe_router_num_groups", 4),
        ("moe_apply_probs_on_input", True),
    ],
)
def test_moe_arguments_that_mean_another_model_are_refused(
    fixtures: Mapping[str, Fixture], name: str, value: object, tmp_path: Path
) -> None:
    root = with_args(fixtures["qwen3_moe"], tmp_path, **{name: value})
    (problem,) = refusal(lambda: load(root, Options()))
    assert f"{name}={value!r}" in problem


@pytest.mark.parametrize(
    ("fixture", "name", "value"),
    [
        ("mixtral-tp2-ep2", "moe_router_pre_softmax", True),
        ("mixtral-tp2-ep2", "window_attn_skip_freq", 2),
        ("mixtral-tp2-ep2", "moe_router_load_balancing_type", "quantile_balancing"),
        ("qwen2_moe-tp2-ep2", "moe_shared_expert_glu_interleave_size", 32),
        ("qwen2_moe-tp2-ep2", "use_grouped_gemm_for_shared_expert", True),
        ("qwen2_moe-tp2-ep2", "moe_router_score_function", "sigmoid"),
        ("glm4_moe-tp2-ep2", "moe_router_score_function", "softmax"),
        ("deepseek_v3-tp2-mtp", "rotary_interleaved", True),
    ],
)
def test_arguments_that_one_family_cannot_express_are_refused(
    fixtures: Mapping[str, Fixture], fixture: str, name: str, value: object, tmp_path: Path
) -> None:
    root = with_args(fixtures[fixture], tmp_path, **{name: value})
    (problem,) = refusal(lambda: load(root, Options()))
    assert f"{name}={value!r}" in problem
    assert "its output would differ" in problem


def test_groups_of_experts(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures["glm4_moe-tp2-groups"]
    config = load(fixture.root, Options()).config
    assert (config["n_group"], config["topk_group"], config["n_shared_experts"]) == (4, 2, 2)
    root = with_args(fixture, tmp_path, moe_router_topk=6)
    (problem,) = refusal(lambda: load(root, Options()))
    assert "by the sum of their 3 best scores, transformers of their 2" in problem


def test_the_part_of_a_head_that_rotates(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures["glm4_moe-tp2-ep2"]
    theta = {"rope_type": "default", "rope_theta": 1e6}
    for spelling in (
        {"rope_parameters": {**theta, "partial_rotary_factor": 0.25}},
        {"rope_parameters": theta, "partial_rotary_factor": 0.25},
    ):
        given = reference(fixture, tmp_path, **spelling)
        (problem,) = refusal(partial(load, fixture.root, Options(hf_config=given)))
        assert "partial_rotary_factor is 0.5 in the checkpoint but 0.25 in --hf-config" in problem
    model = load(fixture.root, Options(hf_config=fixture.hf))
    assert model.config["partial_rotary_factor"] == 0.5
    assert model.config["rope_scaling"] is None
    rope = attributes(write_config(model, tmp_path / "ours"))["rope_parameters"]
    assert rope == {**theta, "partial_rotary_factor": 0.5}


def test_the_shared_expert_is_as_wide_as_is_said(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["qwen2_moe-tp2-ep2"]
    assert load(fixture.root, Options()).config["shared_expert_intermediate_size"] == 80
    root = with_args(fixture, tmp_path, moe_shared_expert_intermediate_size=96)
    (problem,) = refusal(lambda: load(root, Options()))
    assert problem == (
        "moe_shared_expert_intermediate_size is 96 in the training arguments but the tensor shapes "
        "say 80"
    )


def test_sinkhorn_is_refused(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    named = "moe_router_load_balancing_type"
    root = with_args(fixtures["qwen3_moe"], tmp_path / "sinkhorn", **{named: "sinkhorn"})
    (problem,) = refusal(lambda: load(root, Options()))
    assert "moe_router_load_balancing_type='sinkhorn'" in problem
    root = with_args(fixtures["qwen3_moe"], tmp_path / "losses", **{named: ["aux_loss", "none"]})
    assert load(root, Options()).choice.family.name == "qwen3_moe"


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("ernie4_5-tp2", "rotary_interleaved", False),
        ("ernie4_5_moe-tp2-ep2", "rotary_interleaved", False),
        ("minimax_m2-tp2-ep2", "moe_router_score_function", "softmax"),
        ("minimax_m2-tp2-ep2", "moe_router_topk_scaling_factor", 2.5),
        ("minimax_m2-tp2-ep2", "moe_router_num_groups", 4),
        ("hy_v3-tp2-ep2", "moe_router_group_topk", 2),
        ("hy_v3-tp2-ep2", "moe_router_topk", 1),
        ("dots1-tp2-ep2", "moe_router_score_function", "softmax"),
        ("bailing_moe_v2-tp2-ep2", "moe_router_score_function", "softmax"),
        ("bailing_moe_v2-tp2-ep2", "add_bias_linear", True),
        ("dots1-tp2-groups", "moe_router_group_topk", 1),
        ("exaone4-tp2", "no_rope_freq", [0, 0, 0, 1]),
        ("exaone_moe-tp2-ep2", "no_rope_freq", [0, 0, 0, 0]),
        ("exaone_moe-tp2-ep2", "swiglu_limits", [0.0, 7.0, 0.0, 0.0]),
        ("exaone_moe-tp2-ep2", "sliding_windows", [8, 16, 8, 0]),
        ("exaone_moe-tp2-ep2-mtp", "mtp_sliding_windows", [16]),
        ("exaone_moe-tp2-ep2-mtp", "mtp_sliding_windows", [0, 0]),
        ("exaone4-tp2-window", "no_rope_freq", [0, 0, 0, 1]),
        ("exaone4-tp2", "swiglu", False),
        ("ernie4_5_moe-tp2-ep2", "moe_router_score_function", "sigmoid"),
        ("ernie4_5_moe-tp2-ep2", "moe_router_pre_softmax", True),
        ("glm4-tp2", "rotary_interleaved", False),
        ("phi3-tp2", "use_rope_scaling", True),
        ("phi3-tp2", "rotary_seq_len_interpolation_factor", 2),
        ("phi3-tp2", "swiglu", False),
        ("nemotron-tp2", "normalization", "RMSNorm"),
        ("nemotron-tp2", "squared_relu", False),
        ("nemotron-tp2", "swiglu", True),
        ("nemotron-tp2", "apply_layernorm_1p", False),
        ("nemotron-tp2", "layernorm_zero_centered_gamma", False),
        ("gemma-tp2", "layernorm_zero_centered_gamma", False),
        ("gemma-tp2", "activation_func", "gelu"),
        ("gemma2-tp2-pp2", "window_attn_skip_freq", 6),
        ("gemma2-tp2-pp2", "softmax_scale", 0.5),
        ("gemma2-tp2-pp2", "swiglu", True),
        ("gemma3_text-tp2-pp2", "activation_func", "silu"),
        ("gemma3_text-tp2-pp2", "use_rope_scaling", True),
    ],
)
def test_what_a_family_is_known_by_is_not_optional(
    fixtures: Mapping[str, Fixture], name: str, argument: str, value: object, tmp_path: Path
) -> None:
    root = with_args(fixtures[name], tmp_path, **{argument: value})
    options = Options(family=fixtures[name].spec.family)
    (problem,) = refusal(lambda: load(root, options))
    assert f"{argument}={value!r}" in problem


def test_the_attention_of_a_layer_for_prediction_must_be_told(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["exaone_moe-tp2-ep2-mtp"]
    size = fixture.spec.vocab_size
    assert load(fixture.root, Options(vocab_size=size)).config["mtp_sliding_windows"] == [0]
    silent = with_args(fixture, tmp_path / "silent", mtp_sliding_windows=..., mtp_layer_types=...)
    (problem,) = refusal(lambda: load(silent, Options(vocab_size=size)))
    assert problem.startswith("nothing tells whether its layer for multi-token prediction")
    model = load(silent, Options(vocab_size=size, mtp=False))
    assert model.config["num_nextn_predict_layers"] == 0
    assert not [key for key in model.config if key.startswith("mtp_")]
    # What has no window anywhere is the same in every version, but for what Megatron-Bridge says.
    full = {"window_size": None, "no_rope_freq": None}
    plain = with_args(
        fixture, tmp_path / "plain", mtp_sliding_windows=..., mtp_layer_types=..., **full
    )
    named = Options(vocab_size=size, family="exaone_moe")
    assert load(plain, named).config["mtp_layer_types"] == ["full_attention"]
    still = with_args(fixture, tmp_path / "still", mtp_sliding_windows=[0], **full)
    (problem,) = refusal(lambda: load(still, named))
    assert "rotates nothing" in problem


def test_experts_have_no_place_in_a_dense_layer_for_prediction(
    fixtures: Mapping[str, Fixture],
) -> None:
    options = Options(family="exaone_moe")
    problems = refusal(lambda: load(fixtures["glm4_moe-tp2-ep2-mtp"].root, options))
    (told,) = (problem for problem in problems if ".mlp.router.weight" in problem)
    assert told.startswith("the checkpoint holds mtp.layers.0.transformer_layer.mlp.router.weight")
    assert told.endswith("(--no-mtp leaves it out)")


def test_a_window_counts_the_token_itself(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures["mistral-tp2"]
    assert load(fixture.root, Options()).config["sliding_window"] == 8
    given = reference(fixture, tmp_path / "given", sliding_window=7)
    model = load(fixture.root, Options(hf_config=given))
    assert model.config["sliding_window"] == 7
    assert said(model, "sliding_window is 7 as in --hf-config (training used 8)")
    root = with_args(fixture, tmp_path, window_size=None)
    assert load(root, Options(family="mistral")).config["sliding_window"] is None
    assert load(fixtures["mixtral-tp2-window"].root, Options()).config["sliding_window"] == 8
    assert load(fixtures["mixtral-tp2-ep2"].root, Options()).config["sliding_window"] is None


@pytest.mark.parametrize("name", ["llama-tp2-around-zero", "gpt2-tp2-around-zero"])
def test_norms_around_zero_are_said_and_known_by_either_name(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    assert said(load(fixtures[name].root, Options()), "1 is added to their weights")
    assert not said(load(fixtures["llama-tp2"].root, Options()), "1 is added to their weights")
    changes = {"apply_layernorm_1p": ..., "layernorm_zero_centered_gamma": True}
    newer = load(with_args(fixtures[name], tmp_path, **changes), Options())
    added = [tensor.name for tensor in newer.tensors if isinstance(tensor.view, Add)]
    assert len(added) == 2 * fixtures[name].spec.layers + 1


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma-tp2", {"hidden_act": "gelu", "hidden_activation": None}),  # google/gemma-2b
        ("nemotron-tp2", {"rope_parameters": ..., "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        (
            "gemma3_text-tp2-pp2",
            {"rope_parameters": ..., "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        ),
        ("gemma2-tp2-pp2", {}),
        ("gemma3_text-tp2-pp2", {}),
    ],
)
def test_references_of_either_age_agree(
    fixtures: Mapping[str, Fixture], name: str, changes: Mapping[str, object], tmp_path: Path
) -> None:
    fixture = fixtures[name]
    given = reference(fixture, tmp_path / "given", **changes)
    model = load(fixture.root, Options(hf_config=given))
    found = attributes(write_config(model, tmp_path / "ours"))
    assert found["rope_parameters"] == attributes(fixture.hf)["rope_parameters"]
    assert found.get("hidden_act") == attributes(fixture.hf).get("hidden_act")


@pytest.mark.parametrize(
    ("name", "key", "theirs"),
    [
        ("nemotron-tp2", "partial_rotary_factor", 0.75),
        ("phi3-tp2-tied", "partial_rotary_factor", 1.0),
        ("glm4-tp2", "attention_bias", False),
        ("ernie4_5-tp2", "use_bias", True),
        ("ernie4_5_moe-tp2-ep2", "moe_num_shared_experts", 1),
        ("ernie4_5_moe-tp2-ep2", "moe_k", 6),
        ("mimo-tp2", "attention_bias", False),
        ("minimax_m2-tp2-ep2", "rotary_dim", 16),
        ("minimax_m2-tp2-ep2", "num_experts_per_tok", 8),
        ("hy_v3-tp2-ep2", "router_scaling_factor", 1.0),
        ("hy_v3-tp2-ep2", "mlp_layer_types", ["sparse"] * 4),
        ("hy_v3-tp2-ep2", "num_shared_experts", 2),
        ("exaone_moe-tp2-ep2-mtp", "mtp_layer_types", ["sliding_attention"]),
        ("dots1-tp2-ep2", "n_shared_experts", 1),
        ("bailing_moe_v2-tp2-ep2", "partial_rotary_factor", 1.0),
        ("bailing_moe_v2-tp2-ep2", "use_qkv_bias", True),
        ("bailing_moe_v2-tp2-groups", "topk_group", 4),
        ("dots1-tp2-ep2", "layer_types", ["sliding_attention"] * 4),
        ("exaone4-tp2", "layer_types", ["sliding_attention"] * 4),
        ("exaone_moe-tp2-ep2", "layer_types", ["full_attention"] * 4),
        ("exaone_moe-tp2-ep2", "routed_scaling_factor", 1.0),
        ("exaone4-tp2-window", "layer_types", ["full_attention"] * 4),
        ("ernie4_5_moe-tp2-ep2", "use_bias", True),
        ("gemma2-tp2-pp2", "attn_logit_softcapping", 30.0),
        ("gemma2-tp2-pp2", "layer_types", ["full_attention"] * 4),
        ("gemma3_text-tp2-pp2", "rope_local_base_freq", 1e5),
        ("gemma3_text-tp2-pp2", "query_pre_attn_scalar", 16),
        ("gemma3_text-tp2-pp2", "sliding_window", 7),
        ("gemma3_text-tp2-pp2", "layer_types", ["sliding_attention"] * 6),
    ],
)
def test_references_of_other_models_do_not(
    fixtures: Mapping[str, Fixture], name: str, key: str, theirs: object, tmp_path: Path
) -> None:
    options = Options(family=family_to_name(fixtures[name].spec))
    config = load(fixtures[name].root, options).config
    ropes = {key: config[key] for key in config if key.startswith(("rope_theta", "rope_local"))}
    changes = {**ropes, "rope_parameters": ..., key: theirs}
    given = reference(fixtures[name], tmp_path, **changes)
    (problem,) = refusal(lambda: load(fixtures[name].root, Options(hf_config=given)))
    assert f"{key} is " in problem
    assert f"but {json.dumps(theirs)} in --hf-config" in problem


def test_layers_with_windows_may_be_named_one_by_one(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures["gemma3_text-tp2-pp2"]
    kinds = ["full_attention", *["sliding_attention"] * 5]
    root = with_args(fixture, tmp_path, interleaved_attn_pattern=kinds)
    assert load(root, Options()).config["layer_types"] == kinds


@pytest.mark.parametrize("pattern", [["full_attention"] * 5, [0, 0], [-1, 2], 6, None])
def test_layers_with_windows_must_be_known(
    fixtures: Mapping[str, Fixture], pattern: object, tmp_path: Path
) -> None:
    root = with_args(fixtures["gemma3_text-tp2-pp2"], tmp_path, interleaved_attn_pattern=pattern)
    problems = refusal(lambda: load(root, Options()))
    assert problems[-1].startswith("layer_types is unknown")
    if len(problems) > 1:  # a list of another length is told, too
        (told, _) = problems
        assert told.startswith("interleaved_attn_pattern in the training arguments has 5 entries")


def test_scaled_rotary_embeddings_of_gemma3(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    root = with_args(fixtures["gemma3_text-tp2-pp2"], tmp_path, rope_scaling_factor=8.0)
    found = attributes(write_config(load(root, Options()), tmp_path / "config"))
    assert found["rope_parameters"] == {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000},
    }


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("stated", "kept"),
    [
        (YARN, YARN),
        (
            {"type": "yarn", "rope_theta": 1e6, **{k: YARN[k] for k in YARN if k != "rope_type"}},
            YARN,
        ),
        ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_type": "default", "rope_theta": 1e6}, None),
        ({"type": "mrope", "mrope_section": [16, 24, 24]}, None),
        (None, None),
    ],
)
@pytest.mark.parametrize("name", ["qwen3", "qwen2-tp2-pp2", "deepseek_v3-moonlight-tp2"])
def test_scaling_that_ms_swift_keeps_is_not_lost(
    fixtures: Mapping[str, Fixture], name: str, stated: object, kept: object, tmp_path: Path
) -> None:
    root = with_args(fixtures[name], tmp_path, rope_scaling=stated)
    model = load(root, Options())
    assert model.config["rope_scaling"] == kept
    rope = model.config["rope_parameters"]
    assert isinstance(rope, dict)
    assert rope["rope_type"] == ("default" if kept is None else kept["rope_type"])  # type: ignore[index]
    if kept is not None:  # a reference may extend the context, but not without a word
        given = reference(fixtures[name], tmp_path / "given", rope_scaling={**YARN, "factor": 8.0})
        assert said(load(root, Options(hf_config=given)), "rope_scaling is ")


def test_biases_are_said(fixtures: Mapping[str, Fixture]) -> None:
    for name, biased in (("llama-tp2", False), ("llama-tp2-biased", True)):
        config = load(fixtures[name].root, Options()).config
        assert config["attention_bias"] is config["mlp_bias"] is biased


# -- vocabulary -----------------------------------------------------------------------------------


def test_vocabulary_is_cut_where_args_or_reference_say(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    model = load(fixtures["qwen3-tp2"].root, Options())
    assert model.config["vocab_size"] == 307
    assert said(model, "512 rows are cut to 307, from vocab_size in the training arguments")
    given = reference(fixtures["qwen3"], tmp_path)
    model = load(fixtures["qwen3"].root, Options(hf_config=given))
    assert model.config["vocab_size"] == 307
    assert said(model, "cut to 307, from vocab_size in --hf-config")


def test_the_user_has_the_last_word_on_the_vocabulary(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    given = reference(fixtures["qwen3"], tmp_path)
    model = load(fixtures["qwen3"].root, Options(hf_config=given, vocab_size=310))
    assert model.config["vocab_size"] == 310
    assert said(model, "vocab_size is 310 as in the checkpoint (--hf-config says 307)")


def test_a_vocabulary_larger_than_the_embedding_is_refused(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    given = reference(fixtures["qwen3"], tmp_path, vocab_size=151936)
    (problem,) = refusal(lambda: load(fixtures["qwen3"].root, Options(hf_config=given)))
    for text in ("151936", "384 rows", "--vocab-size 384"):
        assert text in problem
    kept = load(fixtures["qwen3"].root, Options(hf_config=given, vocab_size=384))
    assert kept.config["vocab_size"] == 384
    for asked in (Options(vocab_size=0), Options(vocab_size=-1), Options(vocab_size=385)):
        with pytest.raises(MappingError, match=f"--vocab-size is {asked.vocab_size} but"):
            load(fixtures["qwen3"].root, asked)


def test_rows_that_cannot_be_padding_are_not_cut_unasked(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """A reference from before tokens were added: 384 rows are no padding of 256."""
    given = reference(fixtures["qwen3"], tmp_path, vocab_size=256)
    (problem,) = refusal(lambda: load(fixtures["qwen3"].root, Options(hf_config=given)))
    for text in ("256", "384 rows", "at most 127 rows of padding", "--vocab-size"):
        assert text in problem
    assert load(fixtures["qwen3"].root, Options(vocab_size=256)).config["vocab_size"] == 256


def test_null_tokenizers_have_one_token_more(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    root = with_args(fixtures["qwen3"], tmp_path, tokenizer_type="NullTokenizer", vocab_size=306)
    assert load(root, Options()).config["vocab_size"] == 307


# -- with a reference -----------------------------------------------------------------------------


def test_checkpoints_without_args_need_a_reference(fixtures: Mapping[str, Fixture]) -> None:
    problems = refusal(lambda: load(fixtures["qwen3-tied"].root, Options()))
    for key in ("rope_theta", "rms_norm_eps"):
        (problem,) = [p for p in problems if p.startswith(f"{key} is unknown")]
        assert "records no training arguments" in problem
        assert "--hf-config" in problem


@pytest.mark.parametrize("as_file", [False, True])
def test_a_reference_gives_what_megatron_does_not_record(
    fixtures: Mapping[str, Fixture], as_file: bool, tmp_path: Path
) -> None:
    fixture = fixtures["qwen3-tied"]
    given = fixture.hf / "config.json" if as_file else fixture.hf
    model = load(fixture.root, Options(hf_config=given))
    expected = attributes(fixture.hf)
    found = attributes(write_config(model, tmp_path))
    extra = {"rope_theta", "rope_scaling", "torch_dtype"} - set(expected)
    assert {key: value for key, value in found.items() if key not in extra} == expected
    assert model.config["rope_theta"] == 1_000_000
    assert model.config["tie_word_embeddings"] is True


CONFLICTS: Mapping[str, tuple[object, str]] = {
    "hidden_size": (128, "64"),
    "num_hidden_layers": (5, "4"),
    "num_attention_heads": (16, "8"),
    "num_key_value_heads": (8, "4"),
    "head_dim": (32, "16"),
    "intermediate_size": (100, "96"),
    "rms_norm_eps": (1e-5, "1e-06"),
    "rope_theta": (10_000, "1000000"),
    "hidden_act": ("gelu", '"silu"'),
    "attention_bias": (True, "false"),
    "use_sliding_window": (True, "false"),
}


def test_all_conflicts_are_told_at_once(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    wrong = {name: theirs for name, (theirs, _) in CONFLICTS.items()}
    given = reference(fixtures["qwen3"], tmp_path, rope_parameters=..., **wrong)
    problems = refusal(lambda: load(fixtures["qwen3"].root, Options(hf_config=given)))
    assert len(problems) == len(CONFLICTS)
    for name, (theirs, ours) in CONFLICTS.items():
        (problem,) = [p for p in problems if p.startswith(f"{name} is ")]
        assert f"{name} is {ours} in the checkpoint but {json.dumps(theirs)} in --hf" in problem


@pytest.mark.parametrize(
    ("key", "theirs", "ours"),
    [
        ("num_local_experts", 16, "8"),
        ("moe_intermediate_size", 96, "48"),
        ("num_experts_per_tok", 4, "2"),
        ("norm_topk_prob", False, "true"),
        ("mlp_only_layers", [1], "[0]"),
        ("decoder_sparse_step", 2, "1"),
    ],
)
def test_moe_conflicts(
    fixtures: Mapping[str, Fixture], key: str, theirs: object, ours: str, tmp_path: Path
) -> None:
    fixture = fixtures["qwen3_moe-mixed-pp2"]
    given = reference(fixture, tmp_path, **{key: theirs})
    (problem,) = refusal(lambda: load(fixture.root, Options(hf_config=given)))
    assert f"is {ours} in the checkpoint but {json.dumps(theirs)} in --hf-config" in problem


def test_a_reference_overrules_what_changes_no_output(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    given = reference(fixtures["qwen3"], tmp_path, max_position_embeddings=40960, use_cache=False)
    model = load(fixtures["qwen3"].root, Options(hf_config=given))
    assert model.config["max_position_embeddings"] == 40960
    assert said(model, "max_position_embeddings is 40960 as in --hf-config (training used 512)")
    assert model.config["use_cache"] is False


def test_reference_keys_that_are_not_ours_are_kept_or_dropped(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    given = reference(
        fixtures["qwen3"],
        tmp_path,
        my_key={"a": [1]},
        quantization_config={"quant_method": "fp8"},
        auto_map={"AutoConfig": "evil.Config"},
        dtype="float32",
        eos_token_id=[2, 0],
        head_dim=None,
    )
    config = load(fixtures["qwen3"].root, Options(hf_config=given)).config
    assert config["my_key"] == {"a": [1]}
    assert config["eos_token_id"] == [2, 0]
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["head_dim"] == 16  # null in a reference says nothing
    assert not {"quantization_config", "auto_map", "transformers_version"} & set(config)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {**YARN, "rope_theta": 1_000_000.0}},
        {"rope_parameters": ..., "rope_theta": 1_000_000, "rope_scaling": YARN},
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "rope_theta": 1_000_000,
            "rope_scaling": {"type": "yarn", **{k: v for k, v in YARN.items() if k != "rope_type"}},
        },
        {"rope_parameters": {**YARN, "rope_theta": 1_000_000.0}, "rope_scaling": None},
    ],
)
def test_rope_scaling_of_a_reference_survives(
    fixtures: Mapping[str, Fixture], spelling: Mapping[str, object], tmp_path: Path
) -> None:
    given = reference(
        fixtures["qwen3"], tmp_path / "given", max_position_embeddings=2048, **spelling
    )
    model = load(fixtures["qwen3"].root, Options(hf_config=given))
    assert model.config["rope_scaling"] == YARN
    assert said(model, "rope_scaling is {")
    rope = attributes(write_config(model, tmp_path / "ours"))["rope_parameters"]
    assert rope == {**YARN, "rope_theta": 1_000_000}
    expected = attributes(given)["rope_parameters"]
    assert rope == {name: value for name, value in expected.items() if name != "type"}


def test_rope_conflicts_are_seen_in_both_spellings(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    given = reference(
        fixtures["qwen3"], tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5e6}
    )
    (problem,) = refusal(lambda: load(fixtures["qwen3"].root, Options(hf_config=given)))
    assert "rope_theta is 1000000 in the checkpoint but 5000000.0 in --hf-config" in problem
    scaled = with_args(fixtures["qwen3"], tmp_path, use_rope_scaling=True)
    reference(fixtures["qwen3"], given, rope_parameters={**YARN, "rope_theta": 1e6})
    (problem,) = refusal(lambda: load(scaled, Options(hf_config=given)))
    assert "rope_scaling is {" in problem
    assert "llama3" in problem
    assert "yarn" in problem


def test_a_stored_output_layer_is_served_whatever_is_said(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    """A tied model whose fine-tuning stored a head of its own: the tensors decide."""
    given = reference(fixtures["qwen3"], tmp_path, tie_word_embeddings=True)
    root = with_args(fixtures["qwen3"], tmp_path, untie_embeddings_and_output_weights=False)
    model = load(root, Options(hf_config=given))
    assert model.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in {tensor.name for tensor in model.tensors}
    assert said(model, "the checkpoint stores output_layer.weight")
    assert said(model, "tie_word_embeddings is false as in the checkpoint")


def test_a_missing_output_layer_is_seen(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures["qwen3-tp2-pp2-tied"]
    root = with_args(fixture, tmp_path, untie_embeddings_and_output_weights=True)
    (problem,) = refusal(lambda: load(root, Options()))
    assert "holds no output_layer.weight" in problem
    given = reference(fixture, tmp_path, tie_word_embeddings=False)
    (problem,) = refusal(lambda: load(fixture.root, Options(hf_config=given)))
    assert problem.startswith("tie_word_embeddings is true in the checkpoint but false in --hf")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "there is no config.json"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "names no model_type"),
        ('{"tokenizer_class": "X"}', "names no model_type"),
        ('{"model_type": "bloom"}', "which is not supported yet. Supported: .*qwen3, .*qwen3_moe"),
    ],
)
def test_references_that_cannot_be_used(
    fixtures: Mapping[str, Fixture], content: str | None, why: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises((CheckpointError, MappingError), match=why):
        load(fixtures["qwen3"].root, Options(hf_config=tmp_path))


def test_generation_config_is_the_references_own(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    given = reference(fixtures["qwen3"], tmp_path)
    text = b'{"eos_token_id": [2, 0],\n "temperature": 0.6}'
    (given / "generation_config.json").write_bytes(text)
    for path in (given, given / "config.json"):
        assert load(fixtures["qwen3"].root, Options(hf_config=path)).generation_config == text


def test_generation_config_without_one(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    from transformers import GenerationConfig

    given = reference(fixtures["qwen3"], tmp_path, eos_token_id=[2, 0])
    for hf_config, eos in ((None, 2), (given, [2, 0])):
        model = load(fixtures["qwen3"].root, Options(hf_config=hf_config))
        (tmp_path / "generation_config.json").write_bytes(model.generation_config)
        found = GenerationConfig.from_pretrained(tmp_path)
        assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (0, eos, 0)
        (tmp_path / "generation_config.json").unlink()


def test_unknown_dtype_is_refused(fixtures: Mapping[str, Fixture]) -> None:
    with pytest.raises(CheckpointError, match="--dtype int8: expected one of bfloat16"):
        load(fixtures["qwen3"].root, Options(dtype="int8"))
