"""What an adapter's files say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mcorefs.adapters import Outline, Pair, Problems
from mcorefs.errors import CheckpointError
from mcorefs.files import FileIdentity
from mcorefs.formats import HUGGINGFACE
from mcorefs.formats.huggingface import read_header, resolved
from mcorefs.index import StoredTensor
from mcorefs.locate import locate
from mcorefs.peft.patterns import Patterns
from mcorefs.storage import read_file, regular_file
from mcorefs.trainers import LoraTraining
from mcorefs.trainers.base import number
from mcorefs.views import Permute, Stored, View

NAME = "peft"
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_MAX_CONFIG = 64 << 20
_MATRIX = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?$")
_WHOLE = re.compile(r"\.(?:base_layer|modules_to_save)(?=\.)")

_DECIDES_NOTHING = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "lora_dropout", "task_type"),
    *("modules_to_save", "target_modules", "target_parameters", "ensure_weight_tying"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "qalora_group_size"),
    *("megatron_config", "megatron_core", "runtime_config"),
)
"""Settings that say how it was trained, or which modules have matrices: their names tell that."""
_READ = (
    *("alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "peft_type"),
    *("r", "rank_pattern", "use_dora", "use_rslora"),
)
_MOST_SHOWN = 20
"""Settings that are reported one by one."""
_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights with which training began on the base model as it is; the others take
from its weights what the matrices begin with."""


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter as its files describe it."""

    path: Path
    training: LoraTraining
    pairs: Mapping[str, Pair]
    """By module, such that B @ A lies as its weight does."""
    rounded: frozenset[str]
    """Those of the modules of which PEFT rounds the product to the dtype of the weight before it
    adds it: embeddings, and parameters that were named (tuners/lora/layer.py Embedding.merge,
    ParamWrapper.get_delta_weight)."""
    whole: Mapping[str, View]
    """Parameters that were trained whole, by name."""
    alphas: Patterns
    ranks: Patterns
    files: Mapping[str, FileIdentity]
    problems: tuple[str, ...]

    @property
    def outline(self) -> Outline:
        """What there is to say about it."""
        targets = {module.rpartition(".")[2] for module in self.pairs}
        modules = {name.removesuffix(".weight") for name in self.whole} - self.pairs.keys()
        whole = {module.rpartition(".")[2] for module in modules}
        ranks = {pair.rank for pair in self.pairs.values()}
        return Outline(tuple(sorted(ranks)), tuple(sorted(targets)), tuple(sorted(whole)))


def is_adapter(path: Path) -> bool:
    """Whether `path` is to be read as an adapter in PEFT's format: ms-swift may save the same one
    in Megatron's, which is then the one that was trained."""
    try:
        if not (path / CONFIG).is_file():
            return False
        return locate(path).format is HUGGINGFACE
    except OSError:
        return False
    except CheckpointError:
        return True


def read_adapter(path: Path) -> PeftAdapter:
    """The adapter in directory `path`; reads metadata only.

    Raises CheckpointError where its files cannot be read. What cannot be merged is in `problems`.
    """
    config = _config(path / CONFIG)
    problems = Problems()
    _check(config, problems)
    rank, alpha = config.get("r"), number(config.get("lora_alpha"))
    targets, base = config.get("target_modules"), config.get("base_model_name_or_path")
    training = LoraTraining(
        rank=rank if type(rank) is int and rank > 0 else None,
        alpha=alpha,
        is_rank_stabilised=config.get("use_rslora") is True,
        targets=tuple(map(str, targets)) if isinstance(targets, list) else (str(targets or ""),),
        base=base if isinstance(base, str) and base else None,
    )
    file = _weights(path)
    identity, why = regular_file(file)
    if identity is None:
        raise CheckpointError(f"{file}: {why}")
    factors, whole = _sorted_out(dict(read_header(file)), problems)
    is_turned = config.get("fan_in_fan_out") is True
    pairs = dict(_paired(factors, is_turned, problems))
    if not factors and not whole:
        problems.add(f"{file} holds no tensor of an adapter")
    return PeftAdapter(
        path,
        training,
        pairs,
        frozenset(_rounded(factors, config.get("target_parameters"))),
        whole,
        Patterns.of(config, "alpha_pattern", problems, CONFIG),
        Patterns.of(config, "rank_pattern", problems, CONFIG),
        {str(file): identity},
        tuple(problems),
    )


def _config(path: Path) -> dict[str, object]:
    try:
        config = json.loads(read_file(resolved(path), _MAX_CONFIG))
    except (OSError, ValueError, RecursionError) as problem:
        raise CheckpointError(f"{path} cannot be read: {problem}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} describes no adapter: it holds no JSON object")
    return config


def _weights(path: Path) -> Path:
    if (path / WEIGHTS).is_file():
        return resolved(path / WEIGHTS)
    if (path / PICKLED).is_file():
        raise CheckpointError(
            f"{path / PICKLED} is a pickle, which is never opened: load the adapter with peft and "
            "save it again with save_pretrained, which writes safetensors"
        )
    raise CheckpointError(f"{path} holds {CONFIG}, but no {WEIGHTS}")


def _check(config: Mapping[str, object], problems: Problems) -> None:
    """Settings under which the model is not W + scale * (B @ A)."""
    if (kind := config.get("peft_type")) != "LORA":
        problems.add(f"{CONFIG} says peft_type={kind!r:.80}: only LORA can be merged")
    if config.get("use_dora"):
        problems.add(
            "the adapter is a DoRA (use_dora), which cannot be merged on read; let the framework "
            "that trained it do that"
        )
    if (bias := config.get("bias", "none")) != "none":
        problems.add(f"{CONFIG} says bias={bias!r:.80}: biases were trained too, only none can be")
    if (init := config.get("init_lora_weights")) not in _KEEPS_BASE:
        problems.add(
            f"{CONFIG} says init_lora_weights={init!r:.80}, which changes the weights of the base "
            "model before training: it cannot be merged into them as they are"
        )
    for name in ("use_rslora", "fan_in_fan_out", "use_dora"):
        if config.get(name) not in (None, True, False):
            problems.add(
                f"{CONFIG} says {name}={config[name]!r:.80}, which is neither true nor false"
            )
    others = sorted(config.keys() - {*_DECIDES_NOTHING, *_READ})
    unknown = [name for name in others if config[name] not in (None, False, "", [], {})]
    for name in unknown[:_MOST_SHOWN]:
        problems.add(f"{CONFIG} says {name:.80}={config[name]!r:.80}, which is not known")
    if (more := len(unknown) - _MOST_SHOWN) > 0:
        problems.add(f"{CONFIG} says {more} more things that are not known")


Factors = Mapping[tuple[str, bool], Mapping[str, View]]
"""A and B by module, and whether that is an embedding."""


def _sorted_out(
    tensors: Mapping[str, StoredTensor | str], problems: Problems
) -> tuple[Factors, dict[str, View]]:
    """(what the adapter multiplies, parameters trained whole by name)."""
    factors: dict[tuple[str, bool], dict[str, View]] = {}
    whole: dict[str, View] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if isinstance(tensor, str):
            problems.add(f"the adapter holds {key} of dtype {tensor}, which is not known")
        elif name == key:
            problems.add(f"the adapter holds {key}, which does not begin with {_PREFIX}")
        elif match := _MATRIX.match(name):
            factors.setdefault((match[1], match[2] is not None), {})[match[3]] = Stored(tensor)
        elif "lora_magnitude_vector" in name:
            problems.add(f"the adapter is a DoRA ({key}), which cannot be merged on read")
        elif ".lora_" in name or "trainable_tokens" in name:
            problems.add(f"the adapter holds {key}, which is not known")
        elif (parameter := _WHOLE.sub("", name)) in whole:
            problems.add(f"the adapter holds {parameter} twice")
        else:
            whole[parameter] = Stored(tensor)
    return factors, whole


def _rounded(factors: Factors, parameters: object) -> Iterator[str]:
    named = parameters if isinstance(parameters, list) else []
    names = {f".{name}" for name in named if isinstance(name, str)}
    ends = {name.count(".") for name in names}
    for module, is_embedding in factors:
        parts = f".{module}.weight".split(".")
        if is_embedding or any("." + ".".join(parts[-count:]) in names for count in ends):
            yield module


def _paired(factors: Factors, is_turned: bool, problems: Problems) -> Iterator[tuple[str, Pair]]:
    """Pairs by module. PEFT turns B @ A over where the weight is that of an embedding, and
    everywhere else if `is_turned` (fan_in_fan_out)."""
    for (module, is_embedding), sides in factors.items():
        if set(sides) != {"A", "B"}:
            problems.add(f"the adapter of {module} has only its {''.join(sides)} matrix")
        elif any(len(view.shape) != 2 for view in sides.values()):
            shapes = [list(view.shape) for view in sides.values()]
            problems.add(f"the adapter of {module} does not consist of matrices: {shapes}")
        elif is_embedding or is_turned:
            yield module, Pair(Permute(sides["B"], (1, 0)), Permute(sides["A"], (1, 0)))
        else:
            yield module, Pair(sides["A"], sides["B"])
