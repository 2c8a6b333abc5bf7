"""megatron-core's TransformerConfig, saved as plain values, in Megatron-LM's names of arguments.

Most names are the same; this is the difference. Providers of Megatron-Bridge extend the class, and
add what else the model was built from (rotary_base, vocab_size, ...). Names:
Megatron-LM:megatron/core/transformer/transformer_config.py, megatron/training/arguments.py
core_transformer_config_from_args.
"""

from __future__ import annotations

from collections.abc import Mapping

_RENAMED = {
    "num_moe_experts": "num_experts",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}
_SILU = ("silu", "swish")


def arguments(config: Mapping[str, object]) -> dict[str, object]:
    """`config` as Megatron-LM would have recorded it; what it leaves open is left out."""
    args = {_RENAMED.get(name, name): value for name, value in config.items() if value is not None}
    if isinstance(args.get("num_query_groups"), int):
        args["group_query_attention"] = True  # else Megatron-LM ignores the number
    shared = args.pop("share_embeddings_and_output_weights", None)
    if isinstance(shared, bool):
        args["untie_embeddings_and_output_weights"] = not shared
    gated, activation = args.pop("gated_linear_unit", None), args.pop("activation_func", None)
    if gated is False:
        args["swiglu"] = False
    elif gated and isinstance(activation, str) and any(name in activation for name in _SILU):
        args["swiglu"] = True  # functions are not always saved: then it is left to the rest
    if args.get("multi_latent_attention") and "original_max_position_embeddings" not in args:
        # YaRN's: the length before it was extended.
        original = args.pop("max_position_embeddings", None)
        if original is not None:
            args["original_max_position_embeddings"] = original
    return args
