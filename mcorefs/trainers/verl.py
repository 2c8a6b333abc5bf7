"""verl: RL on Megatron-Core. Where its checkpoints are is in `steps`; this reads what is beside.

    transformer_config.json     the TransformerConfig as JSON; functions and None are left out
    huggingface/                config.json, tokenizer, ...; only if it was saved with a bridge

Layout facts: verl:verl/utils/checkpoint/megatron_checkpoint_manager.py.
"""

from __future__ import annotations

from mcorefs import steps
from mcorefs.formats import Checkpoint
from mcorefs.locate import Location
from mcorefs.trainers.base import Companions
from mcorefs.trainers.transformer_config import arguments


class Verl:
    """Known by the directories around the weights."""

    name = "verl"

    def read(self, location: Location, checkpoint: Checkpoint) -> Companions | None:
        role = steps.enclosing(location.path)
        if role is None:
            return None
        path = role.path / steps.TRANSFORMER_CONFIG
        config = steps.read_json(path)
        found = () if not role.huggingface.is_dir() else (role.huggingface,)
        if checkpoint.args:  # verl records none, but a later one may
            args, source = checkpoint.args, checkpoint.args_source
        elif config is None:
            args, source = {}, f"there is no {path}"
        else:
            args, source = arguments(config), str(path)
        return Companions(self.name, args, source, hf_directories=found)
