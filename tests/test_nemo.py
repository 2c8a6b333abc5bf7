"""What NeMo 2 leaves: `context/` beside real shards whose names begin with `module.`.

NeMo needs a GPU's libraries, so `context/` is a stand-in, laid out as
NeMo:nemo/lightning/io/mixin.py io_dump does; the shards are megatron-core's, renamed.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import functools
import json
import pickle
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mcorefs.errors import CheckpointError, MappingError
from mcorefs.files import read_all
from mcorefs.inspection import inspect
from mcorefs.model import Options, load
from mcorefs.tree import build
from tests.checkpoints import Fixture, Spec, ensure
from tests.edited import copy, rename
from tests.providers import Dumper, provider
from tests.recordings import assert_same_bytes, differences
from tests.trained_tokenizers import trained

DENSE, LLAMA, MOE = "qwen3-pp2-vpp2", "llama-tp2", "qwen3_moe-tp2-pp2-ep2"


@pytest.fixture(scope="module")
def fixtures() -> dict[str, Fixture]:
    return ensure([DENSE, LLAMA, MOE])


class Phase(enum.Enum):
    FIT = "fit"


class Exploding:
    """May not be made."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.mkdir, (Path("exploded"),)


def lightning_state() -> dict[str, object]:
    """common.pt holds what Lightning and its callbacks keep: objects of any class."""
    holder = argparse.Namespace()
    holder.itself = [holder]
    return {
        "pytorch-lightning_version": "2.5.0",
        "epoch": 0,
        "global_step": 99,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": collections.Counter("ab")}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'val_loss'}": {
                "best_k_models": collections.OrderedDict({"a": torch.tensor(1.5)}),
                "dirpath": Path("/results"),
                "when": datetime.datetime(2025, 9, 20),
            },
            Phase.FIT: {(Phase.FIT, 1): {Phase.FIT, "b"}},
        },
        "lr_schedulers": [functools.partial(max, 1, key=abs), collections.deque([1], 3)],
        "hyper_parameters": [torch.nn.Linear(2, 2), torch.device("cpu"), holder, Exploding()],
        "rng": [random.getstate(), np.random.default_rng(), np.random.RandomState(1)],
        "tensors": [
            torch.zeros(2, dtype=torch.complex64),
            torch.eye(2).to_sparse(),
            torch.nn.Parameter(torch.zeros(1)),
        ],
        "sharded_state_dict_metadata": {"distrib_optim_sharding_type": "fully_reshardable"},
    }


def saved(fixture: Fixture, directory: Path, context: Mapping[str, str]) -> Path:
    """The checkpoint as NeMo leaves it, with these files in `context/`."""
    directory.mkdir(exist_ok=True)
    iteration = copy(fixture, directory)
    rename(iteration, lambda fqn: fqn if "/shard_" in fqn else f"module.{fqn}")
    torch.save(lightning_state(), iteration / "common.pt")
    top = directory / "model--val_loss=1.23-step=99-consumed_samples=3200.0-last"
    (top / "context").mkdir(parents=True)
    iteration.rename(top / "weights")
    shutil.rmtree(iteration.parent)
    for name, text in context.items():
        (top / "context" / name).write_text(text)
    # What io_dump pickles, for cloudpickle to load.
    poison = top / "context/5363c7d7-df1c-4ec3-84ef-76a1802ce42e"
    poison.write_bytes(pickle.dumps(Exploding()))
    return top


MODULES = "nemo.collections.llm.gpt.model"
CONFIGS = {
    DENSE: "qwen3.Qwen3Config600M",
    MOE: "qwen3.Qwen3Config30B_A3B",
    LLAMA: "llama.Llama31Config8B",
}
LLAMA31 = {
    "scale_factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "old_context_len": 8192,
}
HUB = {"pretrained_model_name": "meta-llama/Llama-3.1-8B"}


def model_yaml(
    spec: Spec, name: str, tokenizer: object = None, **changes: object
) -> dict[str, str]:
    """As NeMo writes it for a run that leaves the vocabulary to the tokenizer; ... takes a field
    of the config away."""
    config = {**provider(spec), "_target_": f"{MODULES}.{CONFIGS[name]}", "vocab_size": None}
    config |= {"should_pad_vocab": False, **(LLAMA31 if name == LLAMA else {}), **changes}
    config = {field: value for field, value in config.items() if value is not ...}
    model = {"_target_": f"{MODULES}.Model", "config": config, "tokenizer": tokenizer}
    return {"model.yaml": yaml.dump(model, Dumper=Dumper)}


@pytest.mark.parametrize("level", ["..", ".", "weights"])
@pytest.mark.parametrize(
    ("name", "kind", "vocab_size"),
    [(DENSE, "qwen3", None), (MOE, "qwen3_moe", 301), (LLAMA, "llama", 307)],
)
def test_everything_comes_from_the_context(
    fixtures: Mapping[str, Fixture],
    tmp_path: Path,
    level: str,
    name: str,
    kind: str,
    vocab_size: int | None,
) -> None:
    """Where the vocabulary is left to the tokenizer, its size is recorded nowhere."""
    fixture = fixtures[name]
    top = saved(fixture, tmp_path / "run", model_yaml(fixtures[name].spec, name))
    shutil.copytree(fixture.tokenizer, top / "context/nemo_tokenizer")
    model = load(top / level, Options(vocab_size=vocab_size))
    assert model.location.iteration == 99
    assert model.companions.trainer == "NeMo 2"
    assert model.companions.args_source == str(top / "context/model.yaml")
    assert model.choice.evidence == (f"the trainer names model_type {kind}",)
    assert model.tokenizer.source == str(top / "context/nemo_tokenizer")
    assert differences(model, fixture, tmp_path) == {}
    assert_same_bytes(model, fixture)
    assert not Path("exploded").exists()


def test_parallel_sizes_are_shown(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    found = inspect(saved(fixtures[MOE], tmp_path, model_yaml(fixtures[MOE].spec, MOE)), Options())
    assert not found.problems
    assert found.trainer == "NeMo 2"
    assert found.parallel == {"TP": 2, "PP": 2, "EP": 2, "ETP": 1, "CP": 1}


def test_a_vocabulary_that_is_the_tokenizers(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    fixture = fixtures[MOE]
    model = load(saved(fixture, tmp_path, model_yaml(fixtures[MOE].spec, MOE)), Options())
    assert model.config["vocab_size"] == fixture.spec.padded_vocab_size
    assert any("true vocabulary size is recorded nowhere" in remark for remark in model.remarks)


def test_a_vocabulary_that_was_given(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    """It is the number of rows (nemo/collections/llm/gpt/model/base.py configure_model)."""
    rows = fixtures[MOE].spec.padded_vocab_size
    top = saved(
        fixtures[MOE], tmp_path / "right", model_yaml(fixtures[MOE].spec, MOE, vocab_size=rows)
    )
    model = load(top, Options())
    assert model.config["vocab_size"] == rows
    assert not any("vocabulary" in remark for remark in model.remarks)
    top = saved(
        fixtures[MOE], tmp_path / "wrong", model_yaml(fixtures[MOE].spec, MOE, vocab_size=301)
    )
    with pytest.raises(MappingError, match="padded_vocab_size is 301"):
        load(top, Options())


def test_what_nothing_says_is_named_at_once(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    context = model_yaml(
        fixtures[MOE].spec, MOE, rotary_base=..., layernorm_epsilon=..., moe_router_topk=...
    )
    with pytest.raises(MappingError) as caught:
        load(saved(fixtures[MOE], tmp_path, context), Options())
    unknown = [problem.partition(" is unknown")[0] for problem in caught.value.problems]
    assert sorted(unknown) == ["num_experts_per_tok", "rms_norm_eps", "rope_theta"]


@pytest.mark.parametrize(
    ("tokenizer", "places"),
    [
        ({"pretrained_model_name": "my_tokenizer"}, ["my_tokenizer"]),
        ({"pretrained_model_name": {"attr": "my_tokenizer", "skip": True}}, ["my_tokenizer"]),
        ({"model_path": "spm_32k.model"}, ["spm_32k.model"]),
        ({"pretrained_model_name": "../../other"}, []),
        ({"pretrained_model_name": ["other"], "model_path": 3}, []),
        (None, []),
    ],
)
def test_where_the_tokenizer_is(
    fixtures: Mapping[str, Fixture], tmp_path: Path, tokenizer: object, places: list[str]
) -> None:
    top = saved(fixtures[DENSE], tmp_path, model_yaml(fixtures[DENSE].spec, DENSE, tokenizer))
    (top / "context/a.model").write_bytes(b"")
    usual = ["nemo_tokenizer", "tokenizer", "", "a.model"]
    found = load(top, Options()).companions
    assert found.tokenizers == tuple(top / "context" / place for place in (*places, *usual))


def test_a_tokenizer_on_a_hub(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    context = model_yaml(fixtures[LLAMA].spec, LLAMA, HUB)
    model = load(saved(fixtures[LLAMA], tmp_path, context), Options())
    assert not model.tokenizer.found
    said = b"".join(model.tokenizer.files.values()).decode()
    assert "trained with the tokenizer 'meta-llama/Llama-3.1-8B'" in said


def test_a_sentencepiece_model_under_its_own_name(
    fixtures: Mapping[str, Fixture], tmp_path: Path
) -> None:
    top = saved(fixtures[DENSE], tmp_path, model_yaml(fixtures[DENSE].spec, DENSE))
    (top / "context/spm_32k.model").write_bytes(trained("unigram"))
    model = load(top, Options())
    assert model.tokenizer.source == str(top / "context/spm_32k.model")


# -- without model.yaml ---------------------------------------------------------------------------


def test_a_graph_tells_the_family(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures[MOE]
    graph = pyref("Qwen3Model", "Qwen3Config30B_A3B", "MegatronStrategy")
    top = saved(fixture, tmp_path, {"io.json": graph})
    model = load(top, Options(hf_config=fixture.hf))
    assert model.companions.model_type == "qwen3_moe"
    assert model.companions.args_source == f"there is no {top / 'context/model.yaml'}"
    assert_same_bytes(model, fixture)
    with pytest.raises(MappingError, match="rope_theta is unknown"):
        load(top, Options())
    assert not Path("exploded").exists()


def pyref(*names: str) -> str:
    items = [["Attr(name='fn_or_cls')", {"type": "pyref", "name": name}] for name in names]
    return json.dumps({"objects": {"metadata_1": {"items": items}}})


@pytest.mark.parametrize(
    ("graph", "kind"),
    [
        (pyref("Qwen3Config600M", "Qwen3Model", "AutoTokenizer"), "qwen3"),
        (pyref("Qwen3Config600M", "Qwen3Config8B"), "qwen3"),
        (pyref("Qwen3Config600M", "Llama31Config8B"), None),
        (pyref("GPTConfig"), None),
        ("{", None),
        ("[" * 100_000, None),
        ("[]", None),
        ('{"objects": []}', None),
        ('{"objects": {"a": 1, "b": {"items": 1}, "c": {"items": [1, [], ["x", 1]]}}}', None),
        ('{"objects": {"a": {"items": [["x", {"type": "pyref", "name": {}}]]}}}', None),
    ],
)
def test_graphs(
    fixtures: Mapping[str, Fixture], tmp_path: Path, graph: str, kind: str | None
) -> None:
    top = saved(fixtures[DENSE], tmp_path, {"io.json": graph})
    model = load(top, Options(hf_config=fixtures[DENSE].hf))
    assert model.companions.trainer == "NeMo 2"
    assert model.companions.model_type == kind


def test_without_a_context(fixtures: Mapping[str, Fixture], tmp_path: Path) -> None:
    fixture = fixtures[DENSE]
    top = saved(fixture, tmp_path, {})
    shutil.rmtree(top / "context")
    model = load(top, Options(hf_config=fixture.hf))
    assert model.companions.trainer == "NeMo 2"
    assert any("copy it from the last checkpoint" in remark for remark in model.remarks)
    (top / "weights").rename(top / "other")
    assert load(top, Options(hf_config=fixture.hf)).companions.trainer == "Megatron-LM"


@pytest.mark.parametrize("text", ["- a list", "config: [", "a: &a [*a]"])
def test_a_model_yaml_that_is_none(
    fixtures: Mapping[str, Fixture], tmp_path: Path, text: str
) -> None:
    top = saved(fixtures[DENSE], tmp_path, {"model.yaml": text})
    with pytest.raises(CheckpointError, match=r"model\.yaml (holds no mapping|cannot be read)"):
        load(top, Options())


# -- adapters ------------------------------------------------------------------------------------

ADAPTER, BASE = "bridge-qwen3-pp2-only", "bridge-qwen3-pp2-only-base"


def test_an_adapter_names_its_base_model(tmp_path: Path) -> None:
    """Its modules are those that Megatron-Bridge took over; nothing plain says its alpha."""
    both = ensure([ADAPTER, BASE])
    base, adapter = (
        saved(both[name], tmp_path / name, model_yaml(both[name].spec, DENSE, vocab_size=None))
        for name in (BASE, ADAPTER)
    )
    rows = both[BASE].spec.vocab_size
    metadata = adapter / "weights/adapter_metadata.json"
    metadata.write_text(json.dumps({"model_ckpt_path": "/nonexistent/qwen3"}))
    with pytest.raises(CheckpointError, match=r"\(/nonexistent/qwen3, which is not on this mach"):
        load(adapter, Options())
    metadata.write_text(json.dumps({"model_ckpt_path": str(base)}))
    with pytest.raises(MappingError, match="give it with --adapter PATH:SCALE"):
        load(adapter, Options())
    model = load(adapter, Options(adapter=adapter, adapter_scale=4.0, vocab_size=rows))
    tree, _ = build(model, "50GB", 1 << 20)
    expected = (both[ADAPTER].hf / "model.safetensors").read_bytes()
    assert read_all(tree.files["model.safetensors"]) == expected
