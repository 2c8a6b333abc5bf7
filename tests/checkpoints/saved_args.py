"""The `args` Namespace that Megatron-LM saves with a checkpoint: plain values, and some that are
not (dtypes, enums, paths), which a reader must survive without importing their classes."""

from __future__ import annotations

from argparse import Namespace
from pathlib import PurePath
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.transformer.enums import AttnBackend

from .families import FAMILIES
from .hf import TORCH_DTYPES
from .spec import Spec


def saved_args(spec: Spec, tokenizer: str, root: PurePath, rank: int) -> Namespace:
    """`root`: where the run believes it saves. `rank` differs between ranks, as it really does."""
    return Namespace(**{**model_args(spec), **_run(spec, tokenizer, root, rank)})


def model_args(spec: Spec) -> dict[str, Any]:
    """Those that say which model it is and how it is cut."""
    family = FAMILIES[spec.family].arguments(spec)
    return {**_architecture(spec), **_latent(spec), **_experts(spec), **_parallel(spec), **family}


def _architecture(spec: Spec) -> dict[str, Any]:
    return {
        "num_layers": spec.layers,
        "hidden_size": spec.hidden,
        "ffn_hidden_size": spec.ffn,
        "num_attention_heads": spec.heads,
        "group_query_attention": spec.kv_heads != spec.heads,
        "num_query_groups": spec.kv_heads,
        "kv_channels": spec.head_dim,
        "max_position_embeddings": spec.max_positions,
        "seq_length": spec.max_positions // 2,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "rotary_base": spec.rope_theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": spec.rotary_interleaved,
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": spec.llama3_rope_factor is not None,
        "rope_scaling_factor": spec.llama3_rope_factor or 8.0,
        "normalization": "RMSNorm",
        "apply_layernorm_1p": spec.zero_centred,
        "qk_layernorm": False,
        **dict.fromkeys(spec.epsilon_names, spec.norm_eps),
        "swiglu": True,
        "bias_swiglu_fusion": True,
        "squared_relu": False,
        "quick_geglu": False,
        "openai_gelu": False,
        "bias_gelu_fusion": spec.linear_bias,
        "add_bias_linear": spec.linear_bias,
        "add_qkv_bias": spec.linear_bias,
        "untie_embeddings_and_output_weights": not spec.tied,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "apply_query_key_layer_scaling": False,
        "init_method_std": 0.02,
        "window_size": None if spec.window is None else (spec.window - 1, 0),
        "window_attn_skip_freq": None,
        "mtp_num_layers": spec.mtp or None,
        "spec": None,
        "hybrid_override_pattern": spec.pattern,
        "is_hybrid_model": spec.pattern is not None,
    }


def _latent(spec: Spec) -> dict[str, Any]:
    """Every run has these, whatever its attention: megatron/training/arguments.py _add_mla_args."""
    factor, mscale, all_dim = spec.yarn or (1.0, 1.0, 0.0)
    sizes = (32, 128, 64, 128)
    if spec.kv_lora:
        sizes = (spec.kv_lora, spec.qk_nope, spec.qk_rope, spec.v_head)
    names = ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    return {
        "multi_latent_attention": spec.kv_lora > 0,
        "q_lora_rank": spec.q_lora,
        **dict(zip(names, sizes, strict=True)),
        "rotary_scaling_factor": factor,
        "mscale": mscale,
        "mscale_all_dim": all_dim,
        "rope_type": None,
        "cache_mla_latents": False,
    }


def _experts(spec: Spec) -> dict[str, Any]:
    freq = spec.moe_layer_freq
    groups, group_topk = spec.expert_groups or (None, None)
    return {
        "num_experts": spec.experts if spec.is_moe else None,
        "moe_layer_freq": 1 if freq is None else list(freq),
        "moe_ffn_hidden_size": spec.moe_ffn if spec.is_moe else None,
        "moe_shared_expert_intermediate_size": spec.shared_ffn or None,
        "moe_shared_expert_gate": False,
        "moe_router_topk": spec.topk,
        "moe_router_pre_softmax": not spec.norm_topk_prob,
        "moe_router_num_groups": groups,
        "moe_router_group_topk": group_topk,
        "moe_router_score_function": "sigmoid" if spec.expert_bias else "softmax",
        "moe_router_enable_expert_bias": spec.expert_bias,
        "moe_router_topk_scaling_factor": None if spec.routed_scaling == 1 else spec.routed_scaling,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_router_dtype": "fp32" if spec.fp32_router else None,
        "moe_aux_loss_coeff": 0.001 if spec.is_moe else 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": spec.is_moe,
        "moe_latent_size": spec.moe_latent,
        "moe_mlp_glu_interleave_size": spec.glu_block,
    }


def _parallel(spec: Spec) -> dict[str, Any]:
    return {
        "world_size": spec.world,
        "tensor_model_parallel_size": spec.tp,
        "pipeline_model_parallel_size": spec.pp,
        "virtual_pipeline_model_parallel_size": spec.vpp,
        "num_layers_per_virtual_pipeline_stage": None,
        "decoder_first_pipeline_num_layers": spec.first_stage_layers,
        "decoder_last_pipeline_num_layers": spec.last_stage_layers,
        "pipeline_model_parallel_layout": None,
        "context_parallel_size": spec.cp,
        "expert_model_parallel_size": spec.ep,
        "expert_tensor_parallel_size": spec.expert_tp,
        "data_parallel_size": spec.dp,
        "sequence_parallel": spec.tp > 1,
    }


def _run(spec: Spec, tokenizer: str, root: PurePath, rank: int) -> dict[str, Any]:
    return {
        "vocab_size": spec.vocab_size if spec.vocab_size_in_args else None,
        "padded_vocab_size": spec.padded_vocab_size,
        "make_vocab_size_divisible_by": spec.vocab_divisible_by,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": tokenizer,
        "vocab_file": None,
        "merge_file": None,
        "bf16": spec.dtype == "bf16",
        "fp16": spec.dtype == "fp16",
        "params_dtype": TORCH_DTYPES[spec.dtype],
        "fp8": None,
        "iteration": 0 if spec.iteration == "release" else spec.iteration,
        "train_iters": 500_000,
        "consumed_train_samples": 12_800,
        "micro_batch_size": 1,
        "global_batch_size": 128,
        "rank": rank,
        "local_rank": rank,
        "ckpt_format": spec.format,
        "ckpt_fully_parallel_save": spec.fully_parallel_save,
        "use_distributed_optimizer": spec.flat_buffers,
        "no_save_optim": None if spec.optimizer_entries else True,
        "save": str(root),
        "dataloader_save": root / "dataloader",
        "attention_backend": AttnBackend.auto,
        "model_type": ModelType.encoder_or_decoder,
    }
