"""A layer of Falcon-H1: a Mamba mixer and attention side by side, then an MLP, all of whose inputs
and outputs are multiplied by numbers of the config.

megatron-core has no such layer: what it is made of, its parameters and how they are saved are
megatron-core's, put together and named as by Megatron-Bridge:src/megatron/bridge/models/falcon_h1/
modeling_falconh1/ (falconh1_layer.py, falconh1_model.py). The multipliers are applied to what the
layers give, not inside of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor


class ParallelLayer(TransformerLayer):  # type: ignore[misc]
    """As megatron-core's hybrid stack builds and calls its layers of attention."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        mixer: ModuleSpec,
        args: Mapping[str, Any],
        pg_collection: Any,
        **place: Any,
    ) -> None:
        super().__init__(config, submodules, pg_collection=pg_collection, **place)
        self.norm = self.input_layernorm
        del self.input_layernorm
        self.mamba_mixer = build_module(
            mixer,
            config,
            d_model=config.hidden_size,
            layer_number=self.layer_number,
            rmsnorm=args["rmsnorm"],
            norm_before_gate=args["norm_before_gate"],
            d_conv=args["d_conv"],
            chunk_size=args["chunk_size"],
            pg_collection=pg_collection,
        )
        self.args = args
        self._multiply_inside()

    def _multiply_inside(self) -> None:
        mixer, attention, mlp = self.mamba_mixer, self.self_attention, self.mlp
        inner, read = mixer.d_inner_local_tp, mixer.ngroups_local_tp * mixer.d_state
        _multiply(
            mixer.in_proj,
            self.args["ssm_multipliers"],
            [inner, inner, read, read, mixer.nheads_local_tp],
        )
        groups = self.config.num_query_groups // self.config.tensor_model_parallel_size
        size = self.config.kv_channels
        queries = attention.num_attention_heads_per_partition // groups * size
        of_group = [1.0, self.args["key_multiplier"], 1.0]
        _multiply(attention.linear_qkv, of_group * groups, [queries, size, size] * groups)
        gate, down = self.args["mlp_multipliers"]
        ffn = self.config.ffn_hidden_size // self.config.tensor_model_parallel_size
        _multiply(mlp.linear_fc1, [gate, 1.0], [ffn, ffn])
        _multiply(mlp.linear_fc2, [down], [self.config.hidden_size])

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, rotary_pos_emb: Tensor, **rest: object
    ) -> tuple[Tensor, None]:
        normed = self.norm(hidden_states)
        mixed, _ = self.mamba_mixer(normed * self.args["ssm_in_multiplier"])
        attended, _ = self.self_attention(
            normed * self.args["attention_in_multiplier"],
            attention_mask,
            rotary_pos_emb=rotary_pos_emb,
        )
        mixed = mixed * self.args["ssm_out_multiplier"]
        hidden = hidden_states + mixed + attended * self.args["attention_out_multiplier"]
        made, _ = self.mlp(self.pre_mlp_layernorm(hidden))
        return hidden + made, None


def multiply_ends(model: MegatronModule, args: Mapping[str, Any]) -> None:
    """What the embedding and the output layer give."""
    if model.pre_process:
        embedding = args["embedding_multiplier"]
        model.embedding.register_forward_hook(lambda module, inputs, output: output * embedding)
    if model.post_process:
        head = args["lm_head_multiplier"]
        model.output_layer.register_forward_hook(
            lambda module, inputs, outputs: (outputs[0] * head, *outputs[1:])
        )


def _multiply(layer: torch.nn.Module, by: Sequence[float], sizes: Sequence[int]) -> None:
    """What a linear layer gives, each section by its own number."""
    factors = torch.cat([torch.full((n,), float(x)) for x, n in zip(by, sizes, strict=True)])

    def multiplied(module: torch.nn.Module, inputs: Any, outputs: tuple[Tensor, Any]) -> Any:
        return outputs[0] * factors.to(outputs[0].dtype), *outputs[1:]

    layer.register_forward_hook(multiplied)
