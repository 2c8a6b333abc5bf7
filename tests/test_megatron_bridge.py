"""What Megatron-Bridge leaves: `run_config.yaml`, as real ones wrote it, beside real shards."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core.transformer import TransformerConfig

from mcorefs.errors import CheckpointError, MappingError
from mcorefs.inspection import inspect
from mcorefs.model import Options, load
from tests.checkpoints import Fixture, ensure
from tests.edited import copy
from tests.recordings import RECORDED, assert_same_bytes, differences, recorded
from tests.trained_tokenizers import trained

DENSE, LLAMA, MOE = "qwen3-tied", "llama-tp2", "qwen3_moe-tp2-pp2-ep2"
SAID_BY_CLASS = "the trainer names model_type"
GEMMA: Mapping[str, Mapping[str, object]] = {
    "gemma-tp2": {},
    "gemma2-tp2-pp2": {
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "window_size": [7, 0],
    },
    "gemma3_text-tp2-pp2": {
        "num_layers": 6,
        "qk_layernorm": True,
        "window_size": 8,
        "interleaved_attn_pattern": [2, 1],
        "rotary_base": [10_000, 1_000_000],
        "rope_scaling_factor": 1.0,
        "softmax_scale": 24**-0.5,
    },
}
"""What the providers of Megatron-Bridge:src/megatron/bridge/models/gemma/ add to their ancestor."""
DENSE_CONFIG = f"megatron_bridge/0.3.1/{DENSE}.yaml"


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure([DENSE, LLAMA, MOE, *GEMMA])


def saved(fixture: Fixture, directory: Path, run_config: str) -> Path:
    """The root of a copy as Megatron-Bridge leaves it."""
    iteration = copy(fixture, directory)
    torch.save({"checkpoint_version": 3.0, "iteration": 100}, iteration / "common.pt")
    shutil.copytree(fixture.tokenizer, iteration / "tokenizer")
    (iteration / "run_config.yaml").write_text(run_config)
    return iteration.parent


def changed(name: str, **changes: object) -> str:
    """A recorded run_config.yaml with some fields of its model changed."""
    config = recorded(name)
    config["model"] |= changes
    return yaml.safe_dump(config)


def nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same in the form of builders, with the TransformerConfig in a mapping of its own.

    A stand-in, after Megatron-Bridge:src/megatron/bridge/models/gpt (BridgeGPTModelConfig)."""
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    model = dict(config["model"])
    transformer = {name: model.pop(name) for name in list(model) if name in fields}
    named = {"hf_model_id": model.pop("hf_model_id", None)}
    target = "megatron.bridge.models.gpt.BridgeGPTModelConfig"
    model |= {"_target_": target, "transformer": transformer, "extra_checkpoint_metadata": named}
    return {**config, "model": model}


@pytest.mark.parametrize(
    ("version", "settings", "why"),
    [
        ("0.3.1", {}, "it puts nothing before a text"),
        ("0.2.2", {}, "it puts '<s>' before a text"),
        ("0.3.1", {"legacy_tokenizer": True}, "it puts '<s>' before a text"),
        (
            "0.3.1",
            {"sp_tokenizer_kwargs": {"legacy": True, "special_tokens": ["<a>"]}},
            "special tokens of the run's own",
        ),
    ],
)
def test_a_sentencepiece_model_with_the_settings_of_the_run(
    fixtures: Mapping[str, Fixture],
    tmp_path: Path,
    version: str,
    settings: dict[str, object],
    why: str,
) -> None:
    config = recorded(f"megatron_bridge/{version}/{LLAMA}.yaml")
    config["tokenizer"] |= {"tokenizer_type": "Llama2Tokenizer", **settings}
    root = saved(fixtures[LLAMA], tmp_path, yaml.safe_dump(config))
    place = next(root.glob("iter_*")) / "tokenizer"
    shutil.rmtree(place)
    place.mkdir()
    (place / "tokenizer.model").write_bytes(trained("llama"))
    model = load(root, Options())
    said = [*model.remarks, *(str(data) for data in model.tokenizer.files.values())]
    assert any(why in text for text in said)


def test_the_form_of_builders(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    text = yaml.safe_dump(nested(recorded(f"megatron_bridge/0.3.1/{LLAMA}.yaml")))
    model = load(saved(fixtures[LLAMA], tmp_path, text), Options())
    assert differences(model, fixtures[LLAMA], tmp_path) == {}
    assert_same_bytes(model, fixtures[LLAMA])


@pytest.mark.parametrize(
    ("version", "name", "told"),
    [
        ("0.2.2", LLAMA, f"{SAID_BY_CLASS} llama"),
        ("0.2.2", MOE, f"{SAID_BY_CLASS} qwen3_moe"),
        ("0.3.1", DENSE, "has decoder.layers.*.self_attention.k_layernorm."),
        ("0.3.1", LLAMA, "not mistral: window_size is not set"),
    ],
)
def test_everything_comes_from_the_run_config(
    fixtures: Mapping[str, Fixture], tmp_path: Path, version: str, name: str, told: str
) -> None:
    fixture = fixtures[name]
    text = (RECORDED / f"megatron_bridge/{version}/{name}.yaml").read_text()
    root = saved(fixture, tmp_path, text)
    model = load(root, Options())
    assert model.companions.trainer == "Megatron-Bridge"
    assert model.companions.args_source.endswith("run_config.yaml")
    assert model.tokenizer.source.endswith(f"{fixture.iteration.name}/tokenizer")
    assert any(reason.startswith(told) for reason in model.choice.evidence)
    assert any("which is not on this machine" in remark for remark in model.remarks)
    # Trained at 256; up to 0.2 the class has a field of that name too, which means nothing.
    other = {} if name != MOE else {"max_position_embeddings": 40960}
    assert differences(model, fixture, tmp_path) == other
    assert_same_bytes(model, fixture)


@pytest.mark.parametrize(
    ("name", "is_hinted"), [(name, True) for name in GEMMA] + [(name, False) for name in GEMMA][1:]
)
def test_gemma_as_its_providers_are_written(
    fixtures: Mapping[str, Fixture], tmp_path: Path, name: str, is_hinted: bool
) -> None:
    fixture = fixtures[name]
    kind = {"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3"}[fixture.spec.family]
    provider = f"megatron.bridge.models.gemma.{kind.lower()}_provider.{kind}ModelProvider"
    changes: dict[str, object] = {
        "_target_": provider
        if is_hinted
        else "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "activation_func": {"_target_": "megatron.core.activations.fast_gelu", "_call_": False},
        "layernorm_zero_centered_gamma": True,
        "layernorm_epsilon": 1e-6,
        "share_embeddings_and_output_weights": True,
        "rope_scaling": False,
        "rotary_base": 10_000,
        **GEMMA[name],
    }
    root = saved(fixture, tmp_path, changed(f"megatron_bridge/0.3.1/{LLAMA}.yaml", **changes))
    model = load(root, Options())
    assert differences(model, fixture, tmp_path) == {}
    assert_same_bytes(model, fixture)


def test_rope_scaling_that_is_not_the_usual_one(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    factors = {"low_freq_factor": 2.0, "high_freq_factor": 8.0, "old_context_len": 4096}
    text = changed(f"megatron_bridge/0.2.2/{LLAMA}.yaml", scale_factor=16.0, **factors)
    model = load(saved(fixtures[LLAMA], tmp_path, text), Options())
    assert model.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 8.0,
        "original_max_position_embeddings": 4096,
    }


def test_parallel_sizes_are_shown(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    text = (RECORDED / f"megatron_bridge/0.2.2/{MOE}.yaml").read_text()
    found = inspect(saved(fixtures[MOE], tmp_path, text), Options())
    assert not found.problems
    assert found.parallel == {"TP": 2, "PP": 2, "EP": 2, "ETP": 1, "CP": 1}


@pytest.mark.parametrize("is_nested", [False, True])
def test_what_nothing_says_is_named_at_once(
    fixtures: Mapping[str, Fixture], tmp_path: Path, is_nested: bool
) -> None:
    config = recorded(DENSE_CONFIG)
    del config["model"]["rotary_base"], config["model"]["layernorm_epsilon"]
    root = saved(fixtures[DENSE], tmp_path, yaml.safe_dump(nested(config) if is_nested else config))
    with pytest.raises(MappingError) as caught:
        load(root, Options())
    unknown = [problem.partition(" is unknown")[0] for problem in caught.value.problems]
    assert sorted(unknown) == ["rms_norm_eps", "rope_theta"]


def test_contradictions_are_told(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    root = saved(fixtures[DENSE], tmp_path, changed(DENSE_CONFIG, num_layers=7, kv_channels=32))
    with pytest.raises(MappingError) as caught:
        load(root, Options())
    assert any("num_layers is 7 in the training arguments" in p for p in caught.value.problems)
    assert any("kv_channels is 32" in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"activation_func": "gelu"}, "swiglu"),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu", "_call_": False}}, "swiglu"),
        ({"activation_func": "fast_gelu"}, "swiglu"),
        ({"activation_func": "squared_relu", "gated_linear_unit": False}, "swiglu"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type"),
        ({"window_size": [128, 0]}, "window_size"),
        ({"qk_l2_norm": True}, "qk_l2_norm"),
        ({"softmax_type": "off-by-one"}, "softmax_type"),
        ({"softmax_scale": 0.5}, "softmax_scale"),
        ({"use_mup": True}, "use_mup"),
    ],
)
def test_what_the_family_cannot_express_is_refused(
    fixtures: Mapping[str, Fixture], tmp_path: Path, changes: dict[str, object], refused: str
) -> None:
    root = saved(fixtures[DENSE], tmp_path, changed(DENSE_CONFIG, **changes))
    with pytest.raises(MappingError, match=f"was trained with {refused}="):
        load(root, Options())


def test_rows_that_are_no_padding(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    """A preset vocabulary has that many rows, all of them tokens (training/setup.py)."""
    fixture = fixtures[DENSE]
    rows = fixture.spec.padded_vocab_size
    preset = changed(DENSE_CONFIG, vocab_size=rows, should_pad_vocab=False)
    model = load(saved(fixture, tmp_path / "preset", preset), Options())
    assert model.config["vocab_size"] == rows
    wrong = changed(DENSE_CONFIG, should_pad_vocab=False)
    with pytest.raises(MappingError, match=f"padded_vocab_size is {fixture.spec.vocab_size}"):
        load(saved(fixture, tmp_path / "wrong", wrong), Options())


@pytest.mark.parametrize("is_nested", [False, True])
def test_the_model_it_was_made_from_if_it_is_here(
    fixtures: Mapping[str, Fixture], tmp_path: Path, is_nested: bool
) -> None:
    fixture = fixtures[DENSE]
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(fixture.hf / "config.json", source)
    shutil.copy(fixture.hf / "generation_config.json", source)
    config = recorded(DENSE_CONFIG)
    config["model"]["hf_model_id"] = str(source)
    config = nested(config) if is_nested else config
    found = load(saved(fixture, tmp_path, yaml.safe_dump(config)), Options())
    assert found.companions.hf_directories == (source,)
    assert found.generation_config == (source / "generation_config.json").read_bytes()
    assert not any("not on this machine" in remark for remark in found.remarks)


def test_what_it_exported_itself(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures[DENSE]
    root = saved(fixture, tmp_path, (RECORDED / DENSE_CONFIG).read_text())
    exported = root / fixture.iteration.name / "hf"
    shutil.copytree(fixture.hf, exported)
    model = load(root, Options())
    assert model.companions.hf_directories == (exported,)
    assert model.generation_config == (exported / "generation_config.json").read_bytes()
    assert sum(remark.startswith(f"{exported} holds") for remark in model.remarks) == 1
    (exported / "model.safetensors").rename(exported / "adapter_model.safetensors")
    (exported / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    model = load(root, Options())  # an adapter's config.json, if any, is its base model's
    assert model.companions.hf_directories == ()
    assert f"{exported} holds what Megatron-Bridge itself exported" in model.remarks


def test_a_save_without_run_config(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures[DENSE]
    root = saved(fixture, tmp_path, "")
    iteration = root / fixture.iteration.name
    (iteration / "run_config.yaml").unlink()
    torch.save({"step": torch.tensor(100)}, iteration / "train_state.pt")
    model = load(root, Options(hf_config=fixture.hf))
    assert model.companions.trainer == "Megatron-Bridge"
    assert any("there is no" in remark and "run_config.yaml" in remark for remark in model.remarks)
    with pytest.raises(MappingError, match="rms_norm_eps is unknown"):
        load(root, Options())
    (iteration / "train_state.pt").unlink()
    assert load(root, Options(hf_config=fixture.hf)).companions.trainer == "Megatron-LM"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("- a list", "holds no mapping"),
        ("model: [", "cannot be read"),
        ("a: &a [*a]", "cannot be read"),
    ],
)
def test_a_run_config_that_is_none(
    fixtures: Mapping[str, Fixture], tmp_path: Path, text: str, why: str
) -> None:
    root = saved(fixtures[DENSE], tmp_path, text)
    with pytest.raises(CheckpointError, match=rf"run_config\.yaml {why}"):
        load(root, Options())


def test_a_run_config_without_a_model(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures[DENSE]
    root = saved(fixture, tmp_path, "model: null\ntokenizer: text\ncheckpoint: [1]")
    with pytest.raises(MappingError, match="rope_theta is unknown"):
        load(root, Options())
    assert load(root, Options(hf_config=fixture.hf)).companions.args == {}
