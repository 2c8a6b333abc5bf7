"""The vocabulary that families are written in: blocks, rules and config keys that many share.

Formulas: Megatron-LM:megatron/core/transformer/attention.py (query groups), mlp.py (gate and up),
moe/router.py; checked against
Megatron-Bridge:src/megatron/bridge/models/conversion/param_mapping.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from mcorefs.mapping.family import Facts, Key, Proven, Rule, Soft
from mcorefs.views import Flatten, Narrow, Unflatten, View

# -- tensors -------------------------------------------------------------------------------------


def _grouped(view: View, dims: Mapping[str, int], first: int, count: int) -> View:
    """Heads [first, first + count) of every query group of linear_qkv.

    Its rows are, per group, `heads / groups` query heads, one key head, one value head.
    """
    per_group = dims["heads"] // dims["groups"]
    rows = Unflatten(view, 0, (dims["groups"], (per_group + 2) * dims["head_dim"]))
    part = Narrow(rows, 1, first * dims["head_dim"], count * dims["head_dim"])
    return Flatten(part, 0, 2)


def query(view: View, dims: Mapping[str, int]) -> View:
    """q_proj from linear_qkv."""
    return _grouped(view, dims, 0, dims["heads"] // dims["groups"])


def key(view: View, dims: Mapping[str, int]) -> View:
    """k_proj from linear_qkv."""
    return _grouped(view, dims, dims["heads"] // dims["groups"], 1)


def value(view: View, dims: Mapping[str, int]) -> View:
    """v_proj from linear_qkv."""
    return _grouped(view, dims, dims["heads"] // dims["groups"] + 1, 1)


def gate(view: View, dims: Mapping[str, int]) -> View:
    """gate_proj: the first half of the rows of a gated linear_fc1."""
    return Narrow(view, 0, 0, view.shape[0] // 2)


def up(view: View, dims: Mapping[str, int]) -> View:
    """up_proj: the second half of the rows of a gated linear_fc1."""
    return Narrow(view, 0, view.shape[0] // 2, view.shape[0] // 2)


def unpad(view: View, dims: Mapping[str, int]) -> View:
    """Vocabulary rows without the padding that makes them divisible by TP."""
    return Narrow(view, 0, 0, dims["vocab"])


LAYER, MLAYER = "model.layers.{layer}.", "decoder.layers.{layer}."

EMBED = Rule(
    "model.embed_tokens.weight", "embedding.word_embeddings.weight", ("vocab", "hidden"), unpad
)
NORM = Rule("model.norm.weight", "decoder.final_layernorm.weight", ("hidden",))
HEAD = Rule("lm_head.weight", "output_layer.weight", ("vocab", "hidden"), unpad, optional=True)

_QKV = MLAYER + "self_attention.linear_qkv.weight"
GQA = (
    Rule(LAYER + "self_attn.q_proj.weight", _QKV, ("q_rows", "hidden"), query),
    Rule(LAYER + "self_attn.k_proj.weight", _QKV, ("kv_rows", "hidden"), key),
    Rule(LAYER + "self_attn.v_proj.weight", _QKV, ("kv_rows", "hidden"), value),
    Rule(
        LAYER + "self_attn.o_proj.weight",
        MLAYER + "self_attention.linear_proj.weight",
        ("hidden", "q_rows"),
    ),
)
_QKV_BIAS = MLAYER + "self_attention.linear_qkv.bias"
GQA_BIASED = (
    GQA[0],
    Rule(LAYER + "self_attn.q_proj.bias", _QKV_BIAS, ("q_rows",), query),
    GQA[1],
    Rule(LAYER + "self_attn.k_proj.bias", _QKV_BIAS, ("kv_rows",), key),
    GQA[2],
    Rule(LAYER + "self_attn.v_proj.bias", _QKV_BIAS, ("kv_rows",), value),
    GQA[3],
)
QK_NORM = (
    Rule(
        LAYER + "self_attn.q_norm.weight",
        MLAYER + "self_attention.q_layernorm.weight",
        ("head_dim",),
    ),
    Rule(
        LAYER + "self_attn.k_norm.weight",
        MLAYER + "self_attention.k_layernorm.weight",
        ("head_dim",),
    ),
)
LAYER_NORMS = (
    Rule(
        LAYER + "input_layernorm.weight",
        (
            MLAYER + "self_attention.linear_qkv.layer_norm_weight",
            MLAYER + "input_layernorm.weight",
        ),
        ("hidden",),
    ),
    Rule(
        LAYER + "post_attention_layernorm.weight",
        (MLAYER + "mlp.linear_fc1.layer_norm_weight", MLAYER + "pre_mlp_layernorm.weight"),
        ("hidden",),
    ),
)
_FC1, _FC2 = MLAYER + "mlp.linear_fc1.weight", MLAYER + "mlp.linear_fc2.weight"
GATED_MLP = (
    Rule(LAYER + "mlp.gate_proj.weight", _FC1, ("ffn", "hidden"), gate, layers="dense"),
    Rule(LAYER + "mlp.up_proj.weight", _FC1, ("ffn", "hidden"), up, layers="dense"),
    Rule(LAYER + "mlp.down_proj.weight", _FC2, ("hidden", "ffn"), layers="dense"),
)


def router(hf: str) -> Rule:
    """The router's weight, one row per expert, under the name `hf` in its layer."""
    source = MLAYER + "mlp.router.weight"
    return Rule(LAYER + hf, source, ("experts", "hidden"), layers="moe", keeps_dtype=True)


def gated_experts(hf: str) -> tuple[Rule, ...]:
    """gate, up and down projections of each expert under `hf`, which holds {expert}.

    transformers 5 holds them fused in memory (gate_up_proj, down_proj) and sorts by that name.
    """
    at = MLAYER + "mlp.experts.{expert}."
    fc1, fc2 = at + "linear_fc1.weight", at + "linear_fc2.weight"
    fused = LAYER + hf.split("{expert}", maxsplit=1)[0]
    wide, tall = ("moe_ffn", "hidden"), ("hidden", "moe_ffn")
    both = fused + "gate_up_proj"
    return (
        Rule(LAYER + hf + "gate_proj.weight", fc1, wide, gate, "moe", sorts_as=both),
        Rule(LAYER + hf + "up_proj.weight", fc1, wide, up, "moe", sorts_as=both),
        Rule(
            LAYER + hf + "down_proj.weight", fc2, tall, layers="moe", sorts_as=fused + "down_proj"
        ),
    )


# -- config.json ---------------------------------------------------------------------------------


def dim(name: str, *aliases: str) -> Key:
    """A size that tensor shapes prove."""
    return Key(lambda facts: facts.dims.get(name), aliases=aliases)


def arg(*names: str) -> Key:
    """A training argument that decides what the model computes: a reference must agree."""
    return Key(lambda facts: facts.arg(*names))


def soft_arg(*names: str, default: object) -> Key:
    """A training argument that describes the run, not the model: a reference overrules it."""

    def value(facts: Facts) -> Soft | None:
        found = facts.arg(*names)
        return None if found is None else Soft(found)

    return Key(value, default)


def constant(value: object) -> Key:
    """A value that is the same for every Megatron model of the family."""
    return Key(lambda facts: Soft(value))


def _rope_scaling(facts: Facts) -> object:
    """None in effect where the arguments say so: a reference may still extend the context.

    Megatron-LM:megatron/core/models/common/embeddings/rotary_pos_embedding.py.

    The factor 8.0 is among the args even when scaling is off; low, high and the original length
    are constants there, and arguments only in NeMo and early Megatron-Bridge.
    """
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


BASE_KEYS: Mapping[str, Key] = {
    "hidden_size": dim("hidden"),
    "intermediate_size": Key(_ffn),
    "num_hidden_layers": dim("layers"),
    "vocab_size": Key(lambda facts: Proven(facts.dims["vocab"])),
    "tie_word_embeddings": Key(_tied),
    "hidden_act": Key(_activation, "silu"),
    "rms_norm_eps": arg("layernorm_epsilon", "norm_epsilon"),
    "rope_theta": arg("rotary_base"),
    "rope_scaling": Key(_rope_scaling, None),
    "max_position_embeddings": soft_arg("max_position_embeddings", "seq_length", default=32768),
    "initializer_range": soft_arg("init_method_std", default=0.02),
    "attention_dropout": soft_arg("attention_dropout", default=0.0),
    "use_cache": constant(True),
}
GQA_KEYS: Mapping[str, Key] = {
    "num_attention_heads": dim("heads"),
    "num_key_value_heads": dim("groups"),
    "head_dim": dim("head_dim"),
    "attention_bias": Key(lambda facts: False),
}
FULL_ATTENTION_KEYS: Mapping[str, Key] = {
    "use_sliding_window": Key(lambda facts: False if facts.args else None, False),
    "sliding_window": Key(lambda facts: None, None),
}

DECODER_REQUIRES: Mapping[str, tuple[object, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1, 1.0),
    "rotary_interleaved": (False,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "multi_latent_attention": (False,),
    "attention_output_gate": (False,),
    "qk_l2_norm": (False,),
    "softmax_type": ("vanilla",),
    "softmax_scale": (),
    "use_mup": (False,),
    "moe_mlp_glu_interleave_size": (),
    "window_size": (),
    "no_rope_freq": (),
    "activation_func_clamp_value": (),
    "glu_linear_offset": (0, 0.0),
}
"""What a decoder of RMSNorm, SwiGLU and half-split RoPE takes for granted."""
