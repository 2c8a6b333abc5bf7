"""How a model was built, as Megatron-Bridge and NeMo write it down: stand-ins for their YAML files.

The fields are those of the real TransformerConfig, and the representers do as those of
Megatron-LM:megatron/training/config/yaml_utils.py, which both use or copied.
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

import torch
import yaml
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from tests.checkpoints import Spec


def provider(spec: Spec) -> dict[str, Any]:
    """The `model` section."""
    moe: dict[str, Any] = {}
    if spec.is_moe:
        moe = {
            "num_moe_experts": spec.experts,
            "moe_router_topk": spec.topk,
            "moe_ffn_hidden_size": spec.moe_ffn,
            "moe_aux_loss_coeff": 0.001,
            "moe_router_pre_softmax": not spec.norm_topk_prob,
            "moe_shared_expert_intermediate_size": spec.shared_ffn or None,
            "moe_layer_freq": 1 if spec.moe_layer_freq is None else list(spec.moe_layer_freq),
            "moe_router_score_function": "sigmoid" if spec.expert_bias else "softmax",
            "moe_router_enable_expert_bias": spec.expert_bias,
            "moe_router_topk_scaling_factor": spec.routed_scaling,
        }
    latent: dict[str, Any] = {}
    if spec.kv_lora:
        latent = {
            "multi_latent_attention": True,
            "q_lora_rank": spec.q_lora,
            "kv_lora_rank": spec.kv_lora,
            "qk_head_dim": spec.qk_nope,
            "qk_pos_emb_head_dim": spec.qk_rope,
            "v_head_dim": spec.v_head,
            "rotary_scaling_factor": 1.0,
        }
    kind = MLATransformerConfig if latent else TransformerConfig
    config = kind(
        num_layers=spec.layers,
        hidden_size=spec.hidden,
        ffn_hidden_size=spec.ffn,
        num_attention_heads=spec.heads,
        num_query_groups=spec.kv_heads,
        kv_channels=spec.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        qk_layernorm=spec.family.startswith("qwen3"),
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        tensor_model_parallel_size=spec.tp,
        pipeline_model_parallel_size=spec.pp,
        pipeline_dtype=torch.bfloat16,
        expert_model_parallel_size=spec.ep,
        expert_tensor_parallel_size=spec.expert_tp,
        params_dtype=torch.bfloat16,
        bf16=True,
        **moe,
        **latent,
    )
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        **fields,
        "rotary_base": spec.rope_theta,
        "rotary_percent": 1.0,
        "position_embedding_type": "rope",
        "seq_length": spec.max_positions,
        "share_embeddings_and_output_weights": spec.tied,
        "vocab_size": spec.vocab_size,
        "make_vocab_size_divisible_by": spec.vocab_divisible_by,
        "generation_config": None,
        "layernorm_zero_centered_gamma": spec.family.startswith("qwen3_5"),
        "hf_model_id": "Qwen/Qwen3-0.6B",
    }


class Dumper(yaml.SafeDumper):
    """With the representers of Megatron-LM."""


def _object(dumper: yaml.SafeDumper, value: object) -> yaml.Node:
    if isinstance(value, Enum):
        named: dict[str, object] = {"_call_": True, "_args_": [value.value], "_name_": value.name}
        named["_target_"] = type(value).__qualname__
        return dumper.represent_data(named)
    name = str(value) if isinstance(value, torch.dtype) else getattr(value, "__qualname__", None)
    kind = type(value).__qualname__
    return dumper.represent_data({"_target_": name or kind, "_call_": name is None})


Dumper.add_multi_representer(object, _object)
