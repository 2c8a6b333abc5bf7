"""The tables of README.md, made from the registries and from what the tests' fixtures prove.

`python scripts/tables.py` writes them; a test sees that they are up to date.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mcorefs.formats import FORMATS, HUGGINGFACE  # noqa: E402
from mcorefs.mapping.families import FAMILIES  # noqa: E402
from mcorefs.trainers import TRAINERS  # noqa: E402
from tests.checkpoints import SPECS, Spec  # noqa: E402

BEGIN = "<!-- tables: made by scripts/tables.py, checked by the tests -->"
END = "<!-- end of tables -->"

WRITTEN_BY = {
    "torch_dist": "megatron-core's dist_checkpointing, 0.7 to 0.19+ (with and without `common.pt`)",
    "torch": "Megatron-LM's `mp_rank_*` directories (TP, PP, VPP, EP, ETP); NeMo 1's ranks",
    "fsdp_dtensor": "Megatron-FSDP, and FSDP2 (`torch_dcp`)",
    "zarr": "megatron-core's dist_checkpointing up to 0.15; compressed since, with `numcodecs`",
    "huggingface": "a directory of safetensors: passed through as it is",
}


def tables() -> str:
    return "\n".join([*_formats(), "", *_trainers(), "", *_families()])


def _formats() -> Iterator[str]:
    yield "| format | written by |"
    yield "|---|---|"
    for format_ in (*FORMATS, HUGGINGFACE):
        yield f"| `{format_.name}` | {WRITTEN_BY[format_.name]} |"


def _trainers() -> Iterator[str]:
    names = ", ".join(trainer.name for trainer in TRAINERS)
    yield "Settings, base model and tokenizer are taken from what these leave beside the weights:"
    yield f"{names}."


def _families() -> Iterator[str]:
    """Families by formats, with the parallel layouts of the fixtures that prove each."""
    formats = list(dict.fromkeys(spec.format for spec in SPECS.values()))
    families = sorted(FAMILIES, key=lambda family: family.name)
    yield f"{len(families)} model families:"
    yield from textwrap.wrap(", ".join(f"`{family.name}`" for family in families) + ".", 100)
    yield ""
    yield "Written by the real megatron-core, they come out byte for byte as `save_pretrained`"
    yield "wrote the model that they were made from."
    yield ""
    yield "<details><summary>The parallel layouts that prove each family</summary>"
    yield ""
    yield "*If named*: by the trainer, `--hf-config` or `--family`, since nothing else in a"
    yield "checkpoint tells them from another family, or from none."
    yield ""
    yield f"| family | {' | '.join(f'`{name}`' for name in formats)} |"
    yield f"|---|{'---|' * len(formats)}"
    for family in families:
        cells = [_layouts(family.name, name) for name in formats]
        name = f"`{family.name}`" + (", if named" if family.named_only else "")
        yield f"| {family.architecture} ({name}) | {' | '.join(cells)} |"
    yield ""
    yield "</details>"


def _layouts(family: str, format_: str) -> str:
    proven = [
        _layout(spec)
        for spec in SPECS.values()
        if spec.family == family and spec.format == format_ and spec.is_whole
    ]
    return "; ".join(dict.fromkeys(proven)) or "-"


def _layout(spec: Spec) -> str:
    sizes = {"TP": spec.tp, "PP": spec.pp, "VPP": spec.vpp, "EP": spec.ep, "CP": spec.cp}
    sizes["DP"] = spec.dp
    parts = [f"{name}{size}" for name, size in sizes.items() if size is not None and size > 1]
    if spec.etp is not None and spec.etp != spec.tp:
        parts.append(f"ETP{spec.etp}")
    return " ".join(parts) or "one rank"


def updated(readme: str) -> str:
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text()))
