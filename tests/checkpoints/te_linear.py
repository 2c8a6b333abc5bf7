"""What a linear layer of TransformerEngine is to a checkpoint, for a machine without that."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

StateDict = dict[str, Any]


class TELinear(MegatronModule):  # type: ignore[misc]
    """TransformerEngine's linear layer as every tensor-parallel rank holds it whole."""

    def __init__(
        self, input_size: int, output_size: int, config: Any, is_expert: bool, **_: Any
    ) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        self.parallel_mode = None
        self._tp_group = (
            parallel_state.get_expert_tensor_parallel_group()
            if is_expert
            else parallel_state.get_tensor_model_parallel_group()
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> StateDict:
        state = self.state_dict(prefix="", keep_vars=True)
        found: StateDict = make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            None,
            sharded_offsets,
            tp_group=self._tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return found
