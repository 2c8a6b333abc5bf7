"""linear_qkv where each head has a gate, under the names that torch_dist gives its parts.

Each tensor-parallel rank has its share of the query groups, and below them a row for each of its
heads (Megatron-LM, branch dev: megatron/core/transformer/attention.py SelfAttention with
head_wise_attn_gate). What is in it where an output has a gate per element (attention_output_gate)
lies otherwise, and is no matter of this module.
"""

from __future__ import annotations

from collections.abc import Mapping

from mcorefs.formats.torch_legacy.tensor_parallel import Part, divide

_QKV = ".linear_qkv.weight"


def divided(
    parts: Mapping[str, Part], args: Mapping[str, object], problems: list[str]
) -> dict[str, Part]:
    """`parts` of one rank, with linear_qkv divided where the run's arguments say that it holds
    gates."""
    found = dict(parts)
    if args.get("head_wise_attn_gate") and not args.get("attention_output_gate"):
        for name in parts:
            if name.endswith(_QKV):
                divide(found, _sections(name, parts, args, problems))
    return found


def _sections(
    name: str, parts: Mapping[str, Part], args: Mapping[str, object], problems: list[str]
) -> dict[str, dict[str, int]]:
    """Rows of queries, keys and values, and of gates, in linear_qkv `name`.

    There is a gate per head: the columns of linear_proj are those of so many heads, whose size the
    norm of a query head shows.
    """
    module = name.removesuffix(_QKV)
    proj, norm = (
        parts.get(f"{module}.linear_proj.weight"),
        parts.get(f"{module}.q_layernorm.weight"),
    )
    size = args.get("kv_channels")
    if norm is not None and len(norm.shape) == 1:
        size = norm.shape[0]
    if proj is None or len(proj.shape) != 2 or len(parts[name].shape) != 2 or type(size) is not int:
        problems.append(f"{name}: nothing beside it says how many heads it has gates of")
        return {}
    rows, columns = parts[name].shape[0], proj.shape[1]
    gates, rest = divmod(columns, size) if size > 0 else (0, 1)
    keys = rows - gates - columns
    if rest or keys <= 0 or keys % (2 * size):
        problems.append(
            f"{name} has {rows} rows on a rank, which {columns} columns of linear_proj, heads of "
            f"size {size} and a gate for each of them do not explain"
        )
        return {}
    return {name: {"_qkv": rows - gates, "_gate": gates}}
