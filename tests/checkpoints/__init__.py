"""Real Megatron-Core checkpoints for tests, with the Hugging Face model each was made from.

    from tests.checkpoints import ensure
    fixture = ensure(["qwen3"])["qwen3"]
    fixture.root       what a user points mcorefs at: tracker file and iter_* directory
    fixture.hf         what `save_pretrained` wrote: the right answer
    fixture.tokenizer  a real tokenizer, named by the checkpoint's args

`python -m tests.checkpoints --list` shows the catalogue. Importing this package is cheap: torch,
transformers and megatron-core are only imported by the writer process (`launcher`).
"""

from .families import SPECS
from .pool import Fixture, ensure, ensure_specs, write
from .spec import ADAPTED, HEADED, PADDING_VALUE, Spec

__all__ = [
    "ADAPTED",
    "HEADED",
    "PADDING_VALUE",
    "SPECS",
    "Fixture",
    "Spec",
    "ensure",
    "ensure_specs",
    "write",
]
