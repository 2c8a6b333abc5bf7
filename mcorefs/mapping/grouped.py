"""The sizes of attention over query groups, of all layers alike or of those with a window and of
the others.

Megatron-Bridge:src/megatron/bridge/models/stepfun/step35_provider.py Step35DecoderLayer gives its
layers with a window heads of their own number.
"""

from __future__ import annotations

from collections.abc import Mapping

from mcorefs.mapping.reference import Reference
from mcorefs.views import View

_CLAIMS = {"heads": "num_attention_heads", "groups": "num_query_groups", "head_dim": "kv_channels"}
"""By the size that each states."""
_SETTING, _STATED_SETTING = "sliding_attention_setting", "attention_other_setting"
"""What layers with a window have otherwise: Megatron-Bridge's provider, and config.json."""


def sliding_layers(args: Mapping[str, object], reference: Reference) -> frozenset[int]:
    """The layers with a window, where these have heads of their own number.

    Only arguments or a reference tell: no shape shows which are which. Layers for multi-token
    prediction, which layer_types may speak of behind those of the decoder, count on.
    """
    if not (args.get(_SETTING) or reference.config.get(_STATED_SETTING)):
        return frozenset()
    kinds = args.get("layer_types") or reference.config.get("layer_types")
    if not isinstance(kinds, list | tuple):
        return frozenset()
    return frozenset(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")


def attention_sizes(
    first: Mapping[str, View],
    args: Mapping[str, object],
    reference: Reference,
    problems: list[str],
) -> dict[str, int]:
    """heads, groups and head_dim: linear_qkv has (heads + 2 * groups) * head_dim rows and
    linear_proj heads * head_dim columns; only head_dim must come from elsewhere: the norm of a
    query head shows it, but not a norm of all of them (OLMoE). Between gated delta nets it also
    has heads * head_dim rows of gates."""
    qkv = first.get("self_attention.linear_qkv.weight")
    proj = first.get("self_attention.linear_proj.weight")
    norm = first.get("self_attention.q_layernorm.weight")
    if qkv is None or proj is None or not qkv.shape or len(proj.shape) != 2:
        return {}
    rows, columns = qkv.shape[0], proj.shape[1]
    dims: dict[str, int] = {}
    if delta_net_at(first) and args.get("attention_output_gate", True):
        dims["gated_q_rows"], rows = 2 * columns, rows - columns
    stated = reference.config.get("num_attention_heads", reference.config.get("n_head"))
    heads = _int(args.get("num_attention_heads")) or _int(stated)
    head_dim = _int(args.get("kv_channels")) or _int(reference.config.get("head_dim"))
    if norm is not None and len(norm.shape) == 1 and norm.shape != (columns,):
        head_dim = norm.shape[0]
    elif head_dim is None and heads:
        head_dim = columns // heads
    if not head_dim:
        problems.append(
            "the number of attention heads is recorded nowhere in the checkpoint; "
            "pass --hf-config with the directory of the model it was trained from"
        )
        return dims
    if columns % head_dim or (rows - columns) % (2 * head_dim) or rows <= columns:
        problems.append(
            f"linear_qkv has {qkv.shape[0]} rows and linear_proj {columns} columns, which no "
            f"number of heads of size {head_dim} explains"
        )
        return dims
    dims["head_dim"], dims["heads"] = head_dim, columns // head_dim
    dims["groups"] = (rows - columns) // (2 * head_dim)
    dims["q_rows"], dims["kv_rows"] = columns, dims["groups"] * head_dim
    dims["qkv_rows"] = qkv.shape[0]
    if dims["heads"] % dims["groups"]:
        problems.append(f"{dims['heads']} heads cannot share {dims['groups']} query groups")
    return dims


def sliding_sizes(
    first: Mapping[str, View],
    args: Mapping[str, object],
    reference: Reference,
    head_dim: int | None,
    problems: list[str],
) -> dict[str, int]:
    """sliding_heads, sliding_groups, sliding_q_rows and sliding_kv_rows: of layers with a window,
    whose tensors `first` has. Heads must be as large as those of other layers, `head_dim`."""
    said = args.get(_SETTING)
    setting = said if isinstance(said, dict) else {}
    found = attention_sizes(first, setting, reference, problems)
    if found and head_dim is not None and found.get("head_dim") != head_dim:
        problems.append(
            f"heads of layers with a window are {found.get('head_dim')} elements large, those of "
            f"others {head_dim}: config.json has one head_dim"
        )
    for size, argument in _CLAIMS.items():
        if size in found and argument in setting and setting[argument] != found[size]:
            problems.append(
                f"{argument} is {setting[argument]} in {_SETTING} but the tensor shapes of layers "
                f"with a window say {found[size]}"
            )
    sizes = ("heads", "groups", "q_rows", "kv_rows")
    return {f"sliding_{size}": found[size] for size in sizes if size in found}


def delta_net_at(first: Mapping[str, View]) -> str:
    """Where in its layer a gated delta net is; "" if there is none."""
    places = ("self_attention.", "self_attention.linear_attn.")
    return next((at for at in places if at + "A_log" in first), "")


def _int(value: object) -> int | None:
    return value if type(value) is int else None
