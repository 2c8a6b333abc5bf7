"""The linear layers that a gated delta net holds as one, under the names that torch_dist gives
their parts.

Each tensor-parallel rank has its share of the rows of each part, one part after the other
(Megatron-LM:megatron/core/ssm/gated_delta_net.py GatedDeltaNet.sharded_state_dict).
"""

from __future__ import annotations

from collections.abc import Mapping

from mcorefs.formats.torch_legacy.tensor_parallel import Part, divide

_A_LOG = ".self_attention.A_log"


def divided(parts: Mapping[str, Part], problems: list[str]) -> dict[str, Part]:
    """`parts` of one rank, with in_proj and conv1d of gated delta nets divided."""
    found = dict(parts)
    for name in parts:
        if name.endswith(_A_LOG):
            module = name.removesuffix(".A_log")
            divide(found, _sections(module, parts, problems))
    return found


def _sections(
    module: str, parts: Mapping[str, Part], problems: list[str]
) -> dict[str, dict[str, int]]:
    """Rows of each section of what is to be divided, by its name.

    Rows of values are the columns of out_proj, and there is one of beta and alpha per value head.
    """
    names = [f"{module}.{name}.weight" for name in ("in_proj", "conv1d", "out_proj")]
    if not all(name in parts and len(parts[name].shape) > 1 for name in names):
        return {}  # not megatron-core's module
    (rows, *_), (mixed, *_), (_, values, *_) = (parts[name].shape for name in names)
    heads = parts[module + ".A_log"].shape[0] if parts[module + ".A_log"].shape else 0
    keys, rest = divmod(mixed - values, 2)
    if rest or keys < 1 or rows != mixed + values + 2 * heads:
        problems.append(
            f"{names[0]} has {rows} rows on a rank and {names[1]} {mixed}, which {values} columns "
            f"of out_proj and {heads} value heads do not explain"
        )
        return {}
    mixer = {"query": keys, "key": keys, "value": values}
    return {names[0]: {**mixer, "z": values, "beta": heads, "alpha": heads}, names[1]: mixer}
