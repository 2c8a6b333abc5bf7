"""Adapters made and merged by PEFT itself, in a process of its own: it is installed apart from the
rest (scripts/trainers.txt), since transformers behaves otherwise where there is peft.

    python -m tests.peft_runs OUT < {"name": [base directory, dtype, class, settings], ...}

writes OUT/name/adapter (save_pretrained; autocast=False: in the model's dtype) and, unless settings
have merges=False, OUT/name/merged: what PeftModel.from_pretrained(...).merge_and_unload() makes of
the base model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(sys.prefix) / "trainers"))


def loaded(base: str, dtype: str, kind: str) -> Any:
    import transformers

    return getattr(transformers, kind).from_pretrained(base, dtype=dtype)


def run(out: Path, base: str, dtype: str, kind: str, settings: dict[str, Any]) -> None:
    """Make an adapter, and merge it unless `settings` say otherwise."""
    from peft import LoraConfig, PeftModel, get_peft_model

    merges, is_cast = settings.pop("merges", True), settings.pop("autocast", True)
    config = LoraConfig(**settings)
    model = get_peft_model(loaded(base, dtype, kind), config, autocast_adapter_dtype=is_cast)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                # Products of such values are summed exactly, in whatever order.
                values = torch.randint(-15, 16, parameter.shape, generator=generator) / 32.0
                parameter.copy_(values)
    model.save_pretrained(out / "adapter")
    if merges:
        merged = PeftModel.from_pretrained(loaded(base, dtype, kind), out / "adapter")
        merged.merge_and_unload().save_pretrained(out / "merged", max_shard_size="1GB")


def main() -> None:
    out = Path(sys.argv[1])
    for name, (base, dtype, kind, settings) in json.load(sys.stdin).items():
        run(out / name, base, dtype, kind, settings)


if __name__ == "__main__":
    main()
