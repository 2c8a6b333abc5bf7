"""Layers of TransformerEngine as what they are to a converter: holders of parameters.

The converters build Megatron's model of them, and TransformerEngine cannot be installed without
CUDA. What is here has the parameters of the real layers, by name and shape
(TransformerEngine:transformer_engine/pytorch/module/), and cannot compute. So nothing of a
converter's work is missing, and its time is that of less: the real package takes seconds to import.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import nn

VERSION = "2.10.0"


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype))


class _Layer(nn.Module):
    def forward(self, *_: object, **__: object) -> None:
        raise NotImplementedError("holds parameters and cannot compute")


class Linear(_Layer):
    """A rank's share of a weight, as `parallel_mode` cuts it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        parallel_mode: str | None = None,
        tp_size: int = 1,
        params_dtype: torch.dtype = torch.bfloat16,
        **_: object,
    ) -> None:
        super().__init__()
        if parallel_mode == "column":
            out_features //= tp_size
        elif parallel_mode == "row":
            in_features //= tp_size
        self.in_features, self.out_features = in_features, out_features
        self.parallel_mode, self.tp_size, self.use_bias = parallel_mode, tp_size, bias
        self._make(bias, params_dtype)

    def _make(self, bias: bool, dtype: torch.dtype) -> None:
        self.weight = _parameter(self.out_features, self.in_features, dtype=dtype)
        if bias:
            self.bias = _parameter(self.out_features, dtype=dtype)


class LayerNormLinear(Linear):
    """The norm of its input has the parameter `layer_norm_weight`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        normalization: str = "LayerNorm",
        params_dtype: torch.dtype = torch.bfloat16,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, params_dtype=params_dtype, **options)
        self.layer_norm_weight = _parameter(in_features, dtype=params_dtype)
        if normalization == "LayerNorm":
            self.layer_norm_bias = _parameter(in_features, dtype=params_dtype)


class GroupedLinear(Linear):
    """One weight for each expert: weight0, weight1, ..."""

    fp8 = fp8_calibration = False

    def __init__(self, num_gemms: int, in_features: int, out_features: int, **options: Any) -> None:
        self.num_gemms = num_gemms
        super().__init__(in_features, out_features, **options)
        self.fp8_meta = {"fp8_checkpoint": False}
        self.register_state_dict_post_hook(_add_extra_state)  # type: ignore[no-untyped-call]

    def init_fp8_metadata(self, num_gemms: int) -> None:
        """Nothing here is FP8."""

    def _make(self, bias: bool, dtype: torch.dtype) -> None:
        for i in range(self.num_gemms):
            weight = _parameter(self.out_features, self.in_features, dtype=dtype)
            self.register_parameter(f"weight{i}", weight)
            if bias:
                self.register_parameter(f"bias{i}", _parameter(self.out_features, dtype=dtype))


def _add_extra_state(_: nn.Module, state: dict[str, Any], prefix: str, __: object) -> None:
    """Which megatron-core divides among the experts; empty where nothing is FP8."""
    state[f"{prefix}_extra_state"] = torch.empty(0, dtype=torch.uint8)


class RMSNorm(_Layer):
    def __init__(
        self, hidden_size: int, params_dtype: torch.dtype = torch.bfloat16, **_: object
    ) -> None:
        super().__init__()
        self.weight = _parameter(hidden_size, dtype=params_dtype)


class LayerNorm(RMSNorm):
    def __init__(
        self, hidden_size: int, params_dtype: torch.dtype = torch.bfloat16, **_: object
    ) -> None:
        super().__init__(hidden_size, params_dtype)
        self.bias = _parameter(hidden_size, dtype=params_dtype)


class DotProductAttention(_Layer):
    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()


_LAYERS = (Linear, LayerNormLinear, GroupedLinear, RMSNorm, LayerNorm, DotProductAttention)
_MODULES = (
    "",
    ".common",
    ".common.recipe",
    ".pytorch",
    ".pytorch.distributed",
    ".pytorch.fp8",
    ".pytorch.tensor",
    ".pytorch.router",
    ".pytorch.ops",
)
"""Those that are imported on the way to a model; anything else of them is a class with nothing."""


def install() -> None:
    """Make it what `import transformer_engine` finds; call before anything of Megatron."""
    for name in _MODULES:
        module = ModuleType(f"transformer_engine{name}")
        module.__path__, module.__spec__ = [], ModuleSpec(module.__name__, None)
        vars(module)["__getattr__"] = _nothing
        sys.modules[module.__name__] = module
        parent, _, last = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    vars(sys.modules["transformer_engine"])["__version__"] = VERSION
    for layer in _LAYERS:
        setattr(sys.modules["transformer_engine.pytorch"], layer.__name__, layer)
    _keep_to_cpu()
    _save_no_extra_states()


def _keep_to_cpu() -> None:
    """Of CUDA, what is called on the way that does nothing for a model in host memory."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.Stream = lambda *_, **__: None  # type: ignore[assignment, misc]
    torch.nn.Module.cuda = lambda module, *_: module  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]


def _save_no_extra_states() -> None:
    """The checkpoint has none for experts, for it was saved by layers without FP8."""
    from megatron.core.extensions.transformer_engine import TEGroupedLinear

    grouped = TEGroupedLinear._sharded_state_dict_grouped

    def without(*args: Any, **options: Any) -> dict[str, Any]:
        found = grouped(*args, **options)
        return {name: value for name, value in found.items() if "_extra_state" not in name}

    TEGroupedLinear._sharded_state_dict_grouped = without


def _nothing(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
