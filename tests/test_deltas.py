"""Adapters in Megatron's format over Hugging Face models, of every family.

The oracle: an adapter whose B is the Megatron weight itself, read by torch, and whose A is the unit
matrix. What it adds to a Hugging Face tensor, if its rows go where they belong, is that tensor."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import mcorefs
from mcorefs.arithmetic import Addmm
from mcorefs.errors import MappingError
from mcorefs.model import Options
from mcorefs.tree import open_tree
from tests.checkpoints import Fixture, ensure

MODULES = re.compile(r"(?:language_model\.)?decoder\.layers\..*(?:linear_\w+|router)\.weight$")
LEFT = re.compile(
    r"embed|lm_head|wte|wpe|linear_attn|mamba|mixer\.(?:conv1d|in_proj|out_proj)|mtp|visual"
    r"|shared_expert_gate|bias"
)
"""Names of tensors that are made of none of those."""
NAMES = [
    *("qwen3", "qwen3_moe", "qwen3_moe-mixed-pp2", "qwen2_moe-pp2-ep2", "qwen3_next-mixed"),
    *("qwen3_5_text-fp32", "qwen3_5_moe_text-fp32", "qwen2_5_vl-swift-pp2-tied"),
    *("qwen3_vl-swift-pp2-tied", "qwen3_vl_moe-swift-pp2-ep2-tied", "glm4v-swift-pp2-tied"),
    *("deepseek_v2-pp2-ep2", "deepseek_v3-ep2-two-mtp", "deepseek_v3-moonlight-stacked"),
    *("glm4-pp2", "glm4_moe-pp2-ep2", "glm4_moe_lite-pp2-ep2", "dots1-pp2-ep2"),
    *("llama-mha-per-layer", "llama-pp2-tied", "mistral-pp2-fp32", "mixtral-pp2-ep2"),
    *("minimax_m2-pp2-ep2", "mimo-two-mtp", "bailing_moe_v2-pp2-ep2", "hy_v3-pp2-ep2"),
    *("ernie4_5-pp2", "ernie4_5_moe-pp2-ep2", "exaone4-pp2", "exaone_moe-pp2-ep2"),
    *("gemma-pp2", "gpt2-pp2-untied", "gpt_oss-pp2-ep2", "olmoe-ep2", "phi3-pp2"),
    *("glm_moe_dsa-ep2-all-keys", "deepseek_v32-ep2-all-keys"),
    *("nemotron-pp2-fp32", "nemotron_h-moe-pp2-ep2", "falcon_h1"),
]
"""Cut over no tensor-parallel ranks, which adapters lie otherwise by."""


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure(NAMES)


def doubling(fixture: Fixture, directory: Path) -> Path:
    """An adapter that adds the model to itself."""
    reader = FileSystemReader(fixture.iteration)
    entries = reader.read_metadata().state_dict_metadata
    weights = {
        fqn: torch.empty(entry.size, dtype=entry.properties.dtype)
        for fqn, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and MODULES.match(fqn)
    }
    load(weights, storage_reader=reader, no_dist=True)
    adapter: dict[str, torch.Tensor] = {}
    for fqn, weight in weights.items():
        module = fqn.removesuffix(".weight")
        unit = torch.eye(weight.shape[-1], dtype=weight.dtype)
        adapter[f"{module}.lora_A.default.weight"] = unit.expand(
            *weight.shape[:-2], *unit.shape
        ).contiguous()
        adapter[f"{module}.lora_B.default.weight"] = weight
    iteration = directory / fixture.iteration.name
    save(adapter, storage_writer=FileSystemWriter(iteration), no_dist=True)
    for name in ("common.pt", "metadata.json"):
        shutil.copy(fixture.iteration / name, iteration / name)
    return iteration


@pytest.mark.parametrize("name", NAMES)
def test_each_row_of_a_product_goes_where_that_of_the_weight_is(
    fixtures: dict[str, Fixture], tmp_path: Path, name: str
) -> None:
    fixture = fixtures[name]
    adapter = doubling(fixture, tmp_path)
    doubled = 0
    with mcorefs.open(fixture.hf, adapter=f"{adapter}:1") as found:
        for file in fixture.hf.glob("*.safetensors"):
            for key, tensor in load_file(file).items():
                layer = re.search(r"\.(?:layers|h)\.(\d+)\.", key)
                is_mtp = layer is not None and int(layer[1]) >= fixture.spec.layers
                is_twice = tensor.ndim > 1 and not is_mtp and not LEFT.search(key)
                doubled += is_twice
                have = found.get_tensor(key)
                assert isinstance(have, torch.Tensor)
                assert torch.equal(have, 2 * tensor if is_twice else tensor), key
    assert doubled >= 3 * fixture.spec.layers


def test_rows_are_moved_about_before_they_are_multiplied(
    fixtures: dict[str, Fixture], tmp_path: Path
) -> None:
    """It takes half the time."""
    fixture = fixtures["qwen3_moe-mixed-pp2"]
    options = Options(adapter=doubling(fixture, tmp_path), adapter_scale=1.0)
    views = {tensor.name: tensor.view for tensor in open_tree(fixture.hf, options).source.tensors}
    changed = {name for name in views if not LEFT.search(name) and len(views[name].shape) == 2}
    assert changed
    assert {type(views[name]) for name in changed} == {Addmm}


def test_heads_that_the_run_denies(fixtures: dict[str, Fixture], tmp_path: Path) -> None:
    """Which rows are a head's, no shape of this family shows."""
    fixture = fixtures["llama-mha-per-layer"]
    base = Path(shutil.copytree(fixture.hf, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    changes = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 4}
    (base / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(MappingError) as caught:
        mcorefs.open(base, adapter=f"{doubling(fixture, tmp_path)}:1")
    said = "num_attention_heads is 8 in the checkpoint but 16 in"
    assert any(problem.startswith(said) for problem in caught.value.problems)
