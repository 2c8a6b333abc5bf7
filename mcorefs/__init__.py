"""Mount Megatron-Core checkpoints as Hugging Face models, without converting them.

    with mcorefs.open("ckpt/") as checkpoint:
        checkpoint.get_tensor("model.embed_tokens.weight")

The command line is `mcorefs --help`; how the parts fit together is in ARCHITECTURE.md.
"""

from mcorefs.api import Checkpoint, TensorSlice, open  # noqa: A004
from mcorefs.errors import (
    CheckpointError,
    MappingError,
    McorefsError,
    MountError,
    OutputError,
    ReadFault,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "MappingError",
    "McorefsError",
    "MountError",
    "OutputError",
    "ReadFault",
    "TensorSlice",
    "open",
]
