"""Names that Megatron's modules give to their parameters, for all that meet them on disk.

Sources: Megatron-LM:megatron/core/transformer/moe/experts.py, extensions/transformer_engine.py and
transformer/fsdp_dtensor_checkpoint.py; peft:src/peft/tuners/lora/layer.py, utils/other.py.
"""

from __future__ import annotations

import re

WRAPPERS = re.compile(
    r"(?:(?:module|model|base_model|language_model)\.)+"
    r"(?=(?:embedding|decoder|output_layer|mtp)\.)"
)
"""What a training framework wraps around the model (NeMo 2: `module.`, NeMo 1: `model.`,
Megatron-FSDP: `model.module.`, PEFT: `base_model.model.`), and where a model that sees has its
language model: `language_model.`."""

_VISION = re.compile(
    r"(?:(?:module|model|base_model)\.)*(?:visual\.visual|visual|vision_model)\.(?=.)"
)
"""Where such a model has what sees: ms-swift in a module of transformers' inside one of its own
(mcore-bridge:src/mcore_bridge/model/mm_gpts/utils.py HuggingFaceVit), Megatron-Bridge under the
last two names (src/megatron/bridge/models/qwen_vl)."""
VISION, MEGATRON_VISION = "vision_model.", "vision_model.decoder."
"""What its names begin with here, be it a module of transformers', by whose names the rest goes, or
one of Megatron's (mbridge:mbridge/models/qwen3_vl/vision_model.py); only that has the second."""

_ADAPTER = re.compile(
    r"\.(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)|modules_to_save"
    r"|adapter\.(?:adapter_\w+\.)?(?:linear_in|linear_out|weight_magnitude))(?:\.|$)"
)
"""PEFT's names, as ms-swift saves them, and Megatron-Bridge's (peft/adapter_wrapper.py)."""
_WRAPPED = re.compile(r"\.(base_layer|original_module)(?=\.)")
"""What PEFT puts between a module that it adapts, or trains a copy of, and its parameters."""

_MTP_LAYER = re.compile(r"(mtp\.layers\.\d{1,9}\.)mtp_model_layer\.(?!layers\.)")

Expert = tuple[str, int, str]
"""(module that holds the experts, number, parameter): ("decoder.layers.0.mlp.experts", 3,
"linear_fc1.weight")."""

_SEQUENTIAL = re.compile(r"(.+\.experts)\.local_experts\.(\d{1,9})\.(.+)$")
_GROUPED = re.compile(r"(.+\.experts)\.(linear_fc[12]\.(?:weight|bias))(\d{1,9})(_[wv])?$")


def unwrapped(name: str) -> str:
    """`name` from the root of the (language) model, or of what sees for it."""
    if (wrappers := WRAPPERS.match(name)) is not None:
        return name[wrappers.end() :]
    vision = _VISION.match(name)
    return name if vision is None else VISION + name[vision.end() :]


def is_of_adapter(name: str) -> bool:
    """Whether `name` is that of a tensor which an adapter adds to its base model."""
    return _ADAPTER.search(name) is not None


def is_wrapped(name: str) -> bool:
    """Whether `name` is that of a tensor of the base model as PEFT calls it."""
    return _WRAPPED.search(name) is not None


def of_base(name: str) -> str:
    """`name` as it is without PEFT around its module."""
    return _WRAPPED.sub("", name)


def of_mtp(name: str) -> str:
    """`name` with what torch_dist calls the layer inside a multi-token prediction layer: modules,
    and so all other formats, call it `transformer_layer` up to megatron-core 0.16, then
    `mtp_model_layer`. That of a hybrid model is a stack of layers, and remains as it is."""
    return _MTP_LAYER.sub(r"\1transformer_layer.", name)


def is_of_mtp(name: str) -> bool:
    """Whether `name`, from the root of the model, is of a layer for multi-token prediction."""
    return name.startswith("mtp.")


def expert_of(name: str) -> Expert | None:
    """Whose parameter `name` is, where a module has each expert's under a name of its own.

    SequentialMLP   experts.local_experts.3.linear_fc1.weight
    TEGroupedMLP    experts.linear_fc1.weight3
    Megatron-FSDP   either, with _w (gate) or _v (up) behind it
    """
    if match := _SEQUENTIAL.match(name):
        return match[1], int(match[2]), match[3]
    if match := _GROUPED.match(name):
        return match[1], int(match[3]), match[2] + (match[4] or "")
    return None
