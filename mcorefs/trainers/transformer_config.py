"""megatron-core's TransformerConfig, saved as plain values, in Megatron-LM's names of arguments.

Most names are the same; this is the difference. Providers of Megatron-Bridge and configs of NeMo
extend the class, and add what else the model was built from (rotary_base, vocab_size, ...). Names:
Megatron-LM:megatron/core/transformer/transformer_config.py, megatron/training/arguments.py
core_transformer_config_from_args; Megatron-Bridge:src/megatron/bridge/models/gpt_provider.py;
Llama31ModelProvider of Megatron-Bridge up to 0.2, and NeMo's Llama31Config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_RENAMED = {
    "num_moe_experts": "num_experts",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}
_SILU = ("silu", "swish")
_ACTIVATION = re.compile(r"(?:<function )?(?:\w+\.)*(\w+)")
"""A function by its dotted name, or as Python shows it."""


def arguments(config: Mapping[str, object]) -> dict[str, object]:
    """`config` as Megatron-LM would have recorded it; what it leaves open is left out."""
    args = {_RENAMED.get(name, name): value for name, value in config.items() if value is not None}
    if isinstance(args.get("num_query_groups"), int):
        args["group_query_attention"] = True  # else Megatron-LM ignores the number
    shared = args.pop("share_embeddings_and_output_weights", None)
    if isinstance(shared, bool):
        args["untie_embeddings_and_output_weights"] = not shared
    gated, activation = args.pop("gated_linear_unit", None), args.pop("activation_func", None)
    name = activation if isinstance(activation, str) else ""
    if gated is False or (name and not any(silu in name for silu in _SILU)):
        args |= _no_swiglu(gated, name)
    elif gated and name:
        args["swiglu"] = True  # functions are not always saved: then it is left to the rest
    if isinstance(args.get("rope_scaling"), bool):
        args["use_rope_scaling"] = args.pop("rope_scaling")
    if "scale_factor" in args and "old_context_len" in args:
        args["use_rope_scaling"], args["rope_scaling_factor"] = True, args["scale_factor"]
    if args.get("should_pad_vocab") is False and isinstance(args.get("vocab_size"), int):
        args["padded_vocab_size"] = args["vocab_size"]
    if args.get("multi_latent_attention") and "original_max_position_embeddings" not in args:
        # YaRN's: the length before it was extended.
        original = args.pop("max_position_embeddings", None)
        if original is not None:
            args["original_max_position_embeddings"] = original
    return args


def _no_swiglu(gated: object, name: str) -> dict[str, object]:
    """Of an MLP that is no SwiGLU; by megatron-core's own names where no argument makes it."""
    match = _ACTIVATION.match(name)
    activation = match[1] if match else name
    if activation == "squared_relu" and gated is False:
        return {"swiglu": False, "squared_relu": True}
    if activation == "quick_gelu" and gated:
        return {"swiglu": False, "quick_geglu": True}
    described: dict[str, object] = {"swiglu": False}
    if gated and activation:
        described |= {"gated_linear_unit": True, "activation_func": activation}
    return described
