"""What lies beside a checkpoint, and what is made of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from mcorefs import trainers
from mcorefs.errors import CheckpointError, MappingError
from mcorefs.files import read_all
from mcorefs.formats import Checkpoint
from mcorefs.locate import Location
from mcorefs.model import Model, Options, load
from mcorefs.trainers import Companions
from mcorefs.trainers.class_names import model_type
from mcorefs.trainers.transformer_config import arguments
from mcorefs.tree import build
from tests.checkpoints import Fixture, ensure
from tests.edited import copy, with_args


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return ensure(["qwen3-tied"])["qwen3-tied"]  # records no arguments


@dataclass(frozen=True)
class Someone:
    """A trainer that leaves a Hugging Face directory."""

    directory: Path
    name: str = "Someone"

    def read(self, location: Location, checkpoint: Checkpoint) -> Companions | None:
        return Companions(
            self.name, {}, "nothing", "qwen3", (self.directory,), remarks=("by someone",)
        )


def test_megatron_lm_is_the_last_to_answer(fixture: Fixture) -> None:
    model = load(fixture.root, Options(hf_config=fixture.hf))
    assert model.companions.trainer == "Megatron-LM"
    assert model.companions.args == model.checkpoint.args == {}


def test_a_directory_beside_the_checkpoint_is_the_reference(
    fixture: Fixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(MappingError, match="rms_norm_eps is unknown"):
        load(fixture.root, Options())
    config = json.loads((fixture.hf / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_bytes((fixture.tokenizer / "tokenizer.json").read_bytes())
    monkeypatch.setattr(trainers, "TRAINERS", (Someone(tmp_path),))
    model = load(fixture.root, Options())
    assert model.config["rms_norm_eps"] == config["rms_norm_eps"]
    assert "by someone" in model.remarks
    assert model.tokenizer.source == str(tmp_path)
    config["hidden_size"] = 96
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        MappingError, match=rf"64 in the checkpoint but 96 in {tmp_path}/config.json"
    ):
        load(fixture.root, Options())


# -- Megatron-LM ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "iter_0000100"])
def test_files_copied_beside_the_iteration(fixture: Fixture, tmp_path: Path, place: str) -> None:
    """As Pai-Megatron-Patch does."""
    root = copy(fixture, tmp_path).parent
    for name in ("config.json", "generation_config.json"):
        shutil.copy(fixture.hf / name, root / place)
    shutil.copy(fixture.tokenizer / "tokenizer.json", root / place)
    model = load(root, Options())
    assert model.companions.trainer == "Megatron-LM"
    assert same_weights(model, fixture)
    assert model.tokenizer.source == str((root / place).resolve())
    (root / place / "config.json").write_text('{"lr": 1e-4}')  # some other program's
    with pytest.raises(MappingError, match="rms_norm_eps is unknown"):
        load(root, Options())


# -- verl -----------------------------------------------------------------------------------------

MOE = "qwen3_moe-tp2-pp2-ep2"


@pytest.fixture(scope="module")
def moe() -> Fixture:
    return ensure([MOE])[MOE]


def same_weights(model: Model, fixture: Fixture) -> bool:
    tree, _ = build(model, fixture.spec.hf_max_shard_size or "50GB", 1 << 20)
    found = {n: read_all(f) for n, f in tree.files.items() if "safetensors" in n}
    return found == {path.name: path.read_bytes() for path in fixture.hf.glob("*safetensors*")}


def transformer_config(fixture: Fixture) -> dict[str, Any]:
    """As verl makes it (verl/models/mcore/config_converter.py) and saves it
    (megatron_checkpoint_manager.py _to_json_safe_config_dict): functions are left out."""
    spec = fixture.spec
    config = TransformerConfig(
        num_layers=spec.layers,
        hidden_size=spec.hidden,
        num_attention_heads=spec.heads,
        num_query_groups=spec.kv_heads,
        kv_channels=spec.head_dim,
        ffn_hidden_size=spec.ffn,
        layernorm_epsilon=spec.norm_eps,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        qk_layernorm=True,
        num_moe_experts=spec.experts,
        moe_ffn_hidden_size=spec.moe_ffn,
        moe_router_topk=spec.topk,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.001,
        tensor_model_parallel_size=spec.tp,
        pipeline_model_parallel_size=spec.pp,
        expert_model_parallel_size=spec.ep,
        expert_tensor_parallel_size=spec.etp,
        pipeline_dtype=torch.bfloat16,
        params_dtype=torch.bfloat16,
        bf16=True,
        sequence_parallel=True,
    )
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) is torch.dtype or isinstance(value, Enum):
            found[field.name] = str(value)
        elif not callable(value):
            found[field.name] = value
    return found


def verl(fixture: Fixture, run: Path, layout: int, *, bridge: bool = True) -> Path:
    """The actor of a run of verl that saved what the fixture holds."""
    actor = run / "global_step_100/actor"
    weights = actor / "model" if layout == 2 else actor
    shutil.copytree(fixture.iteration, weights / "dist_ckpt")
    torch.save({"content_metadata": {}}, weights / "dist_ckpt/common.pt")  # no args
    (actor / "transformer_config.json").write_text(json.dumps(transformer_config(fixture)))
    if layout == 2:
        (actor / "ckpt_contents.json").write_text('{"schema_version": 2}')
    if bridge:
        shutil.copytree(fixture.tokenizer, weights / "huggingface")
        for name in ("config.json", "generation_config.json"):
            shutil.copy(fixture.hf / name, weights / "huggingface")
    (run / "latest_checkpointed_iteration.txt").write_text("100")
    return actor


@pytest.mark.parametrize("layout", [1, 2])
def test_verl(moe: Fixture, tmp_path: Path, layout: int) -> None:
    actor = verl(moe, tmp_path, layout)
    beside = next(actor.rglob("huggingface"))
    for path in (tmp_path, actor.parent, actor, next(actor.rglob("dist_ckpt")), beside):
        model = load(path, Options())
        assert model.companions.trainer == "verl"
        assert model.companions.args_source == str(actor / "transformer_config.json")
        assert model.location.iteration == 100
        assert model.tokenizer.source == str(beside)
        assert same_weights(model, moe)
        expected = json.loads((moe.hf / "config.json").read_text())
        differing = {k for k, v in expected.items() if v is not None and model.config.get(k) != v}
        assert differing <= {"transformers_version", "num_local_experts"}
        assert model.config["num_experts"] == expected["num_local_experts"]


def test_what_verls_config_says_must_agree(moe: Fixture, tmp_path: Path) -> None:
    path = verl(moe, tmp_path, 2) / "transformer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "hidden_size": 128, "moe_router_topk": 3}))
    with pytest.raises(MappingError) as caught:
        load(tmp_path, Options())
    assert "hidden_size is 128 in the training arguments but the tensor" in str(caught.value)
    assert "num_experts_per_tok is 3 in the checkpoint but 2 in" in str(caught.value)
    path.write_text(
        json.dumps({**config, "gated_linear_unit": False, "normalization": "LayerNorm"})
    )
    with pytest.raises(MappingError) as caught:
        load(tmp_path, Options())
    said = " ".join(caught.value.problems)
    assert "swiglu" in said
    assert "normalization" in said
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"transformer_config.json cannot be read: is not JS"):
        load(tmp_path, Options())


def test_verl_without_a_bridge(moe: Fixture, tmp_path: Path) -> None:
    """Nothing but shards and the TransformerConfig: rope_theta is recorded nowhere."""
    actor = verl(moe, tmp_path, 2, bridge=False)
    with pytest.raises(MappingError) as caught:
        load(actor, Options(vocab_size=moe.spec.vocab_size))
    assert [problem.split()[0] for problem in caught.value.problems] == ["rope_theta"]
    assert same_weights(load(actor, Options(hf_config=moe.hf)), moe)
    (actor / "transformer_config.json").unlink()
    model = load(actor, Options(hf_config=moe.hf))
    assert same_weights(model, moe)
    assert model.companions.args_source == f"there is no {actor}/transformer_config.json"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_moe_experts": 8}, {"num_experts": 8}),
        ({"num_query_groups": 2}, {"num_query_groups": 2, "group_query_attention": True}),
        ({"num_query_groups": None}, {}),
        (
            {"share_embeddings_and_output_weights": True},
            {"untie_embeddings_and_output_weights": False},
        ),
        ({"gated_linear_unit": True}, {}),  # with an activation that is not recorded
        (
            {"gated_linear_unit": True, "activation_func": "<function silu at 0x1>"},
            {"swiglu": True},
        ),
        (
            {"gated_linear_unit": True, "activation_func": "torch.nn.functional.gelu"},
            {"swiglu": False, "gated_linear_unit": True, "activation_func": "gelu"},
        ),
        (
            {"gated_linear_unit": True, "activation_func": "<function fast_gelu at 0x1>"},
            {"swiglu": False, "gated_linear_unit": True, "activation_func": "fast_gelu"},
        ),
        (
            {"gated_linear_unit": True, "activation_func": "torch.nn.functional.mish"},
            {"swiglu": False, "gated_linear_unit": True, "activation_func": "mish"},
        ),
        (
            {"gated_linear_unit": True, "activation_func": "quick_gelu"},
            {"swiglu": False, "quick_geglu": True},
        ),
        (
            {"gated_linear_unit": False, "activation_func": "megatron.core.x.squared_relu"},
            {"swiglu": False, "squared_relu": True},
        ),
        ({"gated_linear_unit": True, "activation_func": {"_target_": "?"}}, {}),
        ({"rope_scaling": False}, {"use_rope_scaling": False}),
        (
            {"rope_scaling": True, "rope_scaling_factor": 32.0},
            {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
        ),
        ({"rope_scaling": {"factor": 2}}, {"rope_scaling": {"factor": 2}}),
        (
            {"scale_factor": 32.0, "old_context_len": 4096},  # Llama31ModelProvider, Llama31Config
            {
                "use_rope_scaling": True,
                "rope_scaling_factor": 32.0,
                "scale_factor": 32.0,
                "old_context_len": 4096,
            },
        ),
        (
            {"vocab_size": 300, "should_pad_vocab": False},
            {"vocab_size": 300, "should_pad_vocab": False, "padded_vocab_size": 300},
        ),
        (
            {"vocab_size": 300, "should_pad_vocab": True},
            {"vocab_size": 300, "should_pad_vocab": True},
        ),
        ({"gated_linear_unit": False}, {"swiglu": False}),
        ({"max_position_embeddings": 4096}, {"max_position_embeddings": 4096}),
        (
            {"multi_latent_attention": True, "max_position_embeddings": 4096},
            {"multi_latent_attention": True, "original_max_position_embeddings": 4096},
        ),
    ],
)
def test_a_transformer_config_in_the_words_of_megatron_lm(
    config: dict[str, object], expected: dict[str, object]
) -> None:
    assert arguments(config) == expected


# -- slime ----------------------------------------------------------------------------------------


def test_slime(moe: Fixture, tmp_path: Path) -> None:
    hf = Path(shutil.copytree(moe.tokenizer, tmp_path / "hf"))
    shutil.copy(moe.hf / "config.json", hf)
    known = {"hf_checkpoint": str(hf), "rotary_base": ..., "tokenizer_model": ...}
    root = with_args(moe, tmp_path / "a", **known)
    (root / moe.iteration.name).rename(root / "release")
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    model = load(root, Options())
    assert model.companions.trainer == "slime"
    assert model.config["rope_theta"] == moe.spec.rope_theta
    assert model.tokenizer.source == str(hf)
    assert same_weights(model, moe)
    for elsewhere in ("Qwen/Qwen3-30B-A3B", str(tmp_path / "gone"), "../hf"):
        root = with_args(moe, tmp_path / elsewhere.replace("/", "_"), hf_checkpoint=elsewhere)
        model = load(root, Options(vocab_size=301))
        assert model.companions.hf_directories == ()
        assert any(f"trained from {elsewhere!r}, which is not on this" in r for r in model.remarks)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("megatron.bridge.models.qwen.qwen_provider.Qwen3ModelProvider600M", "qwen3"),
        ("megatron.bridge.models.qwen.qwen_provider.Qwen3MoEModelProvider30B_A3B", "qwen3_moe"),
        ("megatron.bridge.models.qwen.qwen_provider.Qwen25ModelProvider7B", "qwen2"),
        ("megatron.bridge.models.deepseek.deepseek_provider.DeepSeekV3Provider", "deepseek_v3"),
        ("nemo.collections.llm.gpt.model.qwen3.Qwen3Config600M", "qwen3"),
        ("nemo.collections.llm.gpt.model.qwen3.Qwen3Config235B_A22B", "qwen3_moe"),
        ("nemo.collections.llm.gpt.model.llama.Llama32Config1B", "llama"),
        ("nemo.collections.llm.gpt.model.llama.CodeLlamaConfig7B", "llama"),
        ("Qwen3MoEConfig", "qwen3_moe"),
        ("megatron.bridge.models.falcon_h1.falconh1_provider.FalconH1ModelProvider", "falcon_h1"),
        (
            "megatron.bridge.models.exaone.exaone_moe.exaone_moe_provider.ExaoneMoeModelProvider",
            "exaone_moe",
        ),
        (
            "megatron.bridge.models.mimo_v2_flash.mimo_v2_flash_provider.MiMoV2FlashModelProvider",
            "mimo_v2_flash",
        ),
        ("megatron.bridge.models.stepfun.step35_provider.Step35ModelProvider", "step3p5"),
        ("megatron.bridge.models.stepfun.step37_provider.Step37ModelProvider", "step3p7"),
        ("nemo.collections.llm.gpt.model.llama_embedding.Llama32EmbeddingConfig1B", None),
        ("megatron.bridge.models.qwen_vl.qwen3_vl_provider.Qwen3VLModelProvider", "qwen3_vl"),
        ("megatron.bridge.models.gpt_provider.GPTModelProvider", None),
        ("megatron.bridge.models.gpt.model_config.BridgeGPTModelConfig", None),
        ("nemo.collections.llm.gpt.model.qwen3.Qwen3Model", None),
        ({"not": "a name"}, None),
        (None, None),
    ],
)
def test_classes_of_one_family(target: object, kind: str | None) -> None:
    assert model_type(target) == kind
