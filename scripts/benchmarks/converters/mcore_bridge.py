"""ms-swift's mcore-bridge, as `swift export --to_hf` uses it (swift/megatron/convert.py)."""

from __future__ import annotations

import sys
from pathlib import Path

from scripts.benchmarks.converters import transformer_engine


def main(checkpoint: Path, model: Path, out: Path) -> None:
    transformer_engine.install()
    import torch
    from mcore_bridge import ModelConfig, get_mcore_model, hf_to_mcore_config
    from transformers import AutoConfig

    from scripts.benchmarks.converters.one_process import CudaMeansCpu, load, one_process

    with one_process(out.with_name("rendezvous")):
        config = ModelConfig(
            **hf_to_mcore_config(AutoConfig.from_pretrained(str(model))),
            use_cpu_initialization=True,
            perform_initialization=False,
            moe_grouped_gemm=True,
            params_dtype=torch.bfloat16,
        )
        models = get_mcore_model(config)
        load(models, checkpoint)
        with CudaMeansCpu():
            config.bridge.save_weights(models, str(out))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
