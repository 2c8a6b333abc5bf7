"""The facts of a model: its sizes from the shapes of its tensors, held against its arguments.

Shapes are proof, arguments are claims: where both speak they must agree, and a disagreement is a
problem to report, not something to settle silently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from mcorefs.mapping import grouped, latent, layer_lists, mamba, own_groups
from mcorefs.mapping.blocks.names import EMBEDDING, OUTPUT
from mcorefs.mapping.family import Facts, kind
from mcorefs.mapping.heads import Task
from mcorefs.mapping.reference import HF_CONFIG, VISION, Reference
from mcorefs.mapping.vision import vision_sizes
from mcorefs.views import View

POSITIONS = "embedding.position_embeddings.weight"
MAX_LAYERS = 10_000
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_MTP_LAYER = re.compile(r"mtp\.layers\.(\d+)\.")
_ROUTER = re.compile(r"\.mlp\.router\.weight$")
_INDEXER = re.compile(r"self_attention\.(?:wk|core_attention\.indexer\.linear_wk)\.weight$")
_SINKS = re.compile(re.escape(f".{own_groups.SINKS}") + "$")
_MODULE = re.compile(r"decoder\.layers\.(\d+)\.(mixer|self_attention|mlp)\.")
_LINEAR = re.compile(r"decoder\.layers\.(\d+)\.self_attention\.(?:linear_attn\.)?A_log$")

MLPS = {"ffn": "mlp", "moe_ffn": "mlp.experts.0", "shared_ffn": "mlp.shared_experts"}
"""The sizes of the MLPs that a layer may have."""

CLAIMS: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size",),
    "layers": ("num_layers",),
    "heads": ("num_attention_heads",),
    "head_dim": ("kv_channels",),
    "ffn": ("ffn_hidden_size",),
    "experts": ("num_experts", "num_moe_experts"),
    "moe_ffn": ("moe_ffn_hidden_size",),
    "shared_ffn": ("moe_shared_expert_intermediate_size",),
    "padded_vocab": ("padded_vocab_size",),
    "positions": ("max_position_embeddings",),
    **latent.CLAIMS,
    **mamba.CLAIMS,
    "moe_latent": ("moe_latent_size",),
    "linear_key_dim": ("linear_key_head_dim",),
    "linear_value_heads": ("linear_num_value_heads",),
    "linear_value_dim": ("linear_value_head_dim",),
    "conv_kernel": ("linear_conv_kernel_dim",),
}
"""Arguments that state a size which shapes prove (Megatron-LM:megatron/training/arguments.py)."""


def gather(
    tensors: Mapping[str, View],
    args: Mapping[str, object],
    reference: Reference,
    vocab_size: int | None = None,
    task: Task = "causal_lm",
) -> tuple[Facts, list[str], list[str]]:
    """(facts of canonical `tensors` trained with `args` for `task`, remarks, every contradiction
    found).

    `reference` (a Hugging Face config.json) supplies the head count where nothing else does, and
    the vocabulary's size unless the user gives it as `vocab_size`.
    """
    args = {name: value for name, value in args.items() if value is not None}
    tensors = _with_one_expert(tensors)
    seen, reference = reference.section(VISION), reference.text
    sliding = grouped.sliding_layers(args, reference)
    first = _first_layer_with(tensors, sliding)
    dims: dict[str, int] = {}
    remarks: list[str] = []
    problems: list[str] = []
    dims["layers"] = _layers(tensors, problems)
    if EMBEDDING in tensors and len(tensors[EMBEDDING].shape) == 2:
        dims["padded_vocab"], dims["hidden"] = tensors[EMBEDDING].shape
        dims["vocab"] = _vocab(dims["padded_vocab"], args, reference, vocab_size, remarks, problems)
    else:
        problems.append(
            f"{EMBEDDING} is missing or is no matrix: this is not a whole language model"
        )
    if (positions := tensors.get(POSITIONS)) is not None and len(positions.shape) == 2:
        dims["positions"] = positions.shape[0]
    if own_groups.has_own_groups(args, reference):
        sliding = _layers_with(_SINKS, tensors, dims)
        windowed = _first_layer_with(tensors, set(range(dims["layers"])) - sliding)
        others = _first_layer_with(tensors, sliding)
        dims |= own_groups.own_group_sizes(others, windowed, args, reference, problems)
    else:
        dims |= grouped.attention_sizes(first, args, reference, problems)
        if sliding:
            windowed = _first_layer_with(tensors, set(range(dims["layers"])) - sliding)
            head_dim = dims.get("head_dim")
            dims |= grouped.sliding_sizes(windowed, args, reference, head_dim, problems)
    dims |= latent.latent_sizes(first, args, problems)
    dims |= latent.indexer_sizes(first)
    _delta_net(dims, first, args, reference, problems)
    dims |= mamba.mamba_sizes(first, args, reference, problems)
    _mtp(dims, tensors, args, problems)
    dims |= vision_sizes(tensors, seen, problems)
    dims |= _mlps(first)
    if (router := first.get("mlp.router.weight")) is not None and router.shape:
        dims["experts"] = router.shape[0]
    _moe_latent(dims, first)
    _check_claims(dims, args, problems)
    dtype = tensors[EMBEDDING].dtype.torch if EMBEDDING in tensors else "bfloat16"
    tied = OUTPUT not in tensors
    untied = args.get("untie_embeddings_and_output_weights")
    if task == "seq_cls" and OUTPUT in tensors:
        dims["labels"] = tensors[OUTPUT].shape[0]
    if task != "causal_lm":
        pass  # there is no output layer that could share the embedding
    elif tied and untied:
        problems.append(
            "the training arguments say untie_embeddings_and_output_weights, but the checkpoint "
            f"holds no {OUTPUT}: the last pipeline stage is missing, or it is an embedding model "
            "(--task embedding)"
        )
    elif not tied and untied is not None and not untied:
        remarks.append(
            "the training arguments say that the output layer shares the embedding, but the "
            f"checkpoint stores {OUTPUT}: it is served as it is, and tie_word_embeddings is false"
        )
    linear_layers = frozenset(int(m[1]) for name in tensors if (m := _LINEAR.match(name)))
    moe_layers = _layers_with(_ROUTER, tensors, dims)
    decoder = range(dims["layers"])
    listed = {
        "moe_layer_freq": moe_layers.intersection(decoder),
        "linear_attention_freq": linear_layers,
    }
    problems += layer_lists.list_problems(args, len(decoder), listed)
    kinds = frozenset(map(kind, tensors))
    facts = Facts(
        dims,
        args,
        moe_layers=moe_layers,
        tied=tied,
        dtype=dtype,
        kinds=kinds,
        linear_layers=linear_layers,
        modules=_modules(tensors),
        indexed_layers=_layers_with(_INDEXER, tensors, dims),
        sliding_layers=sliding,
        stated=reference.config if reference.where == HF_CONFIG else {},
        described=reference.config,
    )
    return facts, remarks, problems


def _with_one_expert(tensors: Mapping[str, View]) -> dict[str, View]:
    """Without the experts of each layer but the first: of the ten thousands of tensors that there
    may be, nearly all are theirs. That they are all there and alike is for planning to see."""
    return {
        name: view
        for name, view in tensors.items()
        if ".mlp.experts." not in name or ".mlp.experts.0." in name
    }


def _layers(tensors: Mapping[str, View], problems: list[str]) -> int:
    """How many layers there are; a gap is a problem."""
    layers = {int(m[1]) for name in tensors if (m := _LAYER.match(name))}
    count = max(layers, default=-1) + 1
    if count > MAX_LAYERS:
        problems.append(f"a tensor is named after layer {count - 1}: the checkpoint is damaged")
        return len(layers)
    if gaps := sorted(set(range(count)) - layers):
        problems.append(f"layers {gaps} hold no tensor at all although layer {count - 1} does")
    return count


def _layers_with(
    end: re.Pattern[str], tensors: Mapping[str, View], dims: Mapping[str, int]
) -> frozenset[int]:
    """Layers with a tensor whose name ends so; those for multi-token prediction count on."""
    found = [name for name in tensors if end.search(name)]
    decoder = {int(m[1]) for name in found if (m := _LAYER.match(name))}
    behind = {dims["layers"] + int(m[1]) for name in found if (m := _MTP_LAYER.match(name))}
    return frozenset(decoder | behind)


def _modules(tensors: Mapping[str, View]) -> dict[str, frozenset[int]]:
    """`Facts.modules`."""
    found: dict[str, set[int]] = {"mixer": set(), "self_attention": set(), "mlp": set()}
    for name in tensors:
        if match := _MODULE.match(name):
            found[match[2]].add(int(match[1]))
    return {module: frozenset(layers) for module, layers in found.items()}


def _moe_latent(dims: dict[str, int], first: Mapping[str, View]) -> None:
    """moe_latent, and moe_hidden: what experts are given, a latent or the hidden states
    (Megatron-LM:megatron/core/transformer/moe/moe_layer.py)."""
    down = first.get("mlp.fc1_latent_proj.weight")
    if down is not None and down.shape:
        dims["moe_latent"] = down.shape[0]
    if "hidden" in dims:
        dims["moe_hidden"] = dims.get("moe_latent", dims["hidden"])


def _mtp(
    dims: dict[str, int],
    tensors: Mapping[str, View],
    args: Mapping[str, object],
    problems: list[str],
) -> None:
    """mtp and mtp_columns: how many layers for multi-token prediction there are, and how wide what
    they are given is. With mtp_use_repeated_layer, one is used that many times."""
    found = {int(m[1]) for name in tensors if (m := _MTP_LAYER.match(name))}
    if gaps := sorted(set(range(min(max(found, default=-1) + 1, MAX_LAYERS))) - found):
        problems.append(f"layers {gaps} for multi-token prediction hold no tensor at all")
    if found:
        dims["mtp"], dims["mtp_columns"] = len(found), 2 * dims.get("hidden", 0)
    said = _int(args.get("mtp_num_layers")) or 0
    if args and said != len(found) and not args.get("mtp_use_repeated_layer"):
        problems.append(
            f"mtp_num_layers is {said} in the training arguments but the checkpoint holds "
            f"{len(found)} layers for multi-token prediction"
        )


def _first_layer_with(tensors: Mapping[str, View], but: AbstractSet[int]) -> Mapping[str, View]:
    """For each name inside a layer, the tensor of the first layer that has it; of attention, of
    the first one that is none of `but`."""
    found: dict[str, View] = {}
    for name, view in tensors.items():
        if match := _LAYER.match(name):
            inside = name[match.end() :]
            if int(match[1]) not in but or not inside.startswith("self_attention."):
                found.setdefault(inside, view)
    return found


def _mlps(first: Mapping[str, View]) -> dict[str, int]:
    """The sizes of `MLPS`, and gate_up and moe_gate_up: how many rows gate and up have together."""
    dims: dict[str, int] = {}
    for name, mlp in MLPS.items():
        if (fc2 := first.get(f"{mlp}.linear_fc2.weight")) is not None and len(fc2.shape) == 2:
            dims[name] = fc2.shape[1]
    for name, both in (("ffn", "gate_up"), ("moe_ffn", "moe_gate_up")):
        if name in dims:
            dims[both] = 2 * dims[name]
    return dims


def _delta_net(
    dims: dict[str, int],
    first: Mapping[str, View],
    args: Mapping[str, object],
    reference: Reference,
    problems: list[str],
) -> None:
    """Heads of a gated delta net: A_log has an element per value head, out_proj a column and conv1d
    a row per element of the values; only the number of key heads must come from elsewhere."""
    at = grouped.delta_net_at(first)
    heads, out = first.get(at + "A_log"), first.get(at + "out_proj.weight")
    conv = first.get(at + "conv1d.weight.joined", first.get(at + "conv1d.weight"))
    if heads is None or out is None or conv is None:
        return
    if (len(heads.shape), len(out.shape), len(conv.shape)) != (1, 2, 3):
        return  # what rules expect of their shapes tells more
    values, (mixed, _, kernel) = out.shape[1], conv.shape
    name = "linear_num_key_heads"
    key_heads = _int(args.get(name)) or _int(reference.config.get(name))
    if not key_heads:
        problems.append(
            f"{name} is recorded nowhere in the checkpoint; pass --hf-config with the directory of "
            "the model it was trained from"
        )
        return
    value_heads, keys = heads.shape[0], (mixed - values) // 2
    uneven = not value_heads or values % value_heads or value_heads % key_heads or keys % key_heads
    if (mixed - values) % 2 or uneven or keys <= 0:
        problems.append(
            f"conv1d has {mixed} rows, out_proj {values} columns and A_log {value_heads} elements, "
            f"which {key_heads} key heads do not explain"
        )
        return
    dims["linear_key_heads"], dims["linear_value_heads"] = key_heads, value_heads
    dims["linear_key_dim"], dims["linear_value_dim"] = keys // key_heads, values // value_heads
    dims["linear_mixed"], dims["linear_values"] = mixed, values
    dims["linear_qkvz"], dims["linear_ba"] = mixed + values, 2 * value_heads
    dims["conv_kernel"] = kernel


def _check_claims(dims: Mapping[str, int], args: Mapping[str, object], problems: list[str]) -> None:
    claims = dict(CLAIMS)
    if args.get("group_query_attention"):  # num_query_groups is 1 by default, even for MHA
        claims["groups"] = ("num_query_groups",)
    if "experts" in dims and "moe_ffn_hidden_size" not in args:
        claims["moe_ffn"] = ("ffn_hidden_size",)
    for name, arguments in claims.items():
        said = next((argument for argument in arguments if argument in args), None)
        if name in dims and said is not None and _int(args[said]) != dims[name]:
            problems.append(
                f"{said} is {args[said]} in the training arguments but the tensor shapes say "
                f"{dims[name]}"
            )


def _vocab(
    padded: int,
    args: Mapping[str, object],
    reference: Reference,
    asked: int | None,
    remarks: list[str],
    problems: list[str],
) -> int:
    """How many rows of the embedding to keep: where the vocabulary really ends.

    Megatron pads the embedding to a multiple of make_vocab_size_divisible_by * TP.
    """
    sources: Sequence[tuple[str, object]] = (
        ("--vocab-size", asked),
        (f"vocab_size in {reference.where}", reference.config.get("vocab_size")),
        ("vocab_size in the training arguments", _trained_vocab(args, padded)),
    )
    known = ((where, size) for where, stated in sources if (size := _int(stated)) is not None)
    where, size = next(known, ("", None))
    if size is None:
        remarks.append(
            f"the true vocabulary size is recorded nowhere: all {padded} rows of the embedding are "
            f"kept, padding included, and vocab_size says {padded} (--vocab-size N cuts them)"
        )
        return padded
    most = _most_padding(args)
    if not 0 < size <= padded:
        problems.append(
            f"{where} is {size} but the embedding has {padded} rows; if it is that of the model's "
            f"tokenizer, pass --vocab-size {padded} to keep all rows"
        )
    elif asked is None and most is not None and padded - size > most:
        problems.append(
            f"{where} is {size} but the embedding has {padded} rows, and Megatron adds at most "
            f"{most} rows of padding in such a run: the rest are tokens, which would be lost; "
            f"pass --vocab-size N (at most {padded}) to say where the vocabulary ends"
        )
    elif size < padded:
        remarks.append(f"the embedding's {padded} rows are cut to {size}, from {where}")
        return size
    return padded


def _trained_vocab(args: Mapping[str, object], padded: int) -> int | None:
    """--vocab-size of the training run. Null tokenizers have one more token, the end of a
    document, up to megatron-core 0.15 (megatron/training/tokenizer/tokenizer.py)."""
    size = _int(args.get("vocab_size"))
    if size is not None and size < padded and str(args.get("tokenizer_type")).startswith("Null"):
        return size + 1
    return size


def _most_padding(args: Mapping[str, object]) -> int | None:
    """Megatron-LM:megatron/training/vocab_utils.py; None where the run does not say."""
    multiple = _int(args.get("make_vocab_size_divisible_by"))
    tp = _int(args.get("tensor_model_parallel_size"))
    return None if multiple is None or tp is None else multiple * tp - 1


def _int(value: object) -> int | None:
    return value if type(value) is int else None
