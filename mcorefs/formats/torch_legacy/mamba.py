"""The layers that a Mamba mixer holds as one, under the names that torch_dist gives their parts.

Each tensor-parallel rank has its share of the rows of each part, one part after the other
(Megatron-LM:megatron/core/ssm/mamba_mixer.py MambaMixer.sharded_state_dict). The parameters of its
convolution are its own since megatron-core 0.18 (conv1d_weight), before that those of a module in
it (conv1d.weight), as they are called in torch_dist to this day.
"""

from __future__ import annotations

from collections.abc import Mapping

from mcorefs.formats.torch_legacy.tensor_parallel import Part, divide

_D = (".mixer.D", ".mamba_mixer.D")
"""Alone in its layer, or beside attention."""


def divided(parts: Mapping[str, Part], problems: list[str]) -> dict[str, Part]:
    """`parts` of one rank, with in_proj and conv1d of Mamba mixers divided."""
    found = dict(parts)
    for name in parts:
        if name.endswith(_D):
            module = name.removesuffix("D")
            for parameter in ("weight", "bias"):
                if (own := found.pop(f"{module}conv1d_{parameter}", None)) is not None:
                    found[f"{module}conv1d.{parameter}"] = own
            divide(found, _sections(module, found, problems))
    return found


def _sections(
    module: str, parts: Mapping[str, Part], problems: list[str]
) -> dict[str, dict[str, int]]:
    """Rows of each section of what is to be divided, by its name.

    Rows of z and x are the columns of out_proj, and there is one of dt per head; B and C have what
    is left of the convolution, half each.
    """
    names = [f"{module}{name}.weight" for name in ("in_proj", "conv1d", "out_proj")]
    heads = parts.get(f"{module}A_log")
    matrices = all(name in parts and len(parts[name].shape) > 1 for name in names)
    if heads is None or not heads.shape or not matrices:
        return {}  # not megatron-core's module
    (rows, *_), (mixed, *_), (_, inner, *_) = (parts[name].shape for name in names)
    read, rest = divmod(mixed - inner, 2)
    if rest or read < 1 or rows != mixed + inner + heads.shape[0]:
        problems.append(
            f"{names[0]} has {rows} rows on a rank and {names[1]} {mixed}, which {inner} columns "
            f"of out_proj and {heads.shape[0]} heads do not explain"
        )
        return {}
    mixer = {"x": inner, "B": read, "C": read}
    sections = {names[0]: {"z": inner, **mixer, "dt": heads.shape[0]}, names[1]: mixer}
    bias = f"{module}conv1d.bias"
    if bias in parts and parts[bias].shape == (mixed,):
        sections[bias] = mixer
    return sections
