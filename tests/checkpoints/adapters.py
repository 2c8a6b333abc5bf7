"""LoRA modules in a model of megatron-core: the real ones of ms-swift and of Megatron-Bridge.

Both packages want TransformerEngine and a GPU to train. What they need here, names of parameters
and how they are sharded, does not: of mcore-bridge (which ms-swift uses) and megatron-bridge only
the modules for adapters are imported, with stand-ins for TransformerEngine's layers that shard as
those do.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from .families import FAMILIES
from .families.base import LAYER, Made, Qkv
from .lora import HF_NAMES, shared_experts
from .spec import Spec
from .te_linear import TELinear
from .weights import HFTensors, Rank, rank_of_this_process, rank_value

PACKAGES = Path(sys.prefix) / "trainers"
"""Where scripts/setup puts them, so that nothing else takes notice of them."""
StateDict = dict[str, Any]


def add_adapters(spec: Spec, models: list[GPTModel], adapter: Path) -> None:
    """Put LoRA modules around the layers that `spec` targets, with the values in `adapter`."""
    sys.path.append(str(PACKAGES))
    if spec.adapter == "ms-swift":
        _add_peft(spec, models)
    else:
        _add_bridge(spec, models)
    rank = rank_of_this_process()
    with HFTensors(adapter) as tensors, torch.no_grad():
        for model in models:
            for name, parameter in model.named_parameters():
                if (value := _value(spec, rank, tensors, _global(model, name))) is not None:
                    if value.shape != parameter.shape:
                        raise ValueError(f"{name}: {parameter.shape}, not {value.shape}")
                    parameter.copy_(value)


def saved(spec: Spec, state: StateDict) -> StateDict:
    """What is saved of a model's sharded state dict: ms-swift's megatron_lm_utils.py
    _filter_adapter_state_dict, Megatron-Bridge's peft/base.py adapter_key_filter."""
    if not spec.adapter_only:
        twice = "output_layer.weight" if spec.trains_head else None
        return {name: value for name, value in state.items() if name != twice}
    kept = (".lora_A.", ".lora_B.", ".modules_to_save.", ".adapter.")
    return {name: value for name, value in state.items() if any(key in name for key in kept)}


# -- ms-swift --------------------------------------------------------------------------------


class _TEColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]
    parallel_mode = "column"

    def __init__(self, input_size: int, output_size: int, **options: Any) -> None:
        # mcore-bridge multiplies what a layer of TransformerEngine would say is a rank's share.
        size = torch.distributed.get_world_size(options["tp_group"])
        super().__init__(input_size, output_size // size, **options)


def _add_peft(spec: Spec, models: list[GPTModel]) -> None:
    lora = _mcore_bridge()
    for model in models:
        for parent, name, module in list(_targets(spec, model)):
            adapted = lora.LoraParallelLinear(
                base_layer=module,
                adapter_name="default",
                r=spec.lora_rank,
                lora_alpha=spec.lora_alpha,
                use_rslora=spec.rank_stabilised,
                init_lora_weights=False,
                config=SimpleNamespace(
                    lora_dropout=0.0,
                    init_lora_weights=False,
                    use_rslora=spec.rank_stabilised,
                    lora_bias=False,
                ),
            )
            setattr(parent, name, adapted)
        if spec.trains_head and model.post_process:
            model.output_layer = _Trained(model.output_layer)


class _Trained(MegatronModule):  # type: ignore[misc]
    """PEFT's ModulesToSaveWrapper, with the sharding that mcore_bridge/patcher.py gives it."""

    def __init__(self, module: Any) -> None:
        super().__init__(module.config)
        self.original_module = module
        copy = ColumnParallelLinear(
            module.input_size,
            module.output_size,
            config=module.config,
            init_method=module.config.init_method,
            bias=False,
            gather_output=False,
        )
        self.modules_to_save = nn.ModuleDict({"default": copy})

    def sharded_state_dict(self, prefix: str = "", *args: Any, **kwargs: Any) -> StateDict:
        from mcore_bridge.tuners.utils import tuners_sharded_state_dict

        found: StateDict = tuners_sharded_state_dict(self, prefix, *args, **kwargs)
        found = {name: value for name, value in found.items() if "_extra_state" not in name}
        return {**found, f"{prefix}weight": found[f"{prefix}modules_to_save.default.weight"]}


def _mcore_bridge() -> Any:
    import peft  # before there is something by the name of transformer_engine  # noqa: F401

    _module("transformer_engine")
    path = PACKAGES / "mcore_bridge"
    _module("mcore_bridge", __path__=[str(path)])
    _module("mcore_bridge.utils", get_current_device=lambda: "cpu")
    _module("mcore_bridge.tuners", __path__=[str(path / "tuners")])
    from megatron.core.extensions import transformer_engine as extension

    for name in (
        "TEGroupedLinear",
        "TEColumnParallelGroupedLinear",
        "TERowParallelGroupedLinear",
        "TELayerNormColumnParallelLinear",
    ):
        setattr(extension, name, type(name, (), {}))
    extension.TELinear = TELinear
    extension.TEColumnParallelLinear = _TEColumnParallelLinear
    extension.TERowParallelLinear = RowParallelLinear
    from mcore_bridge.tuners import lora

    return lora


# -- Megatron-Bridge -------------------------------------------------------------------------


def _add_bridge(spec: Spec, models: list[GPTModel]) -> None:
    import megatron.core

    megatron.__path__.append(str(PACKAGES / "megatron"))
    _module("megatron.bridge", __path__=[str(PACKAGES / "megatron" / "bridge")])
    engine = _module("transformer_engine")
    layers = {name: type(name, (), {}) for name in ("Linear", "LayerNormLinear", "GroupedLinear")}
    operations = SimpleNamespace(Sequential=object)
    engine.pytorch = _module("transformer_engine.pytorch", ops=operations, **layers)
    from megatron.bridge.peft import adapter_wrapper, utils
    from megatron.bridge.peft.canonical_lora import CanonicalLoRA
    from megatron.bridge.peft.lora import LoRA

    # What is called in_proj it takes for that of a Mamba, up to 0.3.
    adapter_wrapper._compute_mamba_dim_info = lambda module: None
    utils.HAVE_TE = False  # megatron-core has mocks by the names of its layers
    options = {"dim": spec.lora_rank, "alpha": spec.lora_alpha}
    if spec.adapter == "canonical":
        parts = {
            "linear_qkv": ["linear_q", "linear_k", "linear_v"],
            "linear_fc1": ["linear_fc1_gate", "linear_fc1_up"],
        }
        names = [part for target in spec.lora_targets for part in parts.get(target, [target])]
        CanonicalLoRA(target_modules=names, **options)(models)
    else:
        LoRA(target_modules=list(spec.lora_targets), **options)(models)


def _module(name: str, **attributes: Any) -> Any:
    module = sys.modules[name] = ModuleType(name)
    module.__dict__.update(attributes)
    return module


# -- values ----------------------------------------------------------------------------------


def _targets(spec: Spec, model: GPTModel) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for _, parent in model.named_modules():
        for name, module in parent.named_children():
            if name in spec.lora_targets:
                yield parent, name, module


def _global(model: GPTModel, name: str) -> str:
    """`name` with the layer's number in the whole model."""
    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    if match is None:
        return name
    number = model.decoder.layers[int(match[1])].layer_number - 1
    return f"decoder.layers.{number}.{name[match.end() :]}"


_MATRIX = re.compile(
    r"decoder\.layers\.(?P<layer>\d+)\.(?:self_attention|mlp)\."
    r"(?:experts\.local_experts\.(?P<expert>\d+)\.)?(?P<shared>shared_experts\.)?(?P<module>\w+)\."
    r"(?:lora_(?P<side>[AB])\.default|adapter\.(?:adapter_(?P<part>\w+)\.)?linear_(?P<way>in|out))\."
    r"weight$"
)


def _value(spec: Spec, rank: Rank, hf: HFTensors, name: str) -> Tensor | None:
    """The value of parameter `name` on this rank, if it is an adapter's."""
    if name == "output_layer.modules_to_save.default.weight":
        rows = hf.whole("lm_head.weight")
        padding = rows.new_zeros((spec.padded_vocab_size - rows.shape[0], rows.shape[1]))
        return torch.cat([rows, padding]).chunk(spec.tp)[rank.tp]
    match = _MATRIX.match(name)
    if match is None:
        return None
    at, tp, size = _place(spec, rank, match)
    names = HF_NAMES[match["module"]]
    if part := match["part"]:
        names = (names[{"q": 0, "k": 1, "v": 2, "gate": 0, "up": 1}[part]],)
    is_a = match["side"] == "A" or match["way"] == "in"
    matrices = [f"{at}{n}.lora_{'A' if is_a else 'B'}.weight" for n in names]
    row_parallel = match["module"] in ("linear_proj", "linear_fc2", "out_proj")
    if is_a:
        if row_parallel:
            return hf.part(matrices[0], 1, tp, size)
        return _share(spec, hf.whole(matrices[0]), tp, size)
    if row_parallel or match["module"] == "router":
        return _share(spec, hf.whole(matrices[0]), tp, size)
    own = FAMILIES[spec.family].parameters.get(f"{LAYER}self_attention.{match['module']}.weight")
    if isinstance(own, Made):
        return rank_value(spec, rank, hf, replace(own, hf=tuple(matrices)))
    if len(matrices) == 3:
        return rank_value(spec, rank, hf, Qkv(f"{at}self_attn.{{}}_proj.lora_B.weight"))
    return torch.cat([hf.part(matrix, 0, tp, size) for matrix in matrices])


def _place(spec: Spec, rank: Rank, match: re.Match[str]) -> tuple[str, int, int]:
    """(where the module's Hugging Face layers are, which tensor-parallel rank this is, of how
    many)."""
    at = f"model.layers.{match['layer']}."
    if match["expert"] is not None:
        expert = rank.ep * (spec.experts // spec.ep) + int(match["expert"])
        return f"{at}mlp.experts.{expert}.", rank.etp, spec.expert_tp
    if match["shared"]:
        at += shared_experts(spec)
    elif match["module"].startswith("linear_fc"):
        at += "mlp."
    return at, rank.tp, spec.tp


def _share(spec: Spec, matrix: Tensor, tp: int, size: int) -> Tensor:
    """Of a matrix between the two layers that are cut: ms-swift keeps it whole on every rank,
    Megatron-Bridge cuts its rows."""
    return matrix if spec.adapter == "ms-swift" else matrix.chunk(size)[tp]
