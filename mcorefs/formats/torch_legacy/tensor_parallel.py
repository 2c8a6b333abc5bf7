"""How Megatron cuts a parameter over tensor-parallel ranks, and the tensor that the parts tile.

For formats that store what each rank holds in memory, under the names of its modules. Layout
facts, all in Megatron-LM:megatron/core/: tensor_parallel/layers.py (column parallel layers are cut
along axis 0, row parallel ones along axis 1, whose bias every rank holds whole),
transformer/mlp.py (each rank's gated linear_fc1 is its gate rows, then its up rows),
transformer/multi_latent_attention.py (down projections: cut, or the same on every rank),
transformer/dot_product_attention.py (softmax_offset), transformer/multi_token_prediction.py,
transformer/experimental_attention_variant/dsa.py (indexers are the same on every rank),
ssm/mamba_mixer.py (all but the norm before it), transformer/moe/moe_layer.py (latent projections).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from mcorefs.boxes import Box, Shape, row_major_strides
from mcorefs.dtypes import DType
from mcorefs.index import Chunk, Span, StoredTensor, stored_tensor
from mcorefs.names import MEGATRON_VISION, VISION

EMBEDDING = "embedding.word_embeddings.weight"


class Cut(Enum):
    """Which part of a tensor one rank holds."""

    ROWS = "rows"
    COLUMNS = "columns"
    WHOLE = "all of it"
    GATED = "its gate rows, then its up rows"


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank holds of a tensor: a strided region of a record, all counted in elements."""

    record: Span
    """Where the record is; names no place or strides inside it."""
    dtype: DType
    shape: Shape
    strides: Shape
    first: int
    """Element of the record that is index 0 on every axis."""

    def narrow(self, axis: int, start: int, size: int) -> Part:
        """Indices [start, start + size) of `axis`."""
        shape = (*self.shape[:axis], size, *self.shape[axis + 1 :])
        return replace(self, shape=shape, first=self.first + start * self.strides[axis])

    def select(self, index: int) -> Part:
        """Index `index` of the first axis, which goes."""
        first = self.first + index * self.strides[0]
        return replace(self, shape=self.shape[1:], strides=self.strides[1:], first=first)

    def viewed(self, shape: Shape, strides: Shape) -> Part:
        """The same elements under another shape; only for a part that is row-major."""
        return replace(self, shape=shape, strides=strides)

    @property
    def is_row_major(self) -> bool:
        return self.strides == row_major_strides(self.shape)

    def chunk(self, offsets: Shape) -> Chunk:
        """The part as a chunk at `offsets` of a tensor."""
        strides = None if self.is_row_major else self.strides
        span = replace(self.record, skip=self.first * self.dtype.itemsize, strides=strides)
        return Chunk(Box(offsets, self.shape), span)


def divide(parts: dict[str, Part], sections: Mapping[str, Mapping[str, int]]) -> None:
    """Put in the place of each of `parts` that `sections` names its sections, one above the other,
    which have so many rows."""
    for whole, sizes in sections.items():
        at, part = 0, parts.pop(whole)
        for section, size in sizes.items():
            parts[f"{whole}.{section}"] = part.narrow(0, at, size)
            at += size


_CUTS = {
    "word_embeddings.weight": Cut.ROWS,
    "position_embeddings.weight": Cut.WHOLE,
    "output_layer.weight": Cut.ROWS,
    "output_layer.bias": Cut.ROWS,
    "linear_qkv.weight": Cut.ROWS,
    "linear_qkv.bias": Cut.ROWS,
    "linear_q.weight": Cut.ROWS,
    "linear_q.bias": Cut.ROWS,
    "linear_kv.weight": Cut.ROWS,
    "linear_kv.bias": Cut.ROWS,
    "linear_q_proj.weight": Cut.ROWS,
    "linear_q_up_proj.weight": Cut.ROWS,
    "linear_kv_up_proj.weight": Cut.ROWS,
    "linear_proj.weight": Cut.COLUMNS,
    "linear_proj.bias": Cut.WHOLE,
    "linear_fc1.weight": Cut.ROWS,
    "linear_fc1.bias": Cut.ROWS,
    "linear_fc2.weight": Cut.COLUMNS,
    "linear_fc2.bias": Cut.WHOLE,
    "core_attention.softmax_offset": Cut.ROWS,
    "linear_wq_b.weight": Cut.WHOLE,
    "linear_wk.weight": Cut.WHOLE,
    "linear_weights_proj.weight": Cut.WHOLE,
    "router.weight": Cut.WHOLE,
    "router.bias": Cut.WHOLE,
    "router.expert_bias": Cut.WHOLE,
    "router.local_tokens_per_expert": Cut.WHOLE,
    "router.global_tokens_per_expert": Cut.WHOLE,
    "router.ga_steps": Cut.WHOLE,
    "shared_experts.gate_weight": Cut.WHOLE,
    "fc1_latent_proj.weight": Cut.WHOLE,
    "fc2_latent_proj.weight": Cut.WHOLE,
    "eh_proj.weight": Cut.ROWS,
    **dict.fromkeys(
        (f"weight.{part}" for part in ("query", "key", "value", "z", "beta", "alpha")), Cut.ROWS
    ),
    **dict.fromkeys(
        (f"weight.{part}" for part in ("x", "B", "C", "dt", "_qkv", "_gate")), Cut.ROWS
    ),
    **dict.fromkeys((f"bias.{part}" for part in ("x", "B", "C")), Cut.ROWS),
    **dict.fromkeys((f"self_attention.{name}" for name in ("A_log", "dt_bias")), Cut.ROWS),
    **{
        f"{mixer}.{name}": Cut.ROWS
        for mixer in ("mixer", "mamba_mixer")
        for name in ("A_log", "D", "dt_bias")
    },
    "out_proj.weight": Cut.COLUMNS,
}
"""By the last two words of a name; norms are known by their name."""
_CUT_NORM = (".mixer.norm.weight", ".mamba_mixer.norm.weight")
"""Mamba norms heads in groups, of which each rank has its share."""


def how_cut(
    name: str, parts: Mapping[str, Part], ranks: int, args: Mapping[str, object]
) -> tuple[Cut, str | None]:
    """How tensor `name` is cut over `ranks` ranks, where rank 0 holds `parts`; or what is wrong.

    Shapes decide what names leave open: linear_fc1 is gated when its rows are twice the columns
    of its linear_fc2, and a latent attention's down projection is whole when its rows are what
    the up projection takes in.
    """
    module, _, parameter = name.rpartition(".")
    key = f"{module.rpartition('.')[2]}.{parameter}"
    if ranks > 1 and name.endswith(_CUT_NORM):
        return Cut.ROWS, None
    if ranks == 1 or "norm" in key or _is_of_whole_vision(name, parts):
        return Cut.WHOLE, None
    if key in ("linear_fc1.weight", "linear_fc1.bias"):
        return _fc1_cut(name, module, parts)
    if key in ("linear_q_down_proj.weight", "linear_kv_down_proj.weight"):
        return _down_cut(name, parts, ranks, args)
    if key == "output_layer.weight" and not _has_words(parts[name], parts, ranks, args):
        return Cut.WHOLE, None
    if (cut := _CUTS.get(key)) is not None:
        return cut, None
    return Cut.WHOLE, f"{name}: how it is cut over {ranks} tensor-parallel ranks is not known"


def _is_of_whole_vision(name: str, parts: Mapping[str, Part]) -> bool:
    """Whether every rank holds the whole of `name`: all that is of a module of transformers', which
    knows of no ranks, and what Megatron's vision models have before their layers
    (mbridge:mbridge/models/qwen3_vl/vision_model.py)."""
    if not name.startswith(VISION):
        return False
    if not any(other.startswith(MEGATRON_VISION) for other in parts):
        return True
    return name.startswith((VISION + "patch_embed.", VISION + "pos_embed."))


def _has_words(
    head: Part, parts: Mapping[str, Part], ranks: int, args: Mapping[str, object]
) -> bool:
    """Whether an output layer has a row per word, and not per label: then every rank holds it whole
    (mcore-bridge:src/mcore_bridge/model/gpt_model.py OutputLayerLinear)."""
    words = parts.get(EMBEDDING)
    rows = args.get("padded_vocab_size")
    if words is not None and words.shape:
        rows = words.shape[0] * ranks
    return not head.shape or type(rows) is not int or head.shape[0] * ranks == rows


def _fc1_cut(name: str, module: str, parts: Mapping[str, Part]) -> tuple[Cut, str | None]:
    fc2 = parts.get(module.removesuffix("1") + "2.weight")
    if fc2 is None or len(fc2.shape) != 2 or not parts[name].shape:
        return Cut.ROWS, f"{name}: no linear_fc2.weight beside it, so it cannot be told from gated"
    rows, columns = parts[name].shape[0], fc2.shape[1]
    if rows == 2 * columns:
        return Cut.GATED, None
    if rows == columns:
        return Cut.ROWS, None
    return Cut.ROWS, f"{name} has {rows} rows on a rank but its linear_fc2 has {columns} columns"


def _down_cut(
    name: str, parts: Mapping[str, Part], ranks: int, args: Mapping[str, object]
) -> tuple[Cut, str | None]:
    up = parts.get(name.replace("_down_proj", "_up_proj"))
    if up is None or len(up.shape) != 2 or len(parts[name].shape) != 2:
        return Cut.WHOLE, f"{name}: no up projection beside it, so how it is cut cannot be told"
    rows, wanted = parts[name].shape[0], up.shape[1]
    if "linear_kv" in name:
        rope = args.get("qk_pos_emb_head_dim")
        if type(rope) is not int:
            # The rotary part is far smaller than the latent: only a whole projection exceeds it.
            rope = (rows if rows > wanted else rows * ranks) - wanted
        wanted += rope
    if rows == wanted:
        return Cut.WHOLE, None
    if rows * ranks == wanted:
        return Cut.ROWS, None
    return Cut.WHOLE, f"{name} has {rows} rows on each of {ranks} ranks, expected {wanted} in all"


def joined(
    name: str, cut: Cut, parts: Sequence[tuple[str, Part]]
) -> tuple[StoredTensor | None, str | None]:
    """Tensor `name` from what each rank holds, in rank order; or what is wrong with it.

    `parts` are (where the rank's part was found, the part); only a first one that is WHOLE is read.
    """
    where, first = parts[0]
    for other, part in parts[1:]:
        if part.shape != first.shape or part.dtype != first.dtype:
            return None, (
                f"{name} is {first.dtype.torch} {list(first.shape)} in {where} but "
                f"{part.dtype.torch} {list(part.shape)} in {other}"
            )
    ranks = len(parts)
    axis = 1 if cut is Cut.COLUMNS else 0
    if cut is Cut.WHOLE or ranks == 1:
        return stored_tensor(
            name, first.dtype, first.shape, (first.chunk((0,) * len(first.shape)),)
        )
    if len(first.shape) <= axis:
        return None, f"{name} has shape {list(first.shape)}, which cannot be cut by {cut.value}"
    size = first.shape[axis]
    shape = (*first.shape[:axis], size * ranks, *first.shape[axis + 1 :])
    chunks: list[Chunk] = []
    for rank, (_, part) in enumerate(parts):
        if cut is Cut.GATED:
            half = size // 2
            rest = (0,) * (len(shape) - 1)
            gate, up = part.narrow(0, 0, half), part.narrow(0, half, half)
            chunks += [
                gate.chunk((rank * half, *rest)),
                up.chunk(((ranks + rank) * half, *rest)),
            ]
        else:
            chunks.append(
                part.chunk(tuple(rank * size if i == axis else 0 for i in range(len(shape))))
            )
    return stored_tensor(name, first.dtype, shape, tuple(chunks))
