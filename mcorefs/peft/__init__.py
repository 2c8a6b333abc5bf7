"""LoRA adapters in PEFT's format, merged into Hugging Face tensors.

    adapter_config.json          r, lora_alpha, rank_pattern, alpha_pattern, use_rslora, ...
    adapter_model.safetensors    base_model.model.{module}.lora_A.weight          [r, in]
                                 base_model.model.{module}.lora_B.weight          [out, r]
                                 base_model.model.{module}.lora_embedding_{A,B}   of an embedding
                                 base_model.model.{parameter}                     trained whole

ms-swift writes them with --save_safetensors, Megatron-Bridge as `hf` of an iteration and with
save_hf_adapter, PEFT and trl themselves. {module}.weight becomes W + scale * (B @ A), rounded as
peft.PeftModel.from_pretrained(...).merge_and_unload() does where nothing else is asked of it: it
computes in float32, and rounds the sum once. Sources: peft:src/peft/tuners/lora/{layer,config}.py
and utils/{save_and_load,other}.py; mcore-bridge:src/mcore_bridge/bridge/gpt_bridge.py
(peft_format); Megatron-Bridge:src/megatron/bridge/models/conversion/peft_bridge.py.
"""

from __future__ import annotations

from mcorefs.peft.files import NAME, PeftAdapter, is_adapter, read_adapter
from mcorefs.peft.merging import Base, merge, untied

__all__ = ["NAME", "Base", "PeftAdapter", "is_adapter", "merge", "read_adapter", "untied"]
