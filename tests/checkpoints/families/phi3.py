"""Phi-3 and Phi-4: q, k and v in one tensor, gate and up in another."""

from __future__ import annotations

from ..spec import Spec
from .base import DECODER, HF_LAYER, LAYER, Family, FusedGated, Qkv, Values, decoder_config, rope

_PHI3 = Spec(family="phi3", head_dim=8, norm_eps=1e-5, rope_theta=10_000)


def _rotated(spec: Spec) -> float:
    """Phi-4-mini rotates three quarters of each head, the others all of it."""
    return 0.75 if spec.tied else 1.0


def _config(spec: Spec) -> Values:
    config = {name: value for name, value in decoder_config(spec).items() if name != "head_dim"}
    return {
        **config,
        "pad_token_id": 0,
        "original_max_position_embeddings": spec.max_positions,
        "sliding_window": spec.window,
        "rope_parameters": {**rope(spec), "partial_rotary_factor": _rotated(spec)},
    }


def _arguments(spec: Spec) -> Values:
    return {"rotary_percent": _rotated(spec)}


PHI3 = Family(
    {
        "phi3-tp2": _PHI3.but(tp=2, vocab_size_in_args=True, seed=240),
        "phi3-tp2-tied": _PHI3.but(tp=2, tied=True, rotary_interleaved=True, window=8, seed=241),
        "phi3-pp2": _PHI3.but(pp=2, dtype="fp32", per_layer_keys=True, seed=242),
        "torch-phi3-tp2": _PHI3.but(format="torch", tp=2, tied=True, seed=243),
        "torch-phi3-tp2-pp2": _PHI3.but(format="torch", tp=2, pp=2, names="te", seed=244),
    },
    config=_config,
    arguments=_arguments,
    parameters={
        **DECODER,
        LAYER + "self_attention.linear_qkv.weight": Qkv(HF_LAYER + "self_attn.qkv_proj.weight"),
        LAYER + "mlp.linear_fc1.weight": FusedGated(HF_LAYER + "mlp.gate_up_proj.weight"),
    },
)
