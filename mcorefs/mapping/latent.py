"""The sizes of multi-latent attention, which its matrices prove without any argument.

With n heads (Megatron-LM:megatron/core/transformer/multi_latent_attention.py):

    linear_q_proj        [n * (nope + rope), hidden]       without a latent for queries
    linear_q_down_proj   [q_lora, hidden]                  with one
    linear_q_up_proj     [n * (nope + rope), q_lora]
    linear_kv_down_proj  [kv_lora + rope, hidden]
    linear_kv_up_proj    [n * (nope + v), kv_lora]
    linear_proj          [hidden, n * v]
"""

from __future__ import annotations

from collections.abc import Mapping

from mcorefs.boxes import Shape
from mcorefs.views import View

CLAIMS: Mapping[str, tuple[str, ...]] = {
    "q_lora": ("q_lora_rank",),
    "kv_lora": ("kv_lora_rank",),
    "qk_nope": ("qk_head_dim",),
    "qk_rope": ("qk_pos_emb_head_dim",),
    "v_head": ("v_head_dim",),
    "index_heads": ("dsa_indexer_n_heads",),
    "index_dim": ("dsa_indexer_head_dim",),
}
"""Arguments that state these sizes."""


def latent_sizes(
    layer: Mapping[str, View], args: Mapping[str, object], problems: list[str]
) -> dict[str, int]:
    """heads, q_lora, kv_lora, qk_nope, qk_rope, v_head, and rows of the projections:
    q_rows, kv_rows (of linear_kv_up_proj), kv_down_rows, v_rows (columns of linear_proj).

    `layer`: tensors by their names inside a layer. Empty for another kind of attention, and where
    a matrix is missing, which planning will tell.
    """

    def shape(name: str) -> Shape | None:
        view = layer.get(f"self_attention.{name}.weight")
        return view.shape if view is not None and len(view.shape) == 2 else None

    kv_down, kv_up, proj = map(shape, ("linear_kv_down_proj", "linear_kv_up_proj", "linear_proj"))
    direct, q_up = shape("linear_q_proj"), shape("linear_q_up_proj")
    q = direct or q_up
    if kv_down is None or kv_up is None or proj is None or q is None:
        return {}
    found = {"q_rows": q[0], "kv_rows": kv_up[0], "kv_down_rows": kv_down[0], "v_rows": proj[1]}
    if direct is None and q_up is not None:
        found["q_lora"] = q_up[1]
    elif "q_lora_rank" in args:
        problems.append(
            f"q_lora_rank is {args['q_lora_rank']} in the training arguments but the queries of "
            "the checkpoint have no latent (it holds linear_q_proj)"
        )
    nope_rows, kv_lora = kv_up[0] - proj[1], kv_up[1]
    rope_rows, rope = q[0] - nope_rows, kv_down[0] - kv_lora
    heads = rope_rows // rope if rope > 0 else 0
    if heads <= 0 or nope_rows <= 0 or any(n % heads for n in (rope_rows, nope_rows, proj[1])):
        problems.append(
            f"queries have {q[0]} rows, linear_kv_up_proj {kv_up[0]}, linear_kv_down_proj "
            f"{kv_down[0]} and linear_proj {proj[1]} columns, which no number of heads explains"
        )
        return found
    sizes = {"qk_nope": nope_rows // heads, "qk_rope": rope, "v_head": proj[1] // heads}
    return {**found, **sizes, "heads": heads, "kv_lora": kv_lora}


INDEXERS = ("self_attention.core_attention.indexer.linear_", "self_attention.")
"""Where the projections of an indexer may be, up to their names: megatron-core's, and slime's."""


def indexer_sizes(layer: Mapping[str, View]) -> dict[str, int]:
    """index_heads, index_dim and index_rows (of wq_b) of sparse attention; empty without.

    wk has a row per element of a head, weights_proj one per head
    (Megatron-LM:megatron/core/transformer/experimental_attention_variant/dsa.py).
    """
    for at in INDEXERS:
        keys, weights = (layer.get(f"{at}{name}.weight") for name in ("wk", "weights_proj"))
        if keys is not None and weights is not None and keys.shape and weights.shape:
            dim, heads = keys.shape[0], weights.shape[0]
            return {"index_dim": dim, "index_heads": heads, "index_rows": heads * dim}
    return {}
