"""Models that see: a language model of megatron-core's, and beside it, on the first pipeline stage,
transformers' vision module or one made of megatron-core's layers.

Where trainers have what: mcore-bridge:src/mcore_bridge/model/mm_gpt_model.py and mm_gpts/utils.py;
Megatron-Bridge:src/megatron/bridge/models/qwen_vl/modelling_qwen3_vl/model.py, with transformers'
module in 0.3, with Megatron's layers later, as mbridge has them
(mbridge:mbridge/models/qwen3_vl/vision_model.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.huggingface.module import HuggingFaceModule
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import AutoModel, PreTrainedConfig

from .families.base import Columns, Made, Place, Rows, Value, Whole
from .hf import model_config
from .spec import Spec

HF_VISION = "model.visual."
_IN_LAYER = {
    "input_layernorm": "norm1",
    "pre_mlp_layernorm": "norm2",
    "self_attention.linear_proj": "attn.proj",
    "mlp.linear_fc1": "mlp.linear_fc1",
    "mlp.linear_fc2": "mlp.linear_fc2",
}


def language_model(model: MegatronModule) -> GPTModel:
    return model.language_model if isinstance(model, Seeing) else model


class Seeing(MegatronModule):  # type: ignore[misc]
    """A model that sees. It is saved, not computed: `forward.check` asks its language model."""

    def __init__(self, spec: Spec, language: GPTModel) -> None:
        super().__init__(language.config)
        self.language_model = language
        if not language.pre_process:
            return
        config = model_config(spec).vision_config
        if spec.vision == "ms-swift":
            self.visual = _Swift(language.config, config)
        elif spec.vision == "megatron-bridge":
            self.vision_model = AutoModel.from_config(config)
        else:
            self.vision_model = _OfMegatron(config)


class _Swift(HuggingFaceModule):  # type: ignore[misc]
    """As HuggingFaceVit of mcore-bridge."""

    def __init__(self, config: TransformerConfig, vision: PreTrainedConfig) -> None:
        super().__init__(config)
        self.visual = AutoModel.from_config(vision)


class _PatchEmbed(nn.Module):
    def __init__(self, vision: PreTrainedConfig) -> None:
        super().__init__()
        kernel = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        self.proj = nn.Conv3d(vision.in_channels, vision.hidden_size, kernel, stride=kernel)


class _Merger(MegatronModule):  # type: ignore[misc]
    def __init__(self, config: TransformerConfig, vision: PreTrainedConfig, normed: int) -> None:
        super().__init__(config)
        merged = vision.hidden_size * vision.spatial_merge_size**2
        options: dict[str, Any] = {"config": config, "init_method": config.init_method}
        options |= {"bias": True, "skip_bias_add": False}
        self.patch_norm = nn.LayerNorm(normed)
        self.linear_fc1 = ColumnParallelLinear(merged, merged, gather_output=False, **options)
        self.linear_fc2 = RowParallelLinear(
            merged, vision.out_hidden_size, input_is_parallel=True, **options
        )


class _Block(TransformerBlock):  # type: ignore[misc]
    """Its deepstack mergers are saved as its layers are: stacked, but where layers have numbers."""

    def __init__(self, config: TransformerConfig, vision: PreTrainedConfig) -> None:
        layer = get_gpt_layer_local_spec(normalization="LayerNorm")
        super().__init__(config, layer, post_layer_norm=False)
        merged = vision.hidden_size * vision.spatial_merge_size**2
        indexes = getattr(vision, "deepstack_visual_indexes", ())
        mergers = [_Merger(config, vision, merged) for _ in indexes]
        self.deepstack_merger_list = nn.ModuleList(mergers)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        mergers = self._modules.pop("deepstack_merger_list")
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        self._modules["deepstack_merger_list"] = mergers
        numbered = metadata.get("non_homogeneous_layers") or metadata["singleton_local_shards"]
        for number, merger in enumerate(mergers):
            at = f"{prefix}deepstack_merger_list."
            offsets = () if numbered else ((0, number, len(mergers)),)
            saved = merger.sharded_state_dict(f"{at}{number}.", offsets, metadata)
            replace_prefix_for_sharding(
                saved, f"{at}{number}.", f"{at}{number}." if numbered else at
            )
            state |= saved
        return state


class _OfMegatron(MegatronModule):  # type: ignore[misc]
    def __init__(self, vision: PreTrainedConfig) -> None:
        config = TransformerConfig(
            num_layers=vision.depth,
            hidden_size=vision.hidden_size,
            ffn_hidden_size=vision.intermediate_size,
            num_attention_heads=vision.num_heads,
            normalization="LayerNorm",
            activation_func=gelu,
            add_bias_linear=True,
            tensor_model_parallel_size=_tensor_ranks(),
            use_cpu_initialization=True,
            perform_initialization=False,
        )
        super().__init__(config)
        self.patch_embed = _PatchEmbed(vision)
        self.pos_embed = nn.Embedding(vision.num_position_embeddings, vision.hidden_size)
        self.decoder = _Block(config, vision)
        self.merger = _Merger(config, vision, vision.hidden_size)


def _tensor_ranks() -> int:
    from megatron.core import parallel_state

    size: int = parallel_state.get_tensor_model_parallel_world_size()
    return size


def vision_value(spec: Spec, name: str) -> Value | None:
    """Where the value of a parameter of what sees lies in the Hugging Face save."""
    for prefix in ("visual.visual.", "vision_model."):
        if name.startswith(prefix) and spec.vision != "megatron":
            return Whole(HF_VISION + name.removeprefix(prefix))
    if not name.startswith("vision_model."):
        return None
    name = name.removeprefix("vision_model.")
    if match := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        block, module, parameter = f"{HF_VISION}blocks.{match[1]}.", match[2], match[3]
        if module == "self_attention.linear_qkv":
            return Made((f"{block}attn.qkv.{parameter}",), _by_head(spec))
        return _parallel(module, f"{block}{_IN_LAYER[module]}.{parameter}")
    hf = HF_VISION + name.removeprefix("decoder.").replace("patch_norm", "norm")
    return _parallel(name.rpartition(".")[0], hf)


def _parallel(module: str, hf: str) -> Value:
    if module.endswith("linear_fc1"):
        return Rows(hf)
    if module.endswith(("linear_fc2", "linear_proj")) and hf.endswith(".weight"):
        return Columns(hf)
    return Whole(hf)


def _by_head(spec: Spec) -> Any:
    """Query, key and value of one head after the other, of which each rank has its share: as
    megatron-core's attention takes them, with a query group per head."""
    heads = model_config(spec).vision_config.num_heads

    def made(tensors: Sequence[Tensor], place: Place) -> Tensor:
        q, k, v = (part.chunk(heads) for part in tensors[0].chunk(3))
        rows = [torch.cat(one) for one in zip(q, k, v, strict=True)]
        return torch.cat(rows).chunk(place.size)[place.rank]

    return made
