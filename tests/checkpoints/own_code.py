"""Classes of models that transformers has none of, in the place of the code that the hub has.

MiMo: Qwen2, and layers for multi-token prediction that are given the hidden state first, and then
the embedding of the next token: megatron-core has them the other way round, and Megatron-Bridge:
src/megatron/bridge/models/mimo/mimo_bridge.py swaps the halves of input_proj. Names: there too.

Bailing MoE v2: what GLM-4.5 computes, under other names, each expert a module. Names, and the order
of modules: Megatron-Bridge:src/megatron/bridge/models/bailing/.

Step-3.5: transformers has the language model of Step-3.7, which is the same, and its config, which
reads that of Step-3.5; but its layers hold their experts under other names. Names: Megatron-Bridge:
src/megatron/bridge/models/stepfun/step35_bridge.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeMLP,
    Glm4MoeRMSNorm,
    Glm4MoeRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import (
    Step3p7Attention,
    Step3p7MLP,
    Step3p7PreTrainedModel,
    Step3p7RMSNorm,
    Step3p7RotaryEmbedding,
)


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


class BailingMoeV2Config(LlamaConfig):  # type: ignore[misc]
    model_type = "bailing_moe_v2"
    num_experts: int = 0
    num_experts_per_tok: int = 0
    num_shared_experts: int = 0
    num_nextn_predict_layers: int = 0
    moe_intermediate_size: int = 0
    first_k_dense_replace: int = 0
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    use_qkv_bias: bool = False


class _Attention(nn.Module):
    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__()
        size, groups = config.head_dim, config.num_key_value_heads
        self.heads = [config.num_attention_heads, groups, groups]
        self.query_key_value = nn.Linear(
            config.hidden_size, sum(self.heads) * size, bias=config.use_qkv_bias
        )
        self.query_layernorm = Glm4MoeRMSNorm(size, eps=config.rms_norm_eps)
        self.key_layernorm = Glm4MoeRMSNorm(size, eps=config.rms_norm_eps)
        self.dense = nn.Linear(self.heads[0] * size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        rows = self.query_key_value(hidden).unflatten(-1, (sum(self.heads), -1)).transpose(1, 2)
        q, k, v = rows.split(self.heads, dim=1)
        q, k = apply_rotary_pos_emb(self.query_layernorm(q), self.key_layernorm(k), *rope)
        made = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        found: Tensor = self.dense(made.transpose(1, 2).flatten(2))
        return found


class _Gate(nn.Module):
    expert_bias: Tensor

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, experts]: how much of each expert."""
        config = self.config
        scores = linear(hidden.float(), self.weight.float()).sigmoid()
        wanted = (scores + self.expert_bias).view(*hidden.shape[:-1], config.n_group, -1)
        best = wanted.topk(2, dim=-1).values.sum(-1).topk(config.topk_group).indices
        kept = torch.zeros_like(wanted[..., 0]).scatter(-1, best, 1.0).bool()[..., None]
        chosen = wanted.masked_fill(~kept, -torch.inf).flatten(-2).topk(config.num_experts_per_tok)
        shares = scores.gather(-1, chosen.indices)
        if config.num_experts_per_tok > 1:
            shares = shares / shares.sum(-1, keepdim=True)
        shares = shares * config.routed_scaling_factor
        return torch.zeros_like(scores).scatter(-1, chosen.indices, shares)


class _Experts(nn.Module):
    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__()
        width = config.moe_intermediate_size
        self.experts = nn.ModuleList(Glm4MoeMLP(config, width) for _ in range(config.num_experts))
        self.gate = _Gate(config)
        self.shared_experts = Glm4MoeMLP(config, width * config.num_shared_experts)

    def forward(self, hidden: Tensor) -> Tensor:
        shares = self.gate(hidden).to(hidden.dtype)
        made: Tensor = self.shared_experts(hidden)
        for number, expert in enumerate(self.experts):
            made = made + expert(hidden) * shares[..., number, None]
        return made


class _Layer(nn.Module):
    def __init__(self, config: BailingMoeV2Config, number: int) -> None:
        super().__init__()
        self.attention = _Attention(config)
        is_dense = number < config.first_k_dense_replace
        self.mlp = Glm4MoeMLP(config) if is_dense else _Experts(config)
        self.input_layernorm = Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        hidden = hidden + self.attention(self.input_layernorm(hidden), rope)
        found: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return found


class _MtpBehind(nn.Module):
    """Its modules lie in another order than those of a layer of the decoder."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.enorm = Glm4MoeRMSNorm(size, eps), Glm4MoeRMSNorm(size, eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.post_attention_layernorm = Glm4MoeRMSNorm(size, eps)
        self.attention, self.mlp = _Attention(config), _Experts(config)
        self.hnorm, self.final_layernorm = Glm4MoeRMSNorm(size, eps), Glm4MoeRMSNorm(size, eps)

    def forward(self, embedded: Tensor, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        made = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1))
        made = made + self.attention(self.input_layernorm(made), rope)
        made = made + self.mlp(self.post_attention_layernorm(made))
        found: Tensor = self.final_layernorm(made)
        return found


class BailingMoeV2ForCausalLM(PreTrainedModel):  # type: ignore[misc]
    config_class = BailingMoeV2Config
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = ("expert_bias",)
    model: Any

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__(config)
        count = config.num_hidden_layers
        self.model = nn.Module()
        self.model.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(_Layer(config, number) for number in range(count))
        for _ in range(config.num_nextn_predict_layers):
            self.model.layers.append(_MtpBehind(config))
        self.model.norm = Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.model.rotary_emb = Glm4MoeRotaryEmbedding(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.model.word_embeddings
        return found

    def _rope(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.model.rotary_emb(
            hidden, torch.arange(hidden.shape[1])[None]
        )
        return found

    def forward(self, input_ids: Tensor, **_: object) -> CausalLMOutputWithPast:
        hidden = self.model.word_embeddings(input_ids)
        for layer in self.model.layers[: self.config.num_hidden_layers]:
            hidden = layer(hidden, self._rope(hidden))
        hidden = self.model.norm(hidden)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden), hidden_states=(hidden,))

    def predictions(self, tokens: Tensor, hidden: Tensor) -> Iterator[Tensor]:
        """As of MiMoForCausalLM."""
        for layer in self.model.layers[self.config.num_hidden_layers :]:
            tokens, hidden = tokens[:, 1:], hidden[:, :-1]
            hidden = layer(self.model.word_embeddings(tokens), hidden, self._rope(hidden))
            yield self.lm_head(hidden)


class Step3p5Config(Step3p7TextConfig):  # type: ignore[misc]
    """Layers with a window may have another number of groups, too, as in the hub's code."""

    def __post_init__(self, **kwargs: Any) -> None:
        other = kwargs.get("attention_other_setting")
        if other and self.layer_types:
            own = {
                "num_attention_heads": other["num_attention_heads"],
                "num_key_value_heads": other["num_attention_groups"],
            }
            kwargs["per_layer_config"] = {
                layer: own
                for layer, kind in enumerate(self.layer_types)
                if kind == "sliding_attention"
            }
        super().__post_init__(**kwargs)


class _OfAllExperts(nn.Module):
    def __init__(self, experts: int, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, rows, columns))


class _StepExperts(nn.Module):
    def __init__(self, config: Step3p5Config, limit: float) -> None:
        super().__init__()
        self.config, self.limit = config, limit or torch.inf
        count, width = config.n_routed_experts, config.moe_intermediate_size
        self.router_bias = nn.Parameter(torch.zeros(count), requires_grad=False)
        self.gate = nn.Linear(config.hidden_size, count, bias=False)
        self.up_proj = _OfAllExperts(count, width, config.hidden_size)
        self.gate_proj = _OfAllExperts(count, width, config.hidden_size)
        self.down_proj = _OfAllExperts(count, config.hidden_size, width)

    def forward(self, hidden: Tensor) -> Tensor:
        scores = linear(hidden.float(), self.gate.weight.float()).sigmoid()
        chosen = (scores + self.router_bias).topk(self.config.num_experts_per_tok).indices
        shares = scores.gather(-1, chosen)
        shares = shares / shares.sum(-1, keepdim=True) * self.config.moe_router_scaling_factor
        shares = torch.zeros_like(scores).scatter(-1, chosen, shares).to(hidden.dtype)
        made = torch.zeros_like(hidden)
        for number in range(shares.shape[-1]):
            gate = linear(hidden, self.gate_proj.weight[number]).sigmoid()
            gate = gate * linear(hidden, self.gate_proj.weight[number])
            up = linear(hidden, self.up_proj.weight[number]).clamp(-self.limit, self.limit)
            one = linear(gate.clamp(max=self.limit) * up, self.down_proj.weight[number])
            made = made + one * shares[..., number, None]
        return made


class _StepLayer(nn.Module):
    def __init__(self, config: Step3p5Config, number: int) -> None:
        super().__init__()
        self.self_attn = Step3p7Attention(config.per_layer_config[number], number)
        self.self_attn.config = config
        self.kind = config.layer_types[number]
        self.is_sparse = config.mlp_layer_types[number] == "sparse"
        if self.is_sparse:
            self.moe = _StepExperts(config, config.swiglu_limits[number])
            self.share_expert = Step3p7MLP(config, number, is_shared_expert=True)
        else:
            self.mlp = Step3p7MLP(config, number)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = Step3p7RMSNorm(size, eps)
        self.post_attention_layernorm = Step3p7RMSNorm(size, eps)

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rope, mask)[0]
        normed = self.post_attention_layernorm(hidden)
        made = self.moe(normed) + self.share_expert(normed) if self.is_sparse else self.mlp(normed)
        found: Tensor = hidden + made
        return found


class Step3p5ForCausalLM(Step3p7PreTrainedModel):  # type: ignore[misc]
    config_class = Step3p5Config
    base_model_prefix = "model"
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    _keep_in_fp32_modules_strict = ("router_bias",)
    model: Any

    def __init__(self, config: Step3p5Config) -> None:
        super().__init__(config)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = (_StepLayer(config, number) for number in range(config.num_hidden_layers))
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = Step3p7RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.model.rotary_emb = Step3p7RotaryEmbedding(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.model.embed_tokens
        return found

    def forward(self, input_ids: Tensor, **_: object) -> CausalLMOutputWithPast:
        hidden = self.model.embed_tokens(input_ids)
        places = torch.arange(input_ids.shape[1])[None]
        asked = {
            "config": self.config,
            "inputs_embeds": hidden,
            "attention_mask": None,
            "past_key_values": None,
            "position_ids": places,
        }
        masks = {
            "full_attention": create_causal_mask(**asked),
            "sliding_attention": create_sliding_window_causal_mask(**asked),
        }
        for layer in self.model.layers:
            rope = self.model.rotary_emb(hidden, places, layer.kind)
            hidden = layer(hidden, rope, masks[layer.kind])
        hidden = self.model.norm(hidden)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden), hidden_states=(hidden,))


def register() -> None:
    """So that transformers' Auto classes know them."""
    AutoConfig.register("mimo", MiMoConfig, exist_ok=True)
    AutoModelForCausalLM.register(MiMoConfig, MiMoForCausalLM, exist_ok=True)
    AutoConfig.register("bailing_moe_v2", BailingMoeV2Config, exist_ok=True)
    AutoModelForCausalLM.register(BailingMoeV2Config, BailingMoeV2ForCausalLM, exist_ok=True)
    AutoConfig.register("step3p5", Step3p5Config, exist_ok=True)
    AutoModelForCausalLM.register(Step3p5Config, Step3p5ForCausalLM, exist_ok=True)
