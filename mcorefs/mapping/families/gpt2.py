"""GPT-2: what Megatron-LM trains unless told otherwise. LayerNorm, learned positions, GELU, biases
in every linear layer, as many key heads as query heads."""

from __future__ import annotations

from dataclasses import replace

from mcorefs.mapping.blocks.attention import fused_qkv
from mcorefs.mapping.blocks.keys import (
    EPSILON,
    MODEL_KEYS,
    constant,
    decoder_requires,
    dim,
    soft_arg,
)
from mcorefs.mapping.blocks.model import EMBED, HEAD, layer_norm, transposed
from mcorefs.mapping.blocks.names import INPUT_NORM, MLAYER, MLP_NORM
from mcorefs.mapping.family import Facts, Family, Key, Rule
from mcorefs.views import View

_LAYER = "transformer.h.{layer}."
_QKV, _PROJ = MLAYER + "self_attention.linear_qkv.", MLAYER + "self_attention.linear_proj."
_FC1, _FC2 = MLAYER + "mlp.linear_fc1.", MLAYER + "mlp.linear_fc2."


def _c_attn(view: View, facts: Facts) -> View:
    heads, groups = facts.dims["heads"], facts.dims["groups"]
    if heads != groups:
        raise ValueError(f"GPT-2 has as many key as query heads, not {groups} and {heads}")
    return fused_qkv(view, facts)


def _gelu(facts: Facts) -> str | None:
    """The kernel that also adds the bias is the tanh approximation, the function without it is
    exact (Megatron-LM:megatron/core/fusions/fused_bias_gelu.py, transformer/mlp.py)."""
    fused = facts.arg("bias_gelu_fusion", "bias_activation_fusion")
    return None if fused is None else "gelu_new" if fused else "gelu"


GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    rules=(
        replace(EMBED, hf="transformer.wte.weight"),
        Rule(
            "transformer.wpe.weight",
            "embedding.position_embeddings.weight",
            ("positions", "hidden"),
        ),
        *layer_norm(_LAYER + "ln_1.", *INPUT_NORM),
        Rule(
            _LAYER + "attn.c_attn.weight",
            _QKV + "weight",
            ("hidden", "qkv_rows"),
            transposed(_c_attn),
        ),
        Rule(_LAYER + "attn.c_attn.bias", _QKV + "bias", ("qkv_rows",), _c_attn),
        Rule(_LAYER + "attn.c_proj.weight", _PROJ + "weight", ("hidden", "hidden"), transposed()),
        Rule(_LAYER + "attn.c_proj.bias", _PROJ + "bias", ("hidden",)),
        *layer_norm(_LAYER + "ln_2.", *MLP_NORM),
        Rule(_LAYER + "mlp.c_fc.weight", _FC1 + "weight", ("hidden", "ffn"), transposed()),
        Rule(_LAYER + "mlp.c_fc.bias", _FC1 + "bias", ("ffn",)),
        Rule(_LAYER + "mlp.c_proj.weight", _FC2 + "weight", ("ffn", "hidden"), transposed()),
        Rule(_LAYER + "mlp.c_proj.bias", _FC2 + "bias", ("hidden",)),
        *layer_norm("transformer.ln_f.", "decoder.final_layernorm."),
        HEAD,
    ),
    config={
        **MODEL_KEYS,
        "n_embd": dim("hidden", "hidden_size"),
        "n_layer": dim("layers", "num_hidden_layers"),
        "n_head": dim("heads", "num_attention_heads"),
        "n_inner": dim("ffn"),
        "n_positions": dim("positions", "max_position_embeddings"),
        "activation_function": Key(_gelu, "gelu_new"),
        "layer_norm_epsilon": EPSILON,
        "embd_pdrop": soft_arg("hidden_dropout", default=0.1),
        "resid_pdrop": soft_arg("hidden_dropout", default=0.1),
        "attn_pdrop": soft_arg("attention_dropout", default=0.1),
        "scale_attn_weights": constant(True),
        "scale_attn_by_inverse_layer_idx": constant(False),
    },
    requires={
        **decoder_requires("add_qkv_bias", "rotary_percent"),
        "normalization": ("LayerNorm",),
        "swiglu": (False,),
        "squared_relu": (False,),
        "quick_geglu": (False,),
        "position_embedding_type": ("learned_absolute",),
        "add_bias_linear": (True,),
    },
)
