"""Layers of Step-3.5: attention whose heads each have a gate, in numbers, windows and rotations of
its layer's own.

Released versions of megatron-core have neither the gates nor the rotations: Megatron-LM's branch
dev has (megatron/core/transformer/attention.py: head_wise_attn_gate, rotary_base_per_layer). What
is of each layer is Megatron-Bridge's: src/megatron/bridge/models/stepfun/step35_provider.py
Step35DecoderLayer. All else is megatron-core's own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

_QKV = "linear_qkv.weight"


class GatedAttention(SelfAttention):  # type: ignore[misc]
    """The last rows of linear_qkv, on each rank, are the gates of its heads."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        **rest: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, **rest)
        self.linear_qkv = submodules.linear_qkv(
            config.hidden_size,
            self.linear_qkv_out_dim + config.num_attention_heads,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
        )
        self.heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.rope = RotaryEmbedding(
            config.kv_channels,
            config.rotary_percent,
            rotary_base=config.rotary_base,
            use_cpu_initialization=True,
        )
        self.linear_qkv.register_forward_hook(self._keep_gates)
        self.core_attention.register_forward_hook(self._gate)

    def _keep_gates(self, module: object, inputs: object, outputs: tuple[Tensor, Any]) -> Any:
        rows = outputs[0]
        self.gates = rows[..., -self.heads :]
        return rows[..., : -self.heads].contiguous(), *outputs[1:]

    def _gate(self, module: object, inputs: object, output: Tensor) -> Tensor:
        heads = output.view(*output.shape[:-1], self.heads, -1)
        return (heads * self.gates[..., None].sigmoid()).view_as(output)

    def forward(self, hidden_states: Tensor, *args: Any, **rest: Any) -> Any:
        rest["rotary_pos_emb"] = self.rope(hidden_states.shape[0])
        return super().forward(hidden_states, *args, **rest)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """linear_qkv as two tensors, each cut over the ranks by itself."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        whole = state.pop(prefix + _QKV)
        rows = whole.data.shape[0] - self.heads
        place = (
            len(sharded_offsets),
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        for name, part in zip(("_qkv", "_gate"), whole.data.split([rows, self.heads]), strict=True):
            state[f"{prefix}{_QKV}.{name}"] = ShardedTensor.from_rank_offsets(
                f"{whole.key}.{name}",
                part,
                *sharded_offsets,
                place,
                replica_id=whole.replica_id,
                prepend_axis_num=len(sharded_offsets),
            )
        return state


class StepLayer(TransformerLayer):  # type: ignore[misc]
    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        own: Mapping[str, Any],
        **place: Any,
    ) -> None:
        config = copy.deepcopy(config)
        for name, value in own.items():
            setattr(config, name, value)
        super().__init__(config, submodules, **place)


def with_gates(args: Mapping[str, Any], layers: list[ModuleSpec], first: int) -> list[ModuleSpec]:
    """`layers`, from number `first` on."""
    return [_gated(args, layer, number) for number, layer in enumerate(layers, first)]


def _gated(args: Mapping[str, Any], layer: ModuleSpec, number: int) -> ModuleSpec:
    own = {
        "rotary_base": args["rotary_base_per_layer"][number],
        "rotary_percent": args["rotary_percents"][number],
    }
    if args["layer_types"][number] == "sliding_attention":
        own |= args["sliding_attention_setting"]
    attention = replace(layer.submodules.self_attention, module=GatedAttention)
    submodules = replace(layer.submodules, self_attention=attention)
    return replace(layer, module=StepLayer, submodules=submodules, params={"own": own})
