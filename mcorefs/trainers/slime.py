"""slime: RL on Megatron-LM, whose checkpoints it writes; one argument more says what was trained.

slime:slime/utils/arguments.py --hf-checkpoint: the directory (or the hub's name) of the Hugging
Face model with config.json and tokenizer. slime:tools/convert_hf_to_torch_dist.py calls the one
iteration that it makes `release`.
"""

from __future__ import annotations

import os
from pathlib import Path

from mcorefs.formats import Checkpoint
from mcorefs.locate import Location
from mcorefs.trainers.base import Companions


class Slime:
    """Known by its argument."""

    name = "slime"

    def read(self, location: Location, checkpoint: Checkpoint) -> Companions | None:
        named = checkpoint.args.get("hf_checkpoint")
        if not isinstance(named, str) or not named:
            return None
        directories: tuple[Path, ...] = ()
        remarks: tuple[str, ...] = ()
        if os.path.isabs(named) and Path(named).is_dir():
            directories = (Path(named),)
        else:
            remarks = (
                f"it was trained from {named!r}, which is not on this machine; where config or "
                "tokenizer are wanting, give that model with --hf-config DIR",
            )
        return Companions(
            self.name,
            checkpoint.args,
            checkpoint.args_source,
            hf_directories=directories,
            remarks=remarks,
        )
