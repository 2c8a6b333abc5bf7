"""GPT-2: LayerNorm, learned positions, GELU, biases everywhere; transformers transposes weights."""

from __future__ import annotations

from ..spec import Spec
from .base import LAYER, Columns, Family, Norm, Qkv, Rows, Value, Values, Vocabulary, Whole

_GPT2 = Spec(family="gpt2", kv_heads=8, head_dim=8, linear_bias=True, tied=True, norm_eps=1e-5)
_HF = "transformer.h.{layer}."


def _config(spec: Spec) -> Values:
    return {
        "n_embd": spec.hidden,
        "n_inner": spec.ffn,
        "n_layer": spec.layers,
        "n_head": spec.heads,
        "n_positions": spec.max_positions,
        "layer_norm_epsilon": spec.norm_eps,
        "activation_function": "gelu_new" if spec.fused_gelu else "gelu",
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _arguments(spec: Spec) -> Values:
    return {
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "swiglu": False,
        "bias_gelu_fusion": spec.fused_gelu,
    }


def _linear(at: str, hf: str, kind: type[Rows | Columns | Qkv]) -> dict[str, Value]:
    bias = Whole(hf + ".bias") if kind is Columns else kind(hf + ".bias")
    return {at + ".weight": kind(hf + ".weight", transposed=True), at + ".bias": bias}


def _norm(at: str, hf: str) -> dict[str, Value]:
    return {at + ".weight": Norm(hf + ".weight"), at + ".bias": Whole(hf + ".bias")}


GPT2 = Family(
    {
        "gpt2-tp2": _GPT2.but(tp=2, vocab_size_in_args=True, seed=120),
        "gpt2-pp2-untied": _GPT2.but(pp=2, tied=False, seed=121),
        "gpt2-erf": _GPT2.but(fused_gelu=False, dtype="fp32", per_layer_keys=True, seed=122),
        "gpt2-tp2-around-zero": _GPT2.but(tp=2, dtype="fp16", zero_centred=True, seed=124),
        "torch-gpt2-tp2-pp2": _GPT2.but(format="torch", tp=2, pp=2, names="te", seed=123),
    },
    config=_config,
    arguments=_arguments,
    parameters={
        "embedding.word_embeddings.weight": Vocabulary("transformer.wte.weight"),
        "embedding.position_embeddings.weight": Whole("transformer.wpe.weight"),
        "output_layer.weight": Vocabulary("lm_head.weight"),
        **_norm(LAYER + "input_layernorm", _HF + "ln_1"),
        **_linear(LAYER + "self_attention.linear_qkv", _HF + "attn.c_attn", Qkv),
        **_linear(LAYER + "self_attention.linear_proj", _HF + "attn.c_proj", Columns),
        **_norm(LAYER + "pre_mlp_layernorm", _HF + "ln_2"),
        **_linear(LAYER + "mlp.linear_fc1", _HF + "mlp.c_fc", Rows),
        **_linear(LAYER + "mlp.linear_fc2", _HF + "mlp.c_proj", Columns),
        **_norm("decoder.final_layernorm", "transformer.ln_f"),
    },
)
