"""Classes of models that transformers has none of, in the place of the code that the hub has.

MiMo: Qwen2, and layers for multi-token prediction that are given the hidden state first, and then
the embedding of the next token: megatron-core has them the other way round, and Megatron-Bridge:
src/megatron/bridge/models/mimo/mimo_bridge.py swaps the halves of input_proj. Names: there too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm


class MiMoConfig(Qwen2Config):  # type: ignore[misc]
    model_type = "mimo"
    num_nextn_predict_layers: int = 0
    attention_bias: bool = True


class _MtpLayer(nn.Module):
    def __init__(self, config: MiMoConfig) -> None:
        super().__init__()
        layer = Qwen2DecoderLayer(config, 0)
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.token_layernorm, self.hidden_layernorm = (
            Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(2)
        )
        self.input_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.final_layernorm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn, self.mlp = layer.self_attn, layer.mlp

    def forward(self, embedded: Tensor, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        both = torch.cat([self.hidden_layernorm(hidden), self.token_layernorm(embedded)], -1)
        made = self.input_proj(both)
        made = made + self.self_attn(self.input_layernorm(made), rope, None)[0]
        made = made + self.mlp(self.post_attention_layernorm(made))
        found: Tensor = self.final_layernorm(made)
        return found


class MiMoForCausalLM(Qwen2ForCausalLM):  # type: ignore[misc]
    config_class = MiMoConfig

    def __init__(self, config: MiMoConfig) -> None:
        super().__init__(config)
        count = config.num_nextn_predict_layers
        self.model.mtp_layers = nn.ModuleList(_MtpLayer(config) for _ in range(count))
        self.post_init()

    def predictions(self, tokens: Tensor, hidden: Tensor) -> Iterator[Tensor]:
        """The logits that each layer for multi-token prediction makes of `hidden`, what comes out
        of the decoder, and the tokens behind."""
        for layer in self.model.mtp_layers:
            tokens, hidden = tokens[:, 1:], hidden[:, :-1]
            places = torch.arange(tokens.shape[1])[None]
            rope = self.model.rotary_emb(hidden, places)
            hidden = layer(self.model.embed_tokens(tokens), hidden, rope)
            yield self.lm_head(hidden)


def register() -> None:
    """So that transformers' Auto classes know them."""
    AutoConfig.register("mimo", MiMoConfig, exist_ok=True)
    AutoModelForCausalLM.register(MiMoConfig, MiMoForCausalLM, exist_ok=True)
