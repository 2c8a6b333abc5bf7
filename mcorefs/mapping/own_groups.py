"""The sizes of attention whose layers with a window have sinks and query groups of their own, and
whose value heads have a size of their own (MiMo-V2-Flash).

Megatron-Bridge:src/megatron/bridge/models/mimo_v2_flash/modeling_mimo_v2_flash.py
MiMoV2FlashSelfAttention. With n heads and, in a layer, g groups:

    linear_qkv   [n * head + g * (head + v), hidden]
    linear_proj  [hidden, n * v]
"""

from __future__ import annotations

from collections.abc import Mapping

from mcorefs.mapping.reference import Reference
from mcorefs.views import View

SINKS = "self_attention.core_attention.softmax_offset"
NAME = "mimo_v2_flash"
_CLAIMS = {"groups": "full_attn_num_query_groups", "sliding_groups": "swa_num_query_groups"}
"""Arguments that state these sizes."""


def has_own_groups(args: Mapping[str, object], reference: Reference) -> bool:
    """Whether it is such a model, which no shape tells."""
    stated = reference.config.get("model_type") == NAME
    return stated or any(args.get(argument) is not None for argument in _CLAIMS.values())


def own_group_sizes(
    full: Mapping[str, View],
    sliding: Mapping[str, View],
    args: Mapping[str, object],
    reference: Reference,
    problems: list[str],
) -> dict[str, int]:
    """heads, head_dim, v_head, q_rows and value_columns (of linear_proj); groups, k_rows and
    value_rows of layers without a window, and sliding_groups, sliding_k_rows and sliding_value_rows
    of those with one.

    `full` and `sliding`: tensors by their names inside such a layer. Only the number of heads and
    the size of queries must come from elsewhere.
    """
    stated = reference.config
    heads = _int(args.get("num_attention_heads")) or _int(stated.get("num_attention_heads"))
    head_dim = _int(args.get("kv_channels")) or _int(stated.get("head_dim"))
    if not heads or not head_dim:
        problems.append(
            "the number and the size of attention heads are recorded nowhere in the checkpoint; "
            "pass --hf-config with the directory of the model it was trained from"
        )
        return {}
    dims = {"heads": heads, "head_dim": head_dim, "q_rows": heads * head_dim}
    for at, layer in (("", full), ("sliding_", sliding)):
        qkv = layer.get("self_attention.linear_qkv.weight")
        proj = layer.get("self_attention.linear_proj.weight")
        if qkv is None or proj is None or not qkv.shape or len(proj.shape) != 2:
            continue
        rows, columns = qkv.shape[0] - heads * head_dim, proj.shape[1]
        v_head, uneven = divmod(columns, heads)
        groups, rest = divmod(rows, head_dim + v_head)
        if uneven or rest or groups <= 0 or heads % groups or v_head != dims.get("v_head", v_head):
            problems.append(
                f"linear_qkv has {qkv.shape[0]} rows and linear_proj {columns} columns, which no "
                f"number of query groups of {heads} heads of size {head_dim} explains"
            )
            continue
        dims["v_head"], dims["value_columns"] = v_head, columns
        dims[f"{at}groups"] = groups
        dims[f"{at}k_rows"], dims[f"{at}value_rows"] = groups * head_dim, groups * v_head
    for size, argument in _CLAIMS.items():
        if size in dims and argument in args and args[argument] != dims[size]:
            problems.append(
                f"{argument} is {args[argument]} in the training arguments but the tensor shapes "
                f"say {dims[size]}"
            )
    return dims


def _int(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None
