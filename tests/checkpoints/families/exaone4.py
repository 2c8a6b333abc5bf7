"""EXAONE 4, as Megatron-Bridge has it: norms of what attention and MLP put out, and none of what
they take in. The large one has layers with a window, and rotates in no others."""

from __future__ import annotations

from ..spec import Spec
from .base import DECODER, HF_LAYER, LAYER, Family, Norm, Values, decoder_config
from .gemma2 import OUTPUT_NORMS

_EXAONE4 = Spec(
    family="exaone4", norm_eps=1e-5, tied=True, llama3_rope_factor=16.0, output_norms=OUTPUT_NORMS
)
_EVERY = 2
"""How many layers there are for each without a window."""


def _config(spec: Spec) -> Values:
    kinds = ["full_attention"] * spec.layers
    if spec.window is not None:
        kinds = [
            "full_attention" if layer % _EVERY == 0 else "sliding_attention"
            for layer in range(1, spec.layers + 1)
        ]
    return {
        **decoder_config(spec),
        "sliding_window": spec.window,
        "sliding_window_pattern": 0 if spec.window is None else _EVERY,
        "layer_types": kinds,
    }


def _arguments(spec: Spec) -> Values:
    hybrid = {"window_attn_skip_freq": _EVERY, "no_rope_freq": _EVERY} if spec.window else {}
    return {"qk_layernorm": True, **hybrid}


EXAONE4 = Family(
    {
        "exaone4-tp2": _EXAONE4.but(tp=2, vocab_size_in_args=True, seed=300),
        "exaone4-tp2-window": _EXAONE4.but(tp=2, window=8, tied=False, seed=301),
        "exaone4-pp2": _EXAONE4.but(pp=2, dtype="fp32", per_layer_keys=True, seed=302),
        "torch-exaone4-tp2-pp2": _EXAONE4.but(
            format="torch", tp=2, pp=2, window=8, tied=False, seed=303
        ),
        "torch-exaone4-tp2": _EXAONE4.but(format="torch", tp=2, names="te", seed=304),
    },
    config=_config,
    arguments=_arguments,
    norms_only_outputs=True,
    parameters={
        **DECODER,
        f"{LAYER}{OUTPUT_NORMS[0]}.weight": Norm(HF_LAYER + "post_attention_layernorm.weight"),
        f"{LAYER}{OUTPUT_NORMS[1]}.weight": Norm(HF_LAYER + "post_feedforward_layernorm.weight"),
    },
)
