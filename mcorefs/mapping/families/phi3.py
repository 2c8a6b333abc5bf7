"""Phi-3 and Phi-4: Llama with q, k and v in one tensor, and gate and up in another; some rotate a
part of each head only. In Megatron nothing tells them from Llama."""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA, fused_qkv
from mcorefs.mapping.blocks.keys import (
    BASE_KEYS,
    GQA_KEYS,
    PARTIAL_ROTARY,
    SLIDING_WINDOW,
    decoder_requires,
    soft_arg,
)
from mcorefs.mapping.blocks.mlp import FUSED_GATED_MLP
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM
from mcorefs.mapping.blocks.names import LAYER, MLAYER
from mcorefs.mapping.family import Facts, Family, Rule
from mcorefs.views import View


def _qkv_proj(view: View, facts: Facts) -> View:
    rows, hidden = facts.dims["q_rows"], facts.dims["hidden"]
    if rows != hidden:
        raise ValueError(f"Phi-3's heads fill the hidden size of {hidden}, and are not {rows} rows")
    return fused_qkv(view, facts)


PHI3 = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    rules=(
        EMBED,
        GQA[-1],
        Rule(
            LAYER + "self_attn.qkv_proj.weight",
            MLAYER + "self_attention.linear_qkv.weight",
            ("qkv_rows", "hidden"),
            _qkv_proj,
        ),
        *FUSED_GATED_MLP,
        *LAYER_NORMS,
        NORM,
        HEAD,
    ),
    config={
        **BASE_KEYS,
        **{name: key for name, key in GQA_KEYS.items() if name != "head_dim"},
        "partial_rotary_factor": PARTIAL_ROTARY,
        "sliding_window": SLIDING_WINDOW,
        "original_max_position_embeddings": soft_arg(
            "max_position_embeddings", "seq_length", default=4096
        ),
        "embd_pdrop": soft_arg("hidden_dropout", default=0.0),
        "resid_pdrop": soft_arg("hidden_dropout", default=0.0),
    },
    requires={
        **decoder_requires("rotary_percent", "window_size"),
        "window_attn_skip_freq": (),
        "use_rope_scaling": (False,),
        "rotary_seq_len_interpolation_factor": (1, 1.0),
    },
    named_only=True,
)
