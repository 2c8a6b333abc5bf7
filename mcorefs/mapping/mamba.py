"""The sizes of Mamba mixers, of which all but one are proven by their tensors.

With n heads of size d, g groups and a state of s
(Megatron-LM:megatron/core/ssm/mamba_mixer.py MambaMixer):

    in_proj    [2 * n * d + 2 * g * s + n, hidden]   z, x, B, C, dt
    conv1d     [n * d + 2 * g * s, 1, kernel]        x, B, C
    A_log      [n]
    out_proj   [hidden, n * d]
"""

from __future__ import annotations

from collections.abc import Mapping

from mcorefs.boxes import Shape
from mcorefs.mapping.reference import Reference
from mcorefs.views import View

_PLACES = ("mixer.", "mamba_mixer.")
"""Where in its layer a mixer is: alone, or beside attention."""
CLAIMS: Mapping[str, tuple[str, ...]] = {
    "mamba_heads": ("mamba_num_heads",),
    "mamba_head_dim": ("mamba_head_dim",),
    "mamba_state": ("mamba_state_dim",),
    "mamba_kernel": ("d_conv",),
}
"""Arguments that state these sizes."""


def mamba_sizes(
    layer: Mapping[str, View],
    args: Mapping[str, object],
    reference: Reference,
    problems: list[str],
) -> dict[str, int]:
    """mamba_heads, mamba_head_dim, mamba_inner (both together), mamba_in and mamba_mixed (rows of
    in_proj and of conv1d), mamba_kernel, mamba_groups and mamba_state, of which only the product
    shows: the number of groups comes from the arguments, or from a reference config.

    `layer`: tensors by their names inside a layer. Empty where there is no Mamba, and where a
    tensor is missing, which planning will tell.
    """

    def shape(*names: str, axes: int) -> Shape | None:
        named = (layer.get(at + name) for at in _PLACES for name in names)
        views = (view for view in named if view is not None)
        return next((view.shape for view in views if len(view.shape) == axes), None)

    heads = shape("A_log", axes=1)
    into = shape("in_proj.weight.joined", "in_proj.weight", axes=2)
    mixed = shape("conv1d.weight.joined", "conv1d.weight", axes=3)
    out = shape("out_proj.weight", axes=2)
    if heads is None or into is None or mixed is None or out is None:
        return {}
    (count,), rows, conv, inner = heads, into[0], mixed[0], out[1]
    read, rest = divmod(conv - inner, 2)
    if rest or read < 1 or not count or inner % count or rows != inner + conv + count:
        problems.append(
            f"in_proj has {rows} rows, conv1d {conv}, out_proj {inner} columns and A_log {count} "
            "elements, which no number of Mamba heads explains"
        )
        return {}
    found = {
        "mamba_heads": count,
        "mamba_head_dim": inner // count,
        "mamba_inner": inner,
        "mamba_in": rows,
        "mamba_mixed": conv,
        "mamba_kernel": mixed[2],
    }
    stated = (reference.config.get(name) for name in ("n_groups", "mamba_n_groups"))
    groups = args.get("mamba_num_groups", next(filter(None, stated), None))
    if type(groups) is not int or groups < 1:
        problems.append(
            "mamba_num_groups is recorded nowhere in the checkpoint; pass --hf-config with the "
            "directory of the model it was trained from"
        )
        return found
    if read % groups or count % groups:
        problems.append(
            f"the states of {count} Mamba heads are {read} wide in all, which {groups} groups do "
            "not explain"
        )
        return found
    return {**found, "mamba_groups": groups, "mamba_state": read // groups}
