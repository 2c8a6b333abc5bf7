"""Attention of MiMo-V2-Flash: layers with a window have query groups, a rotary base and sinks of
their own, and value heads are smaller than key heads.

As Megatron-Bridge:src/megatron/bridge/models/mimo_v2_flash/modeling_mimo_v2_flash.py adds it to
megatron-core, but for TransformerEngine's attention, in whose place is megatron-core's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor


class _Core(DotProductAttention):  # type: ignore[misc]
    """With values as large as they are, scaled."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **rest: Any) -> Tensor:
        heads = self.num_attention_heads_per_partition
        self.hidden_size_per_partition = heads * value.shape[-1]
        if self.config.value_scale is not None:
            value = value * self.config.value_scale
        made: Tensor = super().forward(query, key, value, *args, **rest)
        return made


class OwnGroups(SelfAttention):  # type: ignore[misc]
    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        own: Mapping[str, Any],
        **rest: Any,
    ) -> None:
        config = copy.deepcopy(config)
        for name, value in own.items():
            setattr(config, name, value)
        super().__init__(config, submodules, layer_number, **rest)
        heads, groups, v_head = config.num_attention_heads, config.num_query_groups, config.v_head
        self.linear_qkv_out_dim = (heads + groups) * config.kv_channels + groups * v_head
        common: dict[str, Any] = {
            "config": config,
            "init_method": config.init_method,
            "bias": False,
            "is_expert": False,
        }
        self.linear_qkv = submodules.linear_qkv(
            config.hidden_size,
            self.linear_qkv_out_dim,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="qkv",
            **common,
        )
        self.linear_proj = submodules.linear_proj(
            heads * v_head,
            config.hidden_size,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="proj",
            **common,
        )
        self.rope = RotaryEmbedding(
            config.kv_channels,
            config.rotary_share,
            rotary_base=config.own_base,
            use_cpu_initialization=True,
        )

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, ...]:
        mixed = self.linear_qkv(hidden_states)[0]
        groups, size = self.num_query_groups_per_partition, self.config.kv_channels
        queries = self.num_attention_heads_per_partition // groups * size
        parts = mixed.view(*mixed.shape[:-1], groups, -1).split(
            [queries, size, self.config.v_head], dim=-1
        )
        query, key, value = parts
        return query.reshape(*mixed.shape[:-1], -1, size), key, value

    def forward(self, hidden_states: Tensor, *args: Any, **rest: Any) -> Any:
        rest["rotary_pos_emb"] = self.rope(hidden_states.shape[0])
        return super().forward(hidden_states, *args, **rest)


def with_own_groups(args: Mapping[str, Any], layer: ModuleSpec, slides: bool) -> ModuleSpec:
    """`layer`, with or without a window."""
    local, base = args["own_bases"]
    own = {
        "num_query_groups": args[
            "swa_num_query_groups" if slides else "full_attn_num_query_groups"
        ],
        "window_size": (args["own_window"] - 1, 0) if slides else None,
        "softmax_type": "learnable" if slides else "vanilla",
        "own_base": local if slides else base,
        "rotary_share": args["rotary_percent"],
        "v_head": args["v_head_dim"],
        "value_scale": args["attention_value_scale"],
    }
    attention = layer.submodules.self_attention
    inside = replace(attention.submodules, core_attention=_Core)
    attention = replace(
        attention, module=OwnGroups, submodules=inside, params={**attention.params, "own": own}
    )
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))
