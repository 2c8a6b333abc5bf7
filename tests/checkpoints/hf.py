"""The oracle: a tiny random transformers model, as `save_pretrained` writes it, and a tokenizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from . import own_code
from .families import FAMILIES
from .spec import Spec

own_code.register()
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_ROUTERS = (".mlp.gate.weight", ".mixer.gate.weight", ".moe.gate.weight")
_FP32 = ".moe.router_bias"
"""What is no buffer, but fp32 on both sides, too."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CORPUS = (
    "Megatron writes shards; Hugging Face reads tensors. A mount is a promise about bytes.",
    "The quick brown fox jumps over the lazy dog, and the tokenizer merges what it sees often.",
    "Ein Gedicht, ein Gewicht, ein Gesicht: 0123456789.",
)


def save_model(spec: Spec, directory: Path) -> None:
    options = {} if spec.hf_max_shard_size is None else {"max_shard_size": spec.hf_max_shard_size}
    family = FAMILIES[spec.family]
    has_place = not spec.mtp or family.has_place_for_mtp
    model = build_model(spec) if has_place else build_model_with_mtp(spec)
    model.save_pretrained(directory, **options)
    if turned := FAMILIES[spec.family].turned:
        for file in directory.glob("*.safetensors"):
            tensors = load_file(file)
            for name in tensors:
                if name.endswith(turned):
                    tensors[name] = tensors[name].transpose(1, 2).contiguous()
            save_file(tensors, file, {"format": "pt"})
    if spec.mtp and spec.vision and spec.is_moe:
        _name_each_expert(directory / "model.safetensors")


def _name_each_expert(file: Path) -> None:
    """Of layers for multi-token prediction, as on the hub (Qwen3.5; Qwen3.6 has them fused):
    transformers does so with those it knows as the language model's."""
    tensors = load_file(file)
    for name in [name for name in tensors if name.startswith("mtp.") and ".experts." in name]:
        fused = tensors.pop(name)
        at, _, projection = name.rpartition(".")
        for number, expert in enumerate(fused):
            parts = {projection: expert}
            if projection == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True))
            for part, value in parts.items():
                tensors[f"{at}.{number}.{part}.weight"] = value.contiguous()
    save_file(tensors, file, {"format": "pt"})


def build_model_with_mtp(spec: Spec) -> PreTrainedModel:
    """As on the hub, where the layers for multi-token prediction are mostly named as the decoder's
    next, with copies of the embedding and the output layer. transformers' class has no place for
    them: it is made with more layers, which hold what else there is, and then says that it has
    fewer."""
    family, freq = FAMILIES[spec.family], spec.moe_layer_freq
    last = 0 if family.mtp_is_dense or freq is None else freq[-1]
    more = None if freq is None else (*freq, *(last,) * spec.mtp)
    model = build_model(spec.but(layers=spec.layers + spec.mtp, moe_layer_freq=more, mtp=0))
    generator = torch.Generator().manual_seed(spec.seed + 1)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    decoder = model.get_decoder()
    layers: nn.ModuleList = decoder.layers
    if family.mtp_apart:
        decoder.layers = layers[: spec.layers]
        model.mtp = _apart(spec, layers[spec.layers :], generator)
        layers = decoder.layers
    for layer in layers[spec.layers :]:
        for name in ("enorm", "hnorm"):
            layer.add_module(name, _norm(layer, generator))
        projection = nn.Linear(2 * spec.hidden, spec.hidden, bias=False, dtype=model.dtype)
        projection.weight.data.normal_(0.0, 0.05, generator=generator)
        layer.eh_proj = projection
        if family.mtp_norm != "shared_head.norm":
            layer.add_module(family.mtp_norm, _norm(layer, generator))
            continue
        layer.shared_head = nn.Module()
        layer.shared_head.norm = _norm(layer, generator)
        layer.embed_tokens = copy.deepcopy(embedding)
        layer.shared_head.head = copy.deepcopy(head)
    if family.mtp_moved:
        decoder.layers, decoder.mtp = layers[: spec.layers], nn.Module()
        decoder.mtp.layers = layers[spec.layers :]
        for layer in decoder.mtp.layers:
            layer.pre_mlp_layernorm = layer.post_attention_layernorm
            del layer.post_attention_layernorm
    model.config = model_config(spec)
    model.config.architectures = [type(model).__name__]
    if spec.vision:
        model.config.vision_config.dtype = model.dtype
    return model


def _apart(spec: Spec, layers: nn.ModuleList, generator: torch.Generator) -> nn.Module:
    """As Qwen3-Next has them on the hub: `layers` in a module of their own."""
    mtp = nn.Module()
    mtp.fc = nn.Linear(2 * spec.hidden, spec.hidden, bias=False, dtype=TORCH_DTYPES[spec.dtype])
    mtp.fc.weight.data.normal_(0.0, 0.05, generator=generator)
    mtp.layers = layers
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        mtp.add_module(name, _norm(layers[0], generator))
    return mtp


def _norm(layer: nn.Module, generator: torch.Generator) -> nn.Module:
    norm = copy.deepcopy(layer.get_submodule("input_layernorm"))
    norm.get_parameter("weight").data.uniform_(0.5, 1.5, generator=generator)
    return norm


def build_model(spec: Spec) -> PreTrainedModel:
    """A model whose every tensor is random and unlike every other, norms included."""
    dtype = TORCH_DTYPES[spec.oracle_dtype]
    with torch.device("meta"):
        model: PreTrainedModel = _kind(spec).from_config(model_config(spec)).to(dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(spec.seed)
    for name, parameter in model.named_parameters():
        if name.endswith(_FP32) or (spec.fp32_router and name.endswith(_ROUTERS)):
            parameter.data = parameter.data.float()
        with torch.no_grad():
            if name.endswith(FAMILIES[spec.family].zeros):
                parameter.data = torch.zeros(parameter.shape)
            elif parameter.dim() == 1 and name.endswith(".weight"):  # of a norm
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith(
                (".mixer.dt_bias", ".mamba.dt_bias")
            ):  # of steps between 0.0002 and 1
                parameter.uniform_(-8.5, 0.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.05, generator=generator)
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved:  # expert biases, which transformers keeps in fp32
            buffer.data = torch.empty(buffer.shape).normal_(0.0, 0.05, generator=generator)
    return model


def _kind(spec: Spec) -> Any:
    if spec.bare:
        return AutoModel
    if spec.vision:
        return AutoModelForImageTextToText
    return AutoModelForSequenceClassification if spec.labels else AutoModelForCausalLM


def model_config(spec: Spec) -> PreTrainedConfig:
    family = FAMILIES[spec.family]
    both = {
        "tie_word_embeddings": spec.tied,
        "dtype": TORCH_DTYPES[spec.oracle_dtype],
        **({"num_labels": spec.labels} if spec.labels else {}),
    }
    of_text = {
        "vocab_size": spec.vocab_size,
        "bos_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
        "eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"),
        **family.config(spec),
    }
    if family.vision is None:
        return AutoConfig.for_model(spec.family, **both, **of_text)
    text = {**both, **of_text}
    return AutoConfig.for_model(spec.family, **both, text_config=text, **family.vision(spec))


def save_tokenizer(spec: Spec, directory: Path) -> None:
    """A byte-level BPE tokenizer, trained here, whose ids all fit the model's vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(spec.vocab_size, 300),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=spec.max_positions,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)
