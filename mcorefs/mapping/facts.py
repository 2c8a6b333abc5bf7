"""The facts of a model: its sizes from the shapes of its tensors, held against its arguments.

Shapes are proof, arguments are claims: where both speak they must agree, and a disagreement is a
problem to report, not something to settle silently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mcorefs.mapping.family import Facts
from mcorefs.views import View

EMBEDDING = "embedding.word_embeddings.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_ROUTER = re.compile(r"decoder\.layers\.(\d+)\.mlp\.router\.weight$")

CLAIMS: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size",),
    "layers": ("num_layers",),
    "heads": ("num_attention_heads",),
    "head_dim": ("kv_channels",),
    "ffn": ("ffn_hidden_size",),
    "experts": ("num_experts", "num_moe_experts"),
    "moe_ffn": ("moe_ffn_hidden_size",),
    "padded_vocab": ("padded_vocab_size",),
}
"""Arguments that state a size which shapes prove (Megatron-LM:megatron/training/arguments.py)."""


def gather(
    tensors: Mapping[str, View], args: Mapping[str, object], reference: Mapping[str, object]
) -> tuple[Facts, list[str]]:
    """The facts of canonical `tensors` trained with `args`, and every contradiction found.

    `reference` (a Hugging Face config.json) supplies the head count where nothing else does.
    """
    args = {name: value for name, value in args.items() if value is not None}
    first = _first_layer_with(tensors)
    dims: dict[str, int] = {}
    problems: list[str] = []
    layers = {int(m[1]) for name in tensors if (m := _LAYER.match(name))}
    dims["layers"] = max(layers, default=-1) + 1
    if gaps := sorted(set(range(dims["layers"])) - layers):
        problems.append(f"layers {gaps} hold no tensor at all although layer {max(layers)} does")
    if EMBEDDING in tensors and len(tensors[EMBEDDING].shape) == 2:
        dims["padded_vocab"], dims["hidden"] = tensors[EMBEDDING].shape
    else:
        problems.append(
            f"{EMBEDDING} is missing or is no matrix: this is not a whole language model"
        )
    _attention(dims, first, args, reference, problems)
    for name, source in (("ffn", "mlp.linear_fc1"), ("moe_ffn", "mlp.experts.0.linear_fc1")):
        if (fc1 := first.get(f"{source}.weight")) is not None and fc1.shape:
            dims[name] = fc1.shape[0] // 2
    if (router := first.get("mlp.router.weight")) is not None and router.shape:
        dims["experts"] = router.shape[0]
    _check_claims(dims, args, problems)
    moe_layers = frozenset(int(m[1]) for name in tensors if (m := _ROUTER.match(name)))
    dtype = tensors[EMBEDDING].dtype.torch if EMBEDDING in tensors else "bfloat16"
    tied = "output_layer.weight" not in tensors
    if tied and args.get("untie_embeddings_and_output_weights"):
        problems.append(
            "the training arguments say untie_embeddings_and_output_weights, but the checkpoint "
            "holds no output_layer.weight: the last pipeline stage is missing"
        )
    return Facts(dims, args, moe_layers, tied, dtype), problems


def _first_layer_with(tensors: Mapping[str, View]) -> Mapping[str, View]:
    """For each name inside a layer, the tensor of the first layer that has it."""
    found: dict[str, View] = {}
    for name, view in tensors.items():
        if match := _LAYER.match(name):
            found.setdefault(name[match.end() :], view)
    return found


def _attention(
    dims: dict[str, int],
    first: Mapping[str, View],
    args: Mapping[str, object],
    reference: Mapping[str, object],
    problems: list[str],
) -> None:
    """heads, groups and head_dim: linear_qkv has (heads + 2 * groups) * head_dim rows and
    linear_proj heads * head_dim columns; only head_dim must come from elsewhere."""
    qkv = first.get("self_attention.linear_qkv.weight")
    proj = first.get("self_attention.linear_proj.weight")
    norm = first.get("self_attention.q_layernorm.weight")
    if qkv is None or proj is None or not qkv.shape or len(proj.shape) != 2:
        return
    rows, columns = qkv.shape[0], proj.shape[1]
    heads = _int(args.get("num_attention_heads")) or _int(reference.get("num_attention_heads"))
    head_dim = _int(args.get("kv_channels")) or _int(reference.get("head_dim"))
    if norm is not None and len(norm.shape) == 1:
        head_dim = norm.shape[0]
    elif head_dim is None and heads:
        head_dim = columns // heads
    if not head_dim:
        problems.append(
            "the number of attention heads is recorded nowhere in the checkpoint; "
            "pass --hf-config with the directory of the model it was trained from"
        )
        return
    if columns % head_dim or (rows - columns) % (2 * head_dim) or rows <= columns:
        problems.append(
            f"linear_qkv has {rows} rows and linear_proj {columns} columns, which no number of "
            f"heads of size {head_dim} explains"
        )
        return
    dims["head_dim"], dims["heads"] = head_dim, columns // head_dim
    dims["groups"] = (rows - columns) // (2 * head_dim)
    dims["q_rows"], dims["kv_rows"] = columns, dims["groups"] * head_dim
    if dims["heads"] % dims["groups"]:
        problems.append(f"{dims['heads']} heads cannot share {dims['groups']} query groups")


def _check_claims(dims: Mapping[str, int], args: Mapping[str, object], problems: list[str]) -> None:
    claims = dict(CLAIMS)
    if args.get("group_query_attention"):  # num_query_groups is 1 by default, even for MHA
        claims["groups"] = ("num_query_groups",)
    if "experts" in dims and "moe_ffn_hidden_size" not in args:
        claims["moe_ffn"] = ("ffn_hidden_size",)
    for name, arguments in claims.items():
        stated = next((args[a] for a in arguments if a in args), None)
        if name in dims and stated is not None and _int(stated) != dims[name]:
            problems.append(
                f"{arguments[0]} is {stated} in the training arguments but the tensor shapes "
                f"say {dims[name]}"
            )


def true_vocab(
    padded: int,
    args: Mapping[str, object],
    reference: Mapping[str, object],
    asked: int | None,
) -> tuple[int, str | None, list[str]]:
    """(rows to keep, a remark for the user, problems): where the vocabulary really ends.

    Megatron pads the embedding to a multiple of make_vocab_size_divisible_by * TP.
    """
    sources: Sequence[tuple[str, object]] = (
        ("--vocab-size", asked),
        ("vocab_size in --hf-config", reference.get("vocab_size")),
        ("vocab_size in the training arguments", args.get("vocab_size")),
    )
    for where, stated in sources:
        size = _int(stated)
        if size is None:
            continue
        if not 0 < size <= padded:
            return padded, None, [f"{where} is {size} but the embedding has {padded} rows"]
        if size < padded:
            remark = f"the embedding's {padded} rows are cut to {size}, from {where}"
            return size, remark, []
        return size, None, []
    remark = (
        f"the true vocabulary size is recorded nowhere: all {padded} rows of the embedding are "
        f"kept, padding included, and vocab_size says {padded} (--vocab-size N cuts them)"
    )
    return padded, remark, []


def _int(value: object) -> int | None:
    return value if type(value) is int else None
