"""Models that see: what is served computes of a text and of an image what the original does.

That the files are those of the original, byte for byte, is in `test_roundtrip`.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mcorefs.errors import MappingError
from mcorefs.files import read_all
from mcorefs.mapping.families.qwen3_vl import QWEN3_VL_MOE
from mcorefs.mapping.tokenizer import PROCESSOR
from mcorefs.model import Model, Options, load
from mcorefs.tree import build
from mcorefs.wording import how_to_load
from tests.checkpoints import SPECS, Fixture, ensure
from tests.checkpoints.families import FAMILIES
from tests.checkpoints.families.qwen3_vl import END, IMAGE, START
from tests.edited import with_args
from tests.providers import provider
from tests.test_config import attributes, materialise, refusal, said, write_config
from tests.test_ms_swift import ARGS
from tests.test_torch_legacy import StateDict, rewritten

NAMES = [name for name, spec in SPECS.items() if spec.vision]


@pytest.fixture(scope="module")
def fixtures() -> Mapping[str, Fixture]:
    return ensure(NAMES)


def logits(directory: Path) -> tuple[Tensor, Tensor]:
    """(of a text, of a text with an image in it)."""
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    vision = model.config.vision_config
    merged, grid = vision.spatial_merge_size**2, (1, 4, 6)
    patches = grid[1] * grid[2]
    tokens = torch.tensor([[1, 5, START, *[IMAGE] * (patches // merged), END, 7, 8]])
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(patches, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = model(torch.arange(0, IMAGE, 7)[None]).logits
        image = model(
            input_ids=tokens,
            pixel_values=pixels,
            image_grid_thw=torch.tensor([grid]),
            mm_token_type_ids=(tokens == IMAGE).int(),
        ).logits
    return text, image


OTHERWISE: tuple[tuple[str, str, object], ...] = (
    ("text_config", "rms_norm_eps", 1e-2),
    ("text_config", "rope_theta", 3e3),
    ("text_config", "mrope_section", ...),
    ("vision_config", "num_heads", 2),
    ("vision_config", "hidden_act", "relu"),
    ("vision_config", "deepstack_visual_indexes", [0, 1]),
    ("vision_config", "fullatt_block_indexes", [0]),
    ("vision_config", "window_size", 32),
    ("vision_config", "rms_norm_eps", 1e-2),
)
"""Changes no tensor, only what is computed with it; ... gives the first all there is."""


@pytest.mark.parametrize("name", [next(iter(f.specs)) for f in FAMILIES.values() if f.vision])
def test_the_model_computes_the_same_logits(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    fixture = fixtures[name]
    model = load(fixture.root, Options(hf_config=fixture.hf))
    materialise(model, tmp_path)
    expected, found = logits(fixture.hf), logits(tmp_path)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    # The test would see a wrong key.
    for section, key, value in OTHERWISE:
        config: dict[str, Any] = json.loads(json.dumps(dict(model.config)))
        config[section].pop("rope_scaling", None)
        config[section].pop("rope_theta", None)
        rotary = config[section].get("rope_parameters", {})
        place = rotary if key in rotary else config[section]
        if key not in place:
            continue
        place[key] = [sum(place[key]), 0, 0] if value is ... else value
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert not torch.equal(logits(tmp_path)[1], expected[1]), key


def expected(fixture: Fixture, model: Model) -> dict[str, Any]:
    """What transformers knows of the original's config, and the tokenizer of padding."""
    found = attributes(fixture.hf)
    if model.tokenizer.found:
        found["text_config"]["pad_token_id"] = 0
    return found


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_the_config_that_the_model_had(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    fixture = fixtures[name]
    model = load(fixture.root, Options(hf_config=fixture.hf))
    assert attributes(write_config(model, tmp_path)) == expected(fixture, model)
    assert not said(model, "assumed")


def hub_config(fixture: Fixture) -> dict[str, Any]:
    """The original's config.json as the hub has it: in transformers 4's spelling."""
    config: dict[str, Any] = json.loads((fixture.hf / "config.json").read_bytes())
    rotary = config["text_config"].pop("rope_parameters")
    config["text_config"]["rope_theta"] = rotary.pop("rope_theta")
    config["text_config"]["rope_scaling"] = rotary
    config["vision_config"].pop("rope_parameters")
    if "partial_rotary_factor" in rotary:
        config["text_config"]["partial_rotary_factor"] = rotary.pop("partial_rotary_factor")
    if fixture.spec.family in ("qwen2_5_vl", "glm4v"):  # where all is in one
        rotary["type"] = "mrope" if fixture.spec.family == "qwen2_5_vl" else "default"
        del rotary["rope_type"]
        config = {**config.pop("text_config"), **config}
    return config


def model_directory(fixture: Fixture, place: Path) -> Path:
    """The model that was trained from: its config, its tokenizer and its image processor."""
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(hub_config(fixture)))
    for file in fixture.tokenizer.iterdir():
        shutil.copy(file, place)
    for name in PROCESSOR:
        (place / name).write_text(json.dumps({"patch_size": 4, "of": name}))
    return place


def is_whole(model: Model, fixture: Fixture) -> None:
    tree, _ = build(model, fixture.spec.hf_max_shard_size or "50GB", 1 << 20)
    for shard in fixture.hf.glob("*.safetensors"):
        assert read_all(tree.files[shard.name]) == shard.read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_vl-swift-pp2-tied",
        "torch-qwen3_vl_moe-swift-tp2-pp2-etp2",
        "qwen2_5_vl-swift-pp2-tied",
        "glm4v-swift-pp2-tied",
        "torch-glm4v_moe-swift-tp2-pp2-ep2",
    ],
)
def test_ms_swift_says_where_the_model_lies(
    fixtures: Mapping[str, Fixture], name: str, tmp_path: Path
) -> None:
    fixture = fixtures[name]
    source = model_directory(fixture, tmp_path / "hub" / "a-model")
    checkpoint = tmp_path / "v0-20261124-081500" / "checkpoint-100"
    shutil.copytree(fixture.root, checkpoint)
    args = {**ARGS, "model_type": fixture.spec.family, "model_dir": str(source)}
    (checkpoint / "args.json").write_text(json.dumps(args))
    model = load(checkpoint, Options())
    assert model.companions.trainer == "ms-swift"
    is_whole(model, fixture)
    served = materialise(model, tmp_path / "served")
    assert attributes(served) == expected(fixture, model)
    for file in source.iterdir():
        if file.name != "config.json":
            assert (served / file.name).read_bytes() == file.read_bytes()


def bridge_yaml() -> Any:
    """megatron.bridge.utils.yaml_utils; the package around it wants TransformerEngine."""
    path = Path(sys.prefix) / "trainers/megatron/bridge/utils/yaml_utils.py"
    spec = importlib.util.spec_from_file_location("yaml_utils", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_config(fixture: Fixture) -> str:
    """As the provider that provider_bridge of the family's bridge makes is saved."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(fixture.hf)
    kind = {
        "glm4v_moe": "glm_vl.glm_45v_provider.GLM45VModelProvider",
        "qwen3_vl": "qwen_vl.qwen3_vl_provider.Qwen3VLModelProvider",
        "qwen3_vl_moe": "qwen_vl.qwen3_vl_provider.Qwen3VLMoEModelProvider",
        "qwen2_5_vl": "qwen_vl.qwen25_vl_provider.Qwen25VLModelProvider",
        "qwen3_5": "qwen_vl.qwen35_vl_provider.Qwen35VLModelProvider",
        "qwen3_5_moe": "qwen_vl.qwen35_vl_provider.Qwen35VLMoEModelProvider",
    }[fixture.spec.family]
    ids = [name for name in vars(config) if name.endswith("_token_id")]
    arguments = FAMILIES[fixture.spec.family].arguments(fixture.spec)
    section = {
        **provider(fixture.spec),
        "_target_": f"megatron.bridge.models.{kind}",
        **{name: value for name, value in arguments.items() if name != "apply_layernorm_1p"},
        "layernorm_zero_centered_gamma": "apply_layernorm_1p" in arguments,
        "bos_token_id": config.text_config.bos_token_id,
        "eos_token_id": config.text_config.eos_token_id,
        "vision_config": config.vision_config,
        **{name: getattr(config, name) for name in ids},
        "hf_model_id": "Qwen/Qwen3-VL-8B-Instruct",
    }
    if fixture.spec.family.startswith("qwen3_vl"):  # other providers do not keep it
        section["hf_text_config"] = config.text_config
    if fixture.spec.family == "glm4v_moe":
        del section["bos_token_id"]
    tools = bridge_yaml()
    with tools.safe_yaml_representers():
        text: str = yaml.safe_dump({"model": section})
    return text


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_vl-bridge-tp2",
        "qwen3_vl_moe-tp2-ep2",
        "qwen3_5-tp2",
        "qwen3_5_moe-megatron-pp2-ep2",
        "qwen2_5_vl-swift-tp2",
        "glm4v_moe-tp2-ep2",
    ],
)
def test_megatron_bridge_records_both_configs(
    fixtures: Mapping[str, Fixture],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fixture = fixtures[name]
    root = tmp_path / "root"
    shutil.copytree(fixture.root, root)
    (root / fixture.spec.iteration_dir / "run_config.yaml").write_text(run_config(fixture))
    model = load(root, Options())
    assert model.companions.trainer == "Megatron-Bridge"
    is_whole(model, fixture)
    wanted = expected(fixture, model)
    if fixture.spec.family == "glm4v_moe":  # whose provider does not keep it
        wanted["text_config"]["bos_token_id"] = None
    assert attributes(write_config(model, tmp_path / "config")) == wanted
    assert said(model, f"no {PROCESSOR[0]} was found beside a tokenizer: ")


def test_what_nothing_says_is_asked_for(fixtures: Mapping[str, Fixture]) -> None:
    problems = refusal(lambda: load(fixtures["qwen3_vl-swift-pp2-tied"].root, Options()))
    for key in ("vision_config.num_heads", "vision_config.deepstack_visual_indexes"):
        assert any(
            text.startswith(f"{key} is unknown") and "--hf-config" in text for text in problems
        )
    assert any(text.startswith("image_token_id is unknown") for text in problems)
    native = fixtures["qwen3_vl-megatron-tp2-pp2"].root
    problems = refusal(lambda: load(native, Options()))
    assert any("number of heads in its vision model" in text for text in problems)


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("vision_config", "depth", 4, "vision_config.depth is 3"),
        ("vision_config", "patch_size", 8, "vision_config.patch_size is 4"),
        ("vision_config", "spatial_merge_size", 4, "vision_config.spatial_merge_size is 2"),
        ("vision_config", "num_position_embeddings", 64, "num_position_embeddings is 36"),
        ("vision_config", "deepstack_visual_indexes", [1], "names 1 layers"),
        ("vision_config", "num_heads", 5, "num_heads is 5"),
        ("text_config", "hidden_size", 128, "text_config.hidden_size is 64"),
        ("text_config", "rope_scaling", {"mrope_section": [2, 2, 4]}, "mrope_section is [4, 2, 2]"),
    ],
)
def test_a_reference_that_disagrees_is_refused(
    fixtures: Mapping[str, Fixture],
    tmp_path: Path,
    section: str,
    key: str,
    value: object,
    told: str,
) -> None:
    fixture = fixtures["torch-qwen3_vl-swift-tp2-pp2"]
    config = hub_config(fixture)
    config[section][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    problems = refusal(lambda: load(fixture.root, Options(hf_config=tmp_path)))
    assert any(told in text for text in problems), problems


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("image_size", 28, "vision_config.image_size is 24"),
        ("intermediate_size", 96, "vision_config.intermediate_size is 80"),
        ("attention_bias", True, "vision_config.attention_bias is false"),
        ("spatial_merge_size", 4, "vision_config.spatial_merge_size is 2"),
        ("out_hidden_size", 128, "vision_config.out_hidden_size is 64"),
    ],
)
def test_sizes_of_what_joins_patches_by_a_convolution(
    fixtures: Mapping[str, Fixture], tmp_path: Path, key: str, value: object, told: str
) -> None:
    fixture = fixtures["glm4v-swift-tp2"]
    config = json.loads((fixture.hf / "config.json").read_bytes())
    config["vision_config"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    problems = refusal(lambda: load(fixture.root, Options(hf_config=tmp_path)))
    assert any(told in text for text in problems), problems


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("glm4v-swift-pp2-tied", "rotary_interleaved", False),  # as mbridge trains it
        ("glm4v-swift-pp2-tied", "mrope_interleaved", True),
        ("glm4v_moe-swift-pp2-ep2", "rotary_interleaved", True),
        ("glm4v_moe-swift-pp2-ep2", "mrope_interleaved", True),
        ("glm4v_moe-swift-pp2-ep2", "moe_router_score_function", "softmax"),
    ],
)
def test_what_no_key_expresses(
    fixtures: Mapping[str, Fixture], name: str, argument: str, value: object, tmp_path: Path
) -> None:
    fixture = fixtures[name]
    root = with_args(fixture, tmp_path, **{argument: value})
    (problem,) = refusal(lambda: load(root, Options(hf_config=fixture.hf)))
    assert f"{argument}={value!r}" in problem


def test_without_multi_token_prediction(fixtures: Mapping[str, Fixture]) -> None:
    fixture = fixtures["qwen3_5_moe-ep2-mtp"]
    model = load(fixture.root, Options(hf_config=fixture.hf, mtp=False))
    text = model.config["text_config"]
    assert isinstance(text, dict)
    assert text["mtp_num_hidden_layers"] == 0
    assert not [tensor.name for tensor in model.tensors if tensor.name.startswith("mtp.")]


def test_no_other_task(fixtures: Mapping[str, Fixture]) -> None:
    fixture = fixtures["qwen3_vl-bridge-tp2"]
    with pytest.raises(MappingError, match="not served for the task embedding"):
        load(fixture.root, Options(hf_config=fixture.hf, task="embedding"))


def test_a_mount_says_how_to_load_it(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    model = load(
        fixtures["qwen3_vl-bridge-tp2"].root,
        Options(hf_config=fixtures["qwen3_vl-bridge-tp2"].hf),
    )
    text = how_to_load(tmp_path, model.architecture)
    assert f'AutoModelForImageTextToText.from_pretrained("{tmp_path}"' in text
    assert "AutoModelForCausalLM" in how_to_load(tmp_path, "Qwen3ForCausalLM")


def test_experts_that_no_shape_tells_the_way_of(fixtures: Mapping[str, Fixture]) -> None:
    """transformers 5 would take a square weight as it lies, other readers would turn it."""
    facts = load(
        fixtures["qwen3_vl_moe-tp2-ep2"].root,
        Options(hf_config=fixtures["qwen3_vl_moe-tp2-ep2"].hf),
    ).facts
    for width, is_told in ((48, True), (64, False), (32, False)):
        square = replace(facts, dims={**facts.dims, "moe_ffn": width})
        told = [check(square) for check in QWEN3_VL_MOE.checks]
        assert (not any(told)) is is_told


def test_a_language_model_by_itself_is_one(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    """Where the trainer names the whole, of which the run trained and saved but that."""
    fixture = fixtures["torch-qwen3_vl-swift-tp2-pp2"]

    def deaf(state: StateDict, _: str) -> None:
        state["model"] = {k: v for k, v in state["model"].items() if not k.startswith("visual.")}

    root = rewritten(fixture, tmp_path / "root", deaf)
    (root / "args.json").write_text(json.dumps({**ARGS, "model_type": "qwen3_vl"}))
    with pytest.raises(MappingError, match="as Qwen3ForCausalLM") as caught:
        load(root, Options(vocab_size=307))
    assert "position_embedding_type='mrope'" in caught.value.problems[0]
    with pytest.raises(MappingError, match=r"needs vision_model.patch_embed.proj.weight"):
        load(root, Options(hf_config=fixture.hf))
