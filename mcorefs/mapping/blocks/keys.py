"""config.json, and the arguments that a decoder takes for granted."""

from __future__ import annotations

from collections.abc import Mapping

from mcorefs.errors import MappingError
from mcorefs.mapping.family import Facts, Key, Proven, Soft


def dim(name: str, *aliases: str) -> Key:
    """A size that tensor shapes prove."""
    return Key(lambda facts: facts.dims.get(name), aliases=aliases)


def arg(*names: str) -> Key:
    """A training argument that decides what the model computes: a reference must agree."""
    return Key(lambda facts: facts.arg(*names))


def holds(kind: str) -> Key:
    """Whether the model has canonical tensors of that kind (* for numbers)."""
    return Key(lambda facts: kind in facts.kinds)


def soft_arg(*names: str, default: object) -> Key:
    """A training argument that describes the run, not the model: a reference overrules it."""

    def value(facts: Facts) -> Soft | None:
        found = facts.arg(*names)
        return None if found is None else Soft(found)

    return Key(value, default)


def constant(value: object) -> Key:
    """A value that is the same for every Megatron model of the family."""
    return Key(lambda facts: Soft(value))


_NOT_SCALING = ("type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""What a Hugging Face config may have beside the scaling, or by another name."""


def stated_scaling(facts: Facts) -> Soft | None:
    """What ms-swift keeps of the Hugging Face config as an argument: rope_scaling, as it is there
    (mcore-bridge:src/mcore_bridge/config/model_config.py)."""
    stated = facts.arg("rope_scaling")
    if not isinstance(stated, Mapping):
        return None
    kept = {str(name): value for name, value in stated.items() if name not in _NOT_SCALING}
    kept.setdefault("rope_type", stated.get("type", "default"))
    return None if kept["rope_type"] in ("default", "mrope") else Soft(kept)


def _rope_scaling(facts: Facts) -> object:
    """None in effect where the arguments say so: a reference may still extend the context.

    Megatron-LM:megatron/core/models/common/embeddings/rotary_pos_embedding.py.

    The factor 8.0 is among the args even when scaling is off; low, high and the original length
    are constants there, and arguments only in NeMo and early Megatron-Bridge.
    """
    if (stated := stated_scaling(facts)) is not None:
        return stated
    if facts.arg("use_rope_scaling"):
        return {
            "rope_type": "llama3",
            "factor": facts.arg("rope_scaling_factor") or 8.0,
            "low_freq_factor": facts.arg("low_freq_factor") or 1.0,
            "high_freq_factor": facts.arg("high_freq_factor") or 4.0,
            "original_max_position_embeddings": facts.arg("old_context_len") or 8192,
        }
    factor = facts.arg("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor")
    if isinstance(factor, int | float) and factor != 1:
        return {"rope_type": "linear", "factor": float(factor)}
    return Soft(None)


def _tied(facts: Facts) -> object:
    """A stored output layer is served, whatever a reference says: Megatron stores none where it
    shares the embedding, but a fine-tuning may have given the model its own."""
    return True if facts.tied else Proven(False)


def _activation(facts: Facts) -> object | None:
    return "silu" if facts.arg("swiglu") else None


def _ffn(facts: Facts) -> object | None:
    """A model of MoE layers only has no dense ffn: the argument is then no more than a number."""
    if "ffn" in facts.dims:
        return facts.dims["ffn"]
    found = facts.arg("ffn_hidden_size")
    return None if found is None else Soft(found)


MODEL_KEYS: Mapping[str, Key] = {
    "vocab_size": Key(lambda facts: Proven(facts.dims["vocab"])),
    "tie_word_embeddings": Key(_tied),
    "initializer_range": soft_arg("init_method_std", default=0.02),
    "use_cache": constant(True),
}
"""What every family calls the same."""
EPSILON = arg("layernorm_epsilon", "norm_epsilon")
BASE_KEYS: Mapping[str, Key] = {
    **MODEL_KEYS,
    "hidden_size": dim("hidden"),
    "intermediate_size": Key(_ffn),
    "num_hidden_layers": dim("layers"),
    "hidden_act": Key(_activation, "silu"),
    "rms_norm_eps": EPSILON,
    "rope_theta": arg("rotary_base"),
    "rope_scaling": Key(_rope_scaling, None),
    "max_position_embeddings": soft_arg("max_position_embeddings", "seq_length", default=32768),
    "attention_dropout": soft_arg("attention_dropout", default=0.0),
}
"""What most decoders call the same."""
PARTIAL_ROTARY = arg("rotary_percent")
"""partial_rotary_factor: how much of each head is rotated."""
GQA_KEYS: Mapping[str, Key] = {
    "num_attention_heads": dim("heads"),
    "num_key_value_heads": dim("groups"),
    "head_dim": dim("head_dim"),
}
FULL_ATTENTION_KEYS: Mapping[str, Key] = {
    "use_sliding_window": Key(lambda facts: False if facts.args else None, False),
    "sliding_window": Key(lambda facts: None, None),
}


def window(facts: Facts) -> Soft | None:
    """Megatron counts the tokens before the one that attends, transformers that one too
    (Megatron-LM:megatron/core/transformer/utils.py get_sliding_window_causal_mask). Soft: some
    tools write transformers' number into Megatron's argument, and a run on short sequences may
    leave the window out."""
    found = facts.arg("window_size")
    if isinstance(found, list | tuple) and found and type(found[0]) is int and found[0] >= 0:
        return Soft(found[0] + 1)
    return None


def attention_kinds(facts: Facts) -> list[str]:
    """Of each layer: whether it has a window (Megatron-LM:megatron/core/transformer/utils.py
    is_layer_window_attention)."""
    layers = facts.dims["layers"]
    skipped = facts.arg("window_attn_skip_freq")
    if not facts.arg("window_size"):
        slides = [False] * layers
    elif isinstance(skipped, list | tuple):
        slides = [bool(one) for one in skipped[:layers]]
    elif skipped == 0:
        raise MappingError("it has no layer without a window:", ["window_attn_skip_freq is 0"])
    elif isinstance(skipped, int):
        slides = [layer % skipped != 0 for layer in range(1, layers + 1)]
    else:
        slides = [True] * layers
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


SLIDING_WINDOW = Key(lambda facts: window(facts) or (Soft(None) if facts.args else None), None)
"""The window of a model whose layers all have the same."""

DECODER_REQUIRES: Mapping[str, tuple[object, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1, 1.0),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "multi_latent_attention": (False,),
    "attention_output_gate": (False,),
    "head_wise_attn_gate": (False,),
    "sliding_attention_setting": (),
    "rotary_base_per_layer": (),
    "qk_l2_norm": (False,),
    "softmax_type": ("vanilla",),
    "softmax_scale": (),
    "use_mup": (False,),
    "moe_shared_expert_glu_interleave_size": (),
    "use_grouped_gemm_for_shared_expert": (False,),
    "use_grouped_gemm_for_dense_mlp": (False,),
    "window_size": (),
    "no_rope_freq": (),
    "activation_func_clamp_value": (),
    "glu_linear_offset": (0, 0.0),
}
"""What a decoder of RMSNorm, SwiGLU and half-split RoPE takes for granted. By the last of its MLP,
that gate rows lie above up rows: grouped kernels for shared experts and dense MLPs take them in
turns, or put them so themselves, by the version of TransformerEngine (Megatron-LM:megatron/core/
transformer/moe/shared_experts.py, extensions/transformer_engine.py TEFusedMLPWithGroupedLinear)."""


TANH_GELU = Key(lambda facts: Proven("gelu_pytorch_tanh"))
GEGLU_REQUIRES: Mapping[str, tuple[object, ...]] = {
    "swiglu": (False,),
    "quick_geglu": (False,),
    "gated_linear_unit": (True,),
    "activation_func": ("fast_gelu", "openai_gelu"),
}
"""A gate of GELU in its tanh form: only TransformerConfig can ask for it, by the function's name
(Megatron-LM:megatron/core/activations.py fast_gelu; NeMo:nemo/collections/llm/fn/activation.py)."""

NORMS_AT_ZERO: Mapping[str, tuple[object, ...]] = {
    "layernorm_zero_centered_gamma": (True,),
    "apply_layernorm_1p": (True,),
}
"""That norms have 1 added to their weights, as they have in transformers' model."""


def decoder_requires(*but: str) -> Mapping[str, tuple[object, ...]]:
    """DECODER_REQUIRES, but for the arguments that the family has a place for."""
    return {name: allowed for name, allowed in DECODER_REQUIRES.items() if name not in but}
