"""NVIDIA's Megatron-Bridge: `AutoBridge.export_ckpt`, which its documentation has people call.

It wants the run_config.yaml that its own training leaves in a checkpoint, so the checkpoint that
it is shown has one: `--prepare MODEL FILE` writes it, and is not timed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.benchmarks.converters import transformer_engine


def main(checkpoint: Path, model: Path, out: Path) -> None:
    transformer_engine.install()
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(str(model))
    bridge.export_ckpt(str(checkpoint), str(out), show_progress=False)


def prepare(model: Path, file: Path) -> None:
    transformer_engine.install()
    import yaml
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.utils.config_utils import _ConfigContainerBase
    from megatron.bridge.utils.yaml_utils import safe_yaml_representers

    provider = AutoBridge.from_hf_pretrained(str(model)).to_megatron_provider(load_weights=False)
    provider.moe_permute_fusion = False  # a kernel of TransformerEngine
    with safe_yaml_representers(), file.open("w") as stream:
        yaml.safe_dump({"model": _ConfigContainerBase._convert_value_to_dict(provider)}, stream)


if __name__ == "__main__":
    if sys.argv[1] == "--prepare":
        prepare(*map(Path, sys.argv[2:]))
    else:
        main(*map(Path, sys.argv[1:]))
