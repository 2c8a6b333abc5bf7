"""NeMo 1's `.nemo` archives around real shards, and archives that are not what they should be.

NeMo needs a GPU's libraries, so an archive is put together here as
NeMo 2.2:nemo/core/connectors/save_restore_connector.py _make_nemo_file_from_folder does, with a
config as its converters write it (scripts/checkpoint_converters/convert_llama_hf_to_nemo.py); the
shards in it are megatron-core's, renamed.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import yaml

from mcorefs.errors import CheckpointError, MappingError, ReadFault
from mcorefs.model import Options, load
from mcorefs.storage import Storage
from mcorefs.tar import member_at
from mcorefs.trainers.nemo1 import translated
from mcorefs.tree import open_tree
from mcorefs.verify import checksums
from tests.checkpoints import Fixture, Spec, ensure
from tests.edited import copy, rename
from tests.format_contract import served
from tests.trained_tokenizers import trained

TORCH, ZARR, QWEN2 = "llama-tp2", "zarr-llama-tp2-pp2", "qwen2-tp2-pp2"
LEGACY = {
    "torch-qwen3": "model_weights.ckpt",
    "torch-qwen2-tp2-tied": "mp_rank_{0}/model_weights.ckpt",
    "torch-llama-tp2-pp2": "tp_rank_{0}_pp_rank_{1}/model_weights.ckpt",
}
"""What NeMo calls the files of a rank, by fixture."""


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure([TORCH, ZARR, QWEN2, *LEGACY])


def model_config(spec: Spec, tokenizer: Mapping[str, object]) -> dict[str, object]:
    """What NeMo's converters put into examples/nlp/language_modeling/conf."""
    return {
        "mcore_gpt": True,
        "micro_batch_size": 4,
        "tensor_model_parallel_size": spec.tp,
        "pipeline_model_parallel_size": spec.pp,
        "virtual_pipeline_model_parallel_size": None,
        "encoder_seq_length": spec.max_positions,
        "max_position_embeddings": "${.encoder_seq_length}",
        "num_layers": spec.layers,
        "hidden_size": spec.hidden,
        "ffn_hidden_size": spec.ffn,
        "num_attention_heads": spec.heads,
        "kv_channels": spec.head_dim,
        "num_query_groups": spec.kv_heads,
        "normalization": "rmsnorm",
        "layernorm_epsilon": spec.norm_eps,
        "make_vocab_size_divisible_by": spec.vocab_divisible_by,
        "bias": False,
        "qkv_bias": spec.family == "qwen2",
        "activation": "fast-swiglu",
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "rotary_base": float(spec.rope_theta),
        "share_embeddings_and_output_weights": spec.tied,
        "seq_len_interpolation_factor": None,
        "scale_positional_embedding": spec.llama3_rope_factor is not None,
        "tokenizer": dict(tokenizer),
        "data": {"data_impl": "mmap"},
        "optim": {"name": "fused_adam"},
        "precision": "bf16-mixed",
        "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model."
        "MegatronGPTModel",
        "nemo_version": "2.2.0",
    }


def folder(fixture: Fixture, directory: Path) -> Path:
    """What is packed, or what is there once it was unpacked."""
    iteration = copy(fixture, directory)
    if fixture.spec.format == "zarr":
        for file in list(iteration.glob("*/.zarray")):
            file.parent.rename(iteration / f"model.{file.parent.name}")
    else:
        rename(iteration, lambda fqn: fqn if "/shard_" in fqn else f"model.{fqn}")
    torch.save({"pytorch-lightning_version": "2.4", "loops": None}, iteration / "common.pt")
    found = directory / "folder"
    found.mkdir()
    iteration.rename(found / "model_weights")
    tokenizer = {"library": "huggingface", "type": str(fixture.tokenizer), "use_fast": True}
    config = model_config(fixture.spec, tokenizer)
    (found / "model_config.yaml").write_text(yaml.safe_dump(config))
    return found


def legacy_folder(fixture: Fixture, name: str, prefix: str, directory: Path) -> Path:
    """The same of a model that is saved rank by rank, as it is without sharded_state_dict."""
    found = directory / "folder"
    for file in sorted(fixture.iteration.glob("*/model_optim_rng.pt")):
        state = torch.load(file, weights_only=False)["model"]
        place = found / name.format(*file.parent.name.removeprefix("mp_rank_").split("_"))
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.save({f"{prefix}{key}": value for key, value in state.items()}, place)
    config = model_config(fixture.spec, {"library": "huggingface", "type": str(fixture.tokenizer)})
    config |= {
        "mcore_customization_config": {"qk_layernorm": fixture.spec.family.startswith("qwen3")}
    }
    (found / "model_config.yaml").write_text(yaml.safe_dump(config))
    return found


def packed(source: Path, archive: Path) -> Path:
    """As NeMo does."""
    with tarfile.open(archive, "w:") as opened:
        opened.add(source, arcname=".")
    return archive


def by_tar(*options: str) -> Callable[[Path, Path], Path]:
    def pack(source: Path, archive: Path) -> Path:
        subprocess.run(["tar", *options, "-cf", archive, "-C", source, "."], check=True)
        return archive

    return pack


def options(fixture: Fixture) -> Options:
    size = fixture.spec.hf_max_shard_size or "50GB"
    return Options(vocab_size=fixture.spec.vocab_size, shard_size=size)


def expected(fixture: Fixture) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in fixture.hf.glob("*.safetensors*")}


# -- whole archives -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [TORCH, ZARR, QWEN2])
@pytest.mark.parametrize(
    "pack",
    [packed, by_tar("--format=gnu"), by_tar("--format=posix"), by_tar("--format=ustar")],
)
def test_everything_is_read_out_of_the_archive(
    fixtures: Mapping[str, Fixture],
    tmp_path: Path,
    name: str,
    pack: Callable[[Path, Path], Path],
) -> None:
    fixture = fixtures[name]
    archive = pack(folder(fixture, tmp_path), tmp_path / "model.nemo")
    shutil.rmtree(tmp_path / "folder")
    for path in (archive, archive / "model_weights"):
        opened = open_tree(path, options(fixture))
        assert served(opened) == expected(fixture)
        model = load(path, options(fixture))
        assert model.companions.trainer == "NeMo 1"
        assert model.companions.args_source == str(archive / "model_config.yaml")
        assert model.tokenizer.source == str(fixture.tokenizer)
        assert model.config["rope_theta"] == fixture.spec.rope_theta
        assert model.config["rms_norm_eps"] == fixture.spec.norm_eps
        assert model.config["max_position_embeddings"] == fixture.spec.max_positions
        scaling = model.config.get("rope_parameters") or model.config.get("rope_scaling") or {}
        assert isinstance(scaling, dict)
        wants = "llama3" if fixture.spec.llama3_rope_factor else "default"
        assert scaling.get("rope_type", "default") == wants


@pytest.mark.parametrize("name", [TORCH, ZARR])
def test_an_archive_that_was_unpacked(
    fixtures: Mapping[str, Fixture], tmp_path: Path, name: str
) -> None:
    fixture = fixtures[name]
    found = folder(fixture, tmp_path)
    for path in (found, found / "model_weights", found.rename(tmp_path / "unpacked.nemo")):
        if not path.exists():
            continue
        model = load(path, options(fixture))
        assert model.companions.trainer == "NeMo 1"
        assert served(open_tree(path, options(fixture))) == expected(fixture)


def test_an_archive_is_found_in_its_directory_by_its_link(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    archive = packed(folder(fixtures[TORCH], tmp_path), tmp_path / "model.nemo")
    (tmp_path / "latest.nemo").symlink_to(archive)
    model = load(tmp_path / "latest.nemo", options(fixtures[TORCH]))
    assert model.checkpoint.path == archive / "model_weights"


def test_a_sentencepiece_model_in_the_archive(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    source = folder(fixtures[TORCH], tmp_path)
    name = "b1946ac92492d2347c6235b4d2611184_tokenizer.model"
    (source / name).write_bytes(trained("llama"))
    tokenizer = {"library": "sentencepiece", "type": None, "model": f"nemo:{name}"}
    config = model_config(fixtures[TORCH].spec, tokenizer)
    (source / "model_config.yaml").write_text(yaml.safe_dump(config))
    archive = packed(source, tmp_path / "model.nemo")
    model = load(archive, options(fixtures[TORCH]))
    assert model.tokenizer.source == str(archive / name)
    assert model.tokenizer.files["tokenizer.model"] == trained("llama")


def test_records_are_checked_inside_the_archive(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    archive = packed(folder(fixtures[TORCH], tmp_path), tmp_path / "model.nemo")
    checkpoint = load(archive, options(fixtures[TORCH])).checkpoint
    found = checksums.check(checkpoint)
    assert found.differences == ()
    tensor = checkpoint.tensors["model.embedding.word_embeddings.weight"]
    storage = Storage(checkpoint.files)
    placed = storage.place(tensor.chunks[0], tensor.dtype)
    storage.close()
    member = member_at(placed.path)
    assert member is not None
    with archive.open("r+b") as file:
        file.seek(member.start + placed.offset)
        (byte,) = file.read(1)
        file.seek(member.start + placed.offset)
        file.write(bytes([byte ^ 1]))
    checkpoint = load(archive, options(fixtures[TORCH])).checkpoint
    (difference,) = checksums.check(checkpoint).differences
    assert difference.name == tensor.fqn


@pytest.mark.parametrize("prefix", ["model.", "model.module."])
@pytest.mark.parametrize("name", LEGACY)
def test_one_file_for_each_rank(
    fixtures: Mapping[str, Fixture], tmp_path: Path, name: str, prefix: str
) -> None:
    """`model.module.` is what there is with megatron_amp_O2."""
    fixture = fixtures[name]
    source = legacy_folder(fixture, LEGACY[name], prefix, tmp_path)
    for path in (source, packed(source, tmp_path / "model.nemo")):
        model = load(path, options(fixture))
        assert model.companions.trainer == "NeMo 1"
        assert model.checkpoint.path == path
        assert served(open_tree(path, options(fixture))) == expected(fixture)
    assert checksums.check(model.checkpoint).differences == ()


def test_ranks_that_are_missing(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    name = "torch-llama-tp2-pp2"
    source = legacy_folder(fixtures[name], LEGACY[name], "model.", tmp_path)
    shutil.rmtree(source / "tp_rank_01_pp_rank_000")
    archive = packed(source, tmp_path / "model.nemo")
    with pytest.raises(CheckpointError, match=r"1 of .* missing: tp_rank_01_pp_rank_000 \(each"):
        load(archive, Options())
    (source / "tp_rank_00_pp_rank_001/model_weights.ckpt").rename(source / "elsewhere")
    expects = r"tp_rank_00_pp_rank_001/model_weights\.ckpt: No such file"
    for path in (source, packed(source, archive)):
        with pytest.raises(CheckpointError, match=expects):
            load(path, Options())


def test_ranks_of_a_model_from_before_megatron_core(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    name = "torch-qwen2-tp2-tied"
    source = legacy_folder(fixtures[name], LEGACY[name], "model.language_model.", tmp_path)
    with pytest.raises(CheckpointError, match=r"convert_gpt_nemo_to_mcore\.py of NeMo 1"):
        load(packed(source, tmp_path / "model.nemo"), Options())


# -- the config -----------------------------------------------------------------------------------


def test_what_the_config_leaves_out_has_the_default_of_nemo() -> None:
    args = translated({"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2})
    assert args["rotary_base"] == 10000
    assert args["position_embedding_type"] == "learned_absolute"
    assert args["untie_embeddings_and_output_weights"] is False
    assert args["normalization"] == "LayerNorm"
    assert (args["add_bias_linear"], args["add_qkv_bias"]) == (True, False)
    assert args["swiglu"] is False
    assert "use_rope_scaling" not in args


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        ({"activation": "geglu"}, "swiglu", False),
        ({"activation": "swiglu"}, "swiglu", True),
        ({"normalization": "layernorm1p"}, "apply_layernorm_1p", True),
        ({"override_vocab_size": 307}, "padded_vocab_size", 307),
        ({"num_moe_experts": 8}, "num_experts", 8),
        ({"seq_len_interpolation_factor": 4}, "rotary_seq_len_interpolation_factor", 4),
        ({"scale_positional_embedding": True}, "rope_scaling_factor", 8),
        ({"scale_positional_embedding": True, "scale_factor": 32}, "rope_scaling_factor", 32),
        ({"mcore_customization_config": {"qk_layernorm": True}}, "qk_layernorm", True),
        ({"encoder_seq_length": 77}, "max_position_embeddings", 77),
    ],
)
def test_names_of_nemo(config: dict[str, object], name: str, value: object) -> None:
    assert translated(config)[name] == value


def test_a_model_that_no_family_is(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    source = folder(fixtures[TORCH], tmp_path)
    config = yaml.safe_load((source / "model_config.yaml").read_text())
    (source / "model_config.yaml").write_text(yaml.safe_dump({**config, "activation": "geglu"}))
    with pytest.raises(MappingError, match="swiglu"):
        load(packed(source, tmp_path / "model.nemo"), options(fixtures[TORCH]))


def test_a_model_from_before_megatron_core(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    source = folder(fixtures[TORCH], tmp_path)
    rename(source / "model_weights", lambda fqn: fqn.replace("model.", "model.language_model.", 1))
    config = yaml.safe_load((source / "model_config.yaml").read_text())
    (source / "model_config.yaml").write_text(yaml.safe_dump({**config, "mcore_gpt": False}))
    with pytest.raises(CheckpointError, match=r"convert_gpt_nemo_to_mcore\.py first"):
        load(packed(source, tmp_path / "model.nemo"), options(fixtures[TORCH]))


# -- damaged and hostile archives -----------------------------------------------------------------


@pytest.fixture
def archive(fixtures: Mapping[str, Fixture], tmp_path: Path) -> Path:
    return packed(folder(fixtures[TORCH], tmp_path), tmp_path / "model.nemo")


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, Options())
    return str(caught.value)


@pytest.mark.parametrize(("option", "name"), [("-z", "gzip"), ("-j", "bzip2"), ("-J", "xz")])
def test_compressed_archives_say_how_to_unpack_them(
    archive: Path, tmp_path: Path, option: str, name: str
) -> None:
    shutil.rmtree(tmp_path / "folder" / "model_weights")
    by_tar(option)(tmp_path / "folder", archive)
    said = refusal(archive)
    assert f"is compressed with {name}" in said
    assert f"mkdir DIR && tar -xf {archive} -C DIR" in said


def test_zstd_too(archive: Path) -> None:
    archive.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(5000))
    assert "is compressed with zstd" in refusal(archive)


@pytest.mark.parametrize("length", [0, 1, 511, 512, 1024, 20_000, -20_000, -1])
def test_an_archive_that_is_cut_short(archive: Path, length: int) -> None:
    """-1: one byte less than what the last member needs."""
    size = archive.stat().st_size
    if length == -1:
        with tarfile.open(archive) as opened:
            last = opened.getmembers()[-1]
            length = last.offset_data + last.size - 1
    os.truncate(archive, length if length >= 0 else size + length)
    assert "was not copied completely" in refusal(archive)


def test_what_is_no_archive(archive: Path) -> None:
    for data in (b"PK\x03\x04" + bytes(2000), b"x" * 4096, gzip.compress(b"")[2:] + bytes(2000)):
        archive.write_bytes(data)
        assert "at byte 0 is no header of a tar archive" in refusal(archive)
    archive.write_bytes(bytes(10_240))
    assert str(archive) in refusal(archive)


def test_an_archive_replaced_after_opening(fixtures: Mapping[str, Fixture], archive: Path) -> None:
    opened = open_tree(archive, options(fixtures[TORCH]))
    data = archive.read_bytes()
    archive.unlink()
    archive.write_bytes(data)
    with pytest.raises(ReadFault, match="replaced after the checkpoint was opened"):
        served(opened)


def test_an_archive_cut_while_it_is_open(fixtures: Mapping[str, Fixture], archive: Path) -> None:
    opened = open_tree(archive, options(fixtures[TORCH]))
    served(opened)  # opens them all
    os.truncate(archive, 4096)
    with pytest.raises(ReadFault, match="truncated after the checkpoint was opened"):
        served(opened)


def test_each_missing_shard_is_named(archive: Path, tmp_path: Path) -> None:
    for shard in sorted((tmp_path / "folder/model_weights").glob("*.distcp")):
        shard.rename(tmp_path / "kept")
        said = refusal(packed(tmp_path / "folder", archive))
        assert f"shard file {archive / 'model_weights' / shard.name}: No such file" in said
        (tmp_path / "kept").rename(shard)
