"""GLM-4 of 2025 (0414), as slime and ms-swift have it: the layer, or attention and MLP, have norms
of their own of what they put out."""

from __future__ import annotations

from ..spec import Spec
from .base import DECODER, HF_LAYER, LAYER, Family, FusedGated, Norm, Values, decoder_config, rope

_SLIME = ("post_self_attn_layernorm", "post_mlp_layernorm")
_MS_SWIFT = ("self_attention.post_self_attn_layernorm", "mlp.post_mlp_layernorm")
_GLM4 = Spec(family="glm4", kv_heads=2, norm_eps=1e-5, rope_theta=10_000, output_norms=_SLIME)
_ROTATED = 0.5


def _has_bias(spec: Spec) -> bool:
    """The 9B model has biases on q, k and v, the 32B model has none."""
    return not spec.tied


def _config(spec: Spec) -> Values:
    return {
        **decoder_config(spec),
        "rope_parameters": {**rope(spec), "partial_rotary_factor": _ROTATED},
        "attention_bias": _has_bias(spec),
        "pad_token_id": 0,
    }


def _arguments(spec: Spec) -> Values:
    return {
        "add_qkv_bias": _has_bias(spec),
        "rotary_interleaved": True,
        "rotary_percent": _ROTATED,
        "post_self_attn_layernorm": True,
        "post_mlp_layernorm": True,
    }


GLM4 = Family(
    {
        "glm4-tp2": _GLM4.but(tp=2, vocab_size_in_args=True, seed=250),
        "glm4-tp2-tied": _GLM4.but(tp=2, tied=True, output_norms=_MS_SWIFT, seed=251),
        "glm4-pp2": _GLM4.but(pp=2, output_norms=_MS_SWIFT, per_layer_keys=True, seed=252),
        "torch-glm4-tp2": _GLM4.but(format="torch", tp=2, output_norms=_MS_SWIFT, seed=253),
        "torch-glm4-tp2-pp2": _GLM4.but(format="torch", tp=2, pp=2, names="te", seed=254),
    },
    config=_config,
    arguments=_arguments,
    parameters={
        **DECODER,
        LAYER + "mlp.linear_fc1.weight": FusedGated(HF_LAYER + "mlp.gate_up_proj.weight"),
        **{
            f"{LAYER}{path}.weight": Norm(f"{HF_LAYER}{path.rpartition('.')[2]}.weight")
            for path in (*_SLIME, *_MS_SWIFT)
        },
    },
)
