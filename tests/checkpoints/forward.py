"""Is a fixture what it says? Its Megatron model must compute the logits of its transformers model.

Checked by each rank before it saves, with megatron-core's own modules, so that the tables in
`families` rest on more than having been read twice: every parameter takes part in the logits, and
so does every argument that says how they are used. Only where there is one pipeline stage, no
context parallelism, an oracle whose weights are the model's, and a model that megatron-core can
compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe import moe_utils
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_layers import MtpModel

from . import own_code
from .families import FAMILIES
from .megatron_model import build_models
from .spec import Spec
from .stand_ins import CudaMeansCpu
from .vision import language_model

TOLERANCE = 2e-5
"""In fp32, of logits of magnitude 1; a swapped pair of heads makes a difference of 0.1 and more."""


def is_checkable(spec: Spec) -> bool:
    speaks = not (spec.labels or spec.bare)
    able = not (spec.main_weights or spec.beyond_core)
    return spec.pp == spec.cp == 1 and able and speaks


def _tokens(spec: Spec) -> Tensor:
    return torch.arange(0, spec.vocab_size, 9)[None]


@torch.no_grad()
def save_expected(spec: Spec, hf: Path, path: Path) -> None:
    """What transformers' model in `hf` makes of some tokens, in fp32."""
    kind = AutoModelForImageTextToText if spec.vision else AutoModelForCausalLM
    model = kind.from_pretrained(hf, dtype=torch.float32)
    tokens = _tokens(spec)
    made = model(tokens, output_hidden_states=True)
    torch.save([made.logits, *_predictions(spec, model, tokens, made.hidden_states[-1])], path)


def _predictions(
    spec: Spec, model: PreTrainedModel, tokens: Tensor, hidden: Tensor
) -> Iterator[Tensor]:
    """What transformers' layers for multi-token prediction make of each token and the next."""
    if spec.mtp and isinstance(model, own_code.MiMoForCausalLM | own_code.BailingMoeV2ForCausalLM):
        yield from model.predictions(tokens, hidden)
    elif spec.mtp:
        _tell_of_mtp(spec, model)
        layers = MtpModel.from_pretrained(model)
        if spec.index_topk:
            _let_indexers_draft(layers)
        for number in range(spec.mtp):
            tokens, hidden = tokens[:, 1:], hidden[:, :-1]
            places = torch.arange(tokens.shape[1])[None]
            hidden = layers.forward_layer(number, hidden, places, None, input_ids=tokens)
            yield model.lm_head(hidden)


def _tell_of_mtp(spec: Spec, model: PreTrainedModel) -> None:
    """What transformers must know of the layers for multi-token prediction in the files of `model`,
    and some classes and configs do not say."""
    family = FAMILIES[spec.family]
    behind = "|".join(str(spec.layers + number) for number in range(spec.mtp))
    if not family.mtp_at:
        model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.({behind})\."]
    config = model.config.get_text_config()
    config.num_mtp_layers = spec.mtp
    if hasattr(config, "mlp_layer_types"):
        kind = "dense" if family.mtp_is_dense else "sparse"
        config.mtp_mlp_layer_types = [kind] * spec.mtp
    if spec.index_topk:
        config.mtp_layer_types = ["indexed_attention"] * spec.mtp
    elif hasattr(config, "layer_types") and not hasattr(config, "mtp_layer_types"):
        kind = "sliding" if family.mtp_moved else "full"
        config.mtp_layer_types = [f"{kind}_attention"] * spec.mtp
    if spec.vision:  # else what its language model converts is converted in that alone
        model._weight_conversions = get_model_conversion_mapping(model.get_decoder())
    if family.mtp_norm != "shared_head.norm":  # the names that it knows of norms
        names = {
            f".mtp_block.{family.mtp_norm}.": ".post_norm.",
            ".pre_mlp_layernorm.": ".post_attention_layernorm.",
        }
        renamed = [WeightRenaming(one, other) for one, other in names.items()]
        model._weight_conversions = [*get_model_conversion_mapping(model), *renamed]


def _let_indexers_draft(layers: MtpModel) -> None:
    """transformers 5.23 does not know which mask layers with indexers take, nor that some put out
    chosen keys too."""

    def causal(layer: int, embeds: Tensor, *_: object) -> dict[str, Tensor]:
        length = embeds.shape[1]
        return {"attention_mask": torch.ones(1, 1, length, length).tril().bool()}

    layers.create_masks_for_mtp_layer = causal
    for layer in layers.layers:
        layer.mtp_block.register_forward_hook(
            lambda module, inputs, output: output[0] if isinstance(output, tuple) else output
        )


@torch.no_grad()
def check(spec: Spec, model: GPTModel, expected: Path) -> None:
    """Raises AssertionError where Megatron's `model` makes something else of them. Collective."""
    CudaRNGStatesTracker.fork = lambda *_: nullcontext()  # only dropout uses it, and there is none
    moe_utils.te_general_gemm = None  # megatron-core 0.16.1 forgets this name without TE
    (exact,) = build_models(spec.but(dtype="fp32"))
    exact.load_state_dict(model.state_dict())
    exact = language_model(exact)
    for depth, (found, wanted) in enumerate(
        zip(_logits(spec, exact.eval()), torch.load(expected), strict=True)
    ):
        known = found[:, : wanted.shape[1]]  # the last tokens have no next one
        difference, scale = ((a.abs().max().item()) for a in (known - wanted, wanted))
        if not difference < TOLERANCE * max(scale, 1.0):
            raise AssertionError(
                f"logits of magnitude {scale:.2f} differ by {difference:.2g} (depth {depth})"
            )


def _logits(spec: Spec, model: GPTModel) -> Iterator[Tensor]:
    """Those of the model, and those of each of its layers for multi-token prediction."""
    tokens = _tokens(spec)
    length = tokens.shape[1]
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    places = torch.arange(length)[None]
    if model.position_embedding_type == "mrope":
        places = places.expand(3, 1, length)  # of a text, all three are alike
    hidden: list[Tensor] = []
    model.decoder.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    model.mtp_process, model.config.mtp_num_layers = False, None  # they are for training only
    with CudaMeansCpu():  # for the mask of a sliding window
        yield _whole(spec, model(tokens, places, mask))
        if spec.mtp:
            rope = None if spec.kv_lora else model.rotary_pos_emb(length)
            made = model.mtp(
                tokens, places, hidden[0], mask, rotary_pos_emb=rope, embedding=model.embedding
            )
            weight = model.shared_embedding_or_output_weight() if spec.tied else None
            for one in made.chunk(1 + spec.mtp)[1:]:
                yield _whole(spec, model.output_layer(one, weight=weight)[0].transpose(0, 1))


def _whole(spec: Spec, local: Tensor) -> Tensor:
    """The logits of which each tensor-parallel rank has `local`."""
    parts = [torch.empty_like(local) for _ in range(spec.tp)]
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim=-1)[..., : spec.vocab_size]
