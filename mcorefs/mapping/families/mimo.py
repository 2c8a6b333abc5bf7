"""MiMo-7B: Qwen2, with layers for multi-token prediction under names of their own.

transformers has no class of it: the hub's repository has code, which config.json names if a
reference does. That code gives eh_proj (its input_proj) the hidden state first and then the
embedding, Megatron the other way round (Megatron-LM:megatron/core/transformer/
multi_token_prediction.py _concat_embeddings; Megatron-Bridge:src/megatron/bridge/models/mimo/
mimo_bridge.py swaps the halves as well).
"""

from __future__ import annotations

from mcorefs.mapping.blocks.attention import GQA_QKV_BIAS
from mcorefs.mapping.blocks.keys import BASE_KEYS, DECODER_REQUIRES, FULL_ATTENTION_KEYS, GQA_KEYS
from mcorefs.mapping.blocks.mlp import GATED_MLP
from mcorefs.mapping.blocks.model import EMBED, HEAD, LAYER_NORMS, NORM, gamma
from mcorefs.mapping.blocks.mtp import NEXTN_KEYS, inside
from mcorefs.mapping.family import Facts, Family, Key, Rule
from mcorefs.views import Cat, Narrow, View

_MTP, _AT = "model.mtp_layers.{mtp}.", "mtp.layers.{mtp}."


def _hidden_first(view: View, facts: Facts) -> View:
    """eh_proj with the halves of its columns swapped."""
    half = facts.dims["hidden"]
    return Cat((Narrow(view, 1, half, half), Narrow(view, 1, 0, half)), 1)


def _norm(hf: str, source: str) -> Rule:
    return Rule(f"{_MTP}{hf}.weight", f"{_AT}{source}.weight", ("hidden",), gamma, stack="mtp")


def _of_mtp(*rules: Rule) -> tuple[Rule, ...]:
    """`rules` of a layer of the decoder, for the one inside those for multi-token prediction."""
    return tuple(inside(rule, _MTP) for rule in rules)


MIMO = Family(
    name="mimo",
    architecture="MiMoForCausalLM",
    rules=(
        EMBED,
        *GQA_QKV_BIAS,
        *GATED_MLP,
        *LAYER_NORMS,
        NORM,
        *_of_mtp(*LAYER_NORMS),
        _norm("token_layernorm", "enorm"),
        _norm("hidden_layernorm", "hnorm"),
        Rule(
            _MTP + "input_proj.weight",
            _AT + "eh_proj.weight",
            ("hidden", "mtp_columns"),
            _hidden_first,
            stack="mtp",
        ),
        _norm("final_layernorm", "final_layernorm"),
        *_of_mtp(*GQA_QKV_BIAS, *GATED_MLP),
        HEAD,
    ),
    config={
        **BASE_KEYS,
        **GQA_KEYS,
        **FULL_ATTENTION_KEYS,
        **NEXTN_KEYS,
        "attention_bias": Key(lambda facts: True),
    },
    requires={**DECODER_REQUIRES, "add_qkv_bias": (True,)},
    named_only=True,
    has_own_code=True,
)
