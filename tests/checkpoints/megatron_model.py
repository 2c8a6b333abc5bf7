"""The real megatron-core model of a fixture, from the arguments that its checkpoint will hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.activations import fast_gelu, squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer import MegatronModule, MLATransformerConfig, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.functional import silu

from .families import FAMILIES
from .hf import TORCH_DTYPES
from .mimo_v2 import with_own_groups
from .saved_args import model_args
from .spec import Spec
from .stand_ins import (
    LatentCore,
    centre_norms_at_zero,
    norm_outputs,
    scale_embedding,
    take_in_turns,
)
from .te_linear import TELinear
from .vision import Seeing


class NormOfAllQueries(torch.nn.RMSNorm):
    """In place of a norm of each head, as megatron-core builds and calls it; each tensor-parallel
    rank has its share of the weights. Megatron-Bridge's modules compute the same:
    src/megatron/bridge/models/minimax_m2/minimax_m2_provider.py _FullDimRMSNorm, and, without
    tensor parallelism, olmoe/olmoe_provider.py OLMoESelfAttention."""

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float) -> None:
        self.whole = hidden_size * self.heads(config)
        super().__init__(self.whole // config.tensor_model_parallel_size, eps=eps)

    @staticmethod
    def heads(config: TransformerConfig) -> int:
        return int(config.num_attention_heads)

    def forward(self, heads: Tensor) -> Tensor:
        rows = heads.flatten(-2)
        squares = rows.float().square().sum(-1, keepdim=True)
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_reduce(squares, group=group)
        normed = rows.float() * torch.rsqrt(squares / self.whole + (self.eps or 0.0))
        return (normed.to(rows.dtype) * self.weight).view_as(heads)

    def sharded_state_dict(self, prefix: str, sharded_offsets: Any, metadata: Any) -> Any:
        state = self.state_dict(keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class NormOfAllKeys(NormOfAllQueries):
    """Likewise."""

    @staticmethod
    def heads(config: TransformerConfig) -> int:
        return int(config.num_query_groups)


def build_models(spec: Spec) -> list[GPTModel]:
    """This rank's model, or one per virtual pipeline stage."""
    args = {**model_args(spec), **FAMILIES[spec.family].built(spec)}
    config = _config(spec, args)
    if spec.pattern is not None:
        from .mamba import build_hybrid  # which megatron-core 0.15 has not

        hybrid = build_hybrid(spec, args, config)
        _add_stand_ins(spec, args, hybrid)
        _set_dtypes(spec, hybrid)
        return [hybrid]
    stages = [None] if spec.vpp is None else list(range(spec.vpp))
    return [_build_stage(spec, args, config, stage) for stage in stages]


def _config(spec: Spec, args: dict[str, Any]) -> TransformerConfig:
    """As `core_transformer_config_from_args` of Megatron-LM's training/arguments.py, but for what
    needs a GPU."""
    kind = MLATransformerConfig if args["multi_latent_attention"] else TransformerConfig
    known = {field.name for field in dataclasses.fields(kind)} - {"rope_type"}  # None: its default
    named = {name: value for name, value in args.items() if name in known}
    dtype = TORCH_DTYPES[spec.dtype]
    named |= {
        "num_moe_experts": args["num_experts"],
        "num_query_groups": args["num_query_groups"] if args["group_query_attention"] else None,
        "num_layers_in_first_pipeline_stage": args["decoder_first_pipeline_num_layers"],
        "num_layers_in_last_pipeline_stage": args["decoder_last_pipeline_num_layers"],
        "layernorm_epsilon": spec.norm_eps,  # by any of its names
        "bias_activation_fusion": args["bias_gelu_fusion"],
        "bf16": spec.dtype == "bf16",
        "fp16": spec.dtype == "fp16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
    }
    if args["swiglu"]:
        named |= {"activation_func": silu, "gated_linear_unit": True}
        named["bias_activation_fusion"] = args["bias_swiglu_fusion"]
    elif args["quick_geglu"]:
        named |= {"activation_func": quick_gelu, "gated_linear_unit": True}
    elif args.get("activation_func") == "fast_gelu":
        named["activation_func"] = fast_gelu
    elif args["squared_relu"]:
        named["activation_func"] = squared_relu
    without_gpu = {
        # The local attention refuses more, and no weight depends on it. The process groups do know
        # of it, which is what the save looks at.
        "context_parallel_size": 1,
        "sequence_parallel": False,
        "moe_grouped_gemm": False,
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "none",
        "bias_dropout_fusion": False,
        "layernorm_zero_centered_gamma": False,  # torch's norms refuse it: see stand_ins
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": True,
        "perform_initialization": spec.format == "fsdp_dtensor",  # it notes how parameters are cut
    }
    built = kind(**{**named, **without_gpu})
    for name, more in FAMILIES[spec.family].mtp_lists(spec).items():
        setattr(built, name, [*getattr(built, name), *more])
    if args["position_embedding_type"] == "yarn":
        _set_yarn(built, args)
    return built


def _set_yarn(config: TransformerConfig, args: dict[str, Any]) -> None:
    """As `_apply_yarn_config_from_args` of Megatron-LM's training/argument_utils.py."""
    renamed = {"rotary_scaling_factor", "mscale", "mscale_all_dim"}
    for name, value in args.items():
        if name in renamed or name.startswith("yarn_"):
            setattr(config, name if name.startswith("yarn_") else f"yarn_{name}", value)


def _block_spec(
    spec: Spec, args: dict[str, Any], config: TransformerConfig, stage: int | None
) -> TransformerBlockSubmodules:
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=stage
    )
    first = get_transformer_layer_offset(config, vp_stage=stage)
    for layer_number, layer in enumerate(block.layer_specs, first):
        attention = layer.submodules.self_attention.submodules
        if not spec.local_norm_keys:
            _name_norms(layer.submodules.sharded_state_dict_keys_map, spec, layer_number)
        if spec.kv_lora and not spec.index_topk:
            attention.core_attention = LatentCore
        if FAMILIES[spec.family].norms_whole_projections:
            attention.q_layernorm, attention.k_layernorm = NormOfAllQueries, NormOfAllKeys
        if FAMILIES[spec.family].norms_only_outputs:
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    if getattr(config, "experimental_attention_variant", None) == "gated_delta_net":
        from .delta_net import with_delta_nets  # which megatron-core 0.15 has not

        block.layer_specs = with_delta_nets(config, block.layer_specs, first)
    if args.get("head_wise_attn_gate"):
        from .step import with_gates  # likewise

        block.layer_specs = with_gates(args, block.layer_specs, first)
    if spec.family == "mimo_v2_flash":
        own = zip(block.layer_specs, args["hybrid_attention_pattern"][first:], strict=False)
        block.layer_specs = [with_own_groups(args, layer, bool(slides)) for layer, slides in own]
    if spec.index_topk:
        from .sparse import with_indexers  # likewise

        block.layer_specs = with_indexers(spec, args, block.layer_specs, first)
    return block


def _build_stage(
    spec: Spec, args: dict[str, Any], config: TransformerConfig, stage: int | None
) -> GPTModel:
    block = _block_spec(spec, args, config, stage)
    inside = block
    if FAMILIES[spec.family].mtp_is_dense:
        norm = config.normalization
        inside = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=norm)
    if spec.family == "mimo_v2_flash":
        inside = with_own_groups(args, inside, True)
    model = GPTModel(
        config=config,
        transformer_layer_spec=block,
        mtp_block_spec=get_gpt_mtp_block_spec(config, inside, False, vp_stage=stage),
        vocab_size=spec.padded_vocab_size,
        max_sequence_length=spec.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=spec.tied,
        position_embedding_type=args["position_embedding_type"],
        rotary_base=args["rotary_base"],
        rotary_percent=args["rotary_percent"],
        rope_scaling=args["use_rope_scaling"],
        rope_scaling_factor=args["rope_scaling_factor"],
        vp_stage=stage,
    )
    if model.post_process and spec.labels:  # as mcore_bridge/model/gpt_model.py does
        model.output_layer = TELinear(spec.hidden, spec.labels, config, is_expert=False)
    if model.post_process and spec.bare:
        model.output_layer = None
    _add_stand_ins(spec, args, model)
    if spec.vision:
        model = Seeing(spec, model)
    _set_dtypes(spec, model)
    return model


def _set_dtypes(spec: Spec, model: MegatronModule) -> None:
    model.to(TORCH_DTYPES[spec.dtype])
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module._maintain_float32_expert_bias()
    if spec.fp32_router:
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.router.weight"):
                parameter.data = parameter.data.float()


def _name_norms(keys: dict[str, str], spec: Spec, layer: int) -> None:
    """Make `keys` rename the norms of a layer to what they are called in TransformerEngine's
    specs (megatron/core/models/gpt/gpt_layer_specs.py), which fuse them with the linear layer
    behind: of latents, too, but none that a router or a down projection is in the way of."""
    if spec.kv_lora:
        for latent in () if spec.index_topk else ("q", "kv"):
            at = f"self_attention.{latent}_layernorm."
            keys[at] = f"self_attention.linear_{latent}_up_proj.layer_norm_"
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    if spec.has_experts(layer):
        keys.pop("pre_mlp_layernorm.", None)


def _add_stand_ins(spec: Spec, args: dict[str, Any], model: GPTModel) -> None:
    """What TransformerEngine's modules, and others than megatron-core's, do beyond its own."""
    if spec.output_norms:
        norm_outputs(model, *spec.output_norms)
    if args["apply_layernorm_1p"] or args.get("layernorm_zero_centered_gamma"):
        centre_norms_at_zero(model)
    if spec.glu_block is not None:
        take_in_turns(model, spec.glu_block)
    if args.get("scale_embedding") and model.pre_process:
        scale_embedding(model)
