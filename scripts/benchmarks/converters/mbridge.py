"""ISEEKYAN's mbridge, which verl and slime call: a model, its weights, `save_weights`."""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.benchmarks.converters import transformer_engine


def main(checkpoint: Path, model: Path, out: Path) -> None:
    transformer_engine.install()
    from mbridge import AutoBridge

    from scripts.benchmarks.converters.one_process import load, one_process

    with one_process(out.with_name("rendezvous")):
        bridge = AutoBridge.from_pretrained(str(model))
        bridge.set_extra_args(use_cpu_initialization=True, perform_initialization=False)
        models = bridge.get_model(use_cpu_initialization=True)
        load(models, checkpoint)
        bridge.safetensor_io = bridge._get_safetensor_io(str(model))  # as its load_weights does
        bridge.save_weights(models, str(out), memory_efficient=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
