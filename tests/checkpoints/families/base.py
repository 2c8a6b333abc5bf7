"""What a family of fixtures is: a transformers config, Megatron-LM's arguments for the same model,
and where the value of each Megatron parameter lies in the Hugging Face save.

All of it is data, so that a further family is a few lines; `hf`, `saved_args`, `megatron_writer`
and `weights` read it. Written from how megatron-core uses its parameters and, where it has a
bridge for the family, from NVIDIA-NeMo/Megatron-Bridge:src/megatron/bridge/models/: never from
mcorefs, with which it is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..spec import Spec

Values = Mapping[str, object]

# -- where a parameter's value is -----------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """The Hugging Face tensor, on every rank."""

    hf: str


@dataclass(frozen=True)
class Norm:
    """The weight of a norm, on every rank."""

    hf: str


@dataclass(frozen=True)
class HeadNorm:
    """The weight of a norm of each query or key head, or of all of them."""

    hf: str
    cut: bool = False
    """Each tensor-parallel rank has its share of the heads."""


@dataclass(frozen=True)
class IndexHeads:
    """Heads of an indexer, on every rank."""

    value: Whole | Norm


@dataclass(frozen=True)
class Rows:
    """Column parallel: each tensor-parallel rank has its share of the rows."""

    hf: str
    transposed: bool = False
    """The Hugging Face tensor is [in, out], as transformers' Conv1D has it."""


@dataclass(frozen=True)
class Columns:
    """Row parallel: each tensor-parallel rank has its share of the columns."""

    hf: str
    transposed: bool = False


@dataclass(frozen=True)
class Gated:
    """Each tensor-parallel rank's gate rows, followed by its up rows."""

    gate: str
    up: str


@dataclass(frozen=True)
class FusedGated:
    """As Gated, of one Hugging Face tensor: all gate rows, then all up rows."""

    hf: str


@dataclass(frozen=True)
class Qkv:
    """Query groups; a group is its query heads, then its key head, then its value head. Each
    tensor-parallel rank has its share of the groups' rows."""

    hf: str
    """Name of one tensor that holds q, k and v one above the other; or, with {}, of three."""
    transposed: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """Rows as in Rows, padded to a multiple of vocab_divisible_by * tp."""

    hf: str


@dataclass(frozen=True)
class Place:
    """Where a parameter is."""

    rank: int
    size: int
    """Number of tensor-parallel ranks, and which of them this is; of an expert, those it has."""
    expert: int | None


@dataclass(frozen=True)
class Made:
    """What `make` makes of some Hugging Face tensors for one place: a family's own layout."""

    hf: tuple[str, ...]
    make: Callable[[Sequence[Tensor], Place], Tensor]


Value = (
    Made
    | Whole
    | Norm
    | HeadNorm
    | IndexHeads
    | Rows
    | Columns
    | Gated
    | FusedGated
    | Qkv
    | Vocabulary
)

LAYER, HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
EXPERT = LAYER + "mlp.experts.local_experts.{expert}."


def gated_mlp(at: str, hf: str, names: tuple[str, str, str]) -> dict[str, Value]:
    """A gated MLP at Megatron's `at`, whose gate, up and down projections are `names` in `hf`."""
    gate, up, down = names
    found: dict[str, Value] = {at + "linear_fc2.bias": Whole(f"{hf}{down}.bias")}
    found[at + "linear_fc2.weight"] = Columns(f"{hf}{down}.weight")
    for parameter in ("weight", "bias"):
        found[f"{at}linear_fc1.{parameter}"] = Gated(
            f"{hf}{gate}.{parameter}", f"{hf}{up}.{parameter}"
        )
    return found


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
DECODER: Mapping[str, Value] = {
    "embedding.word_embeddings.weight": Vocabulary("model.embed_tokens.weight"),
    "output_layer.weight": Vocabulary("lm_head.weight"),
    "decoder.final_layernorm.weight": Norm("model.norm.weight"),
    LAYER + "input_layernorm.weight": Norm(HF_LAYER + "input_layernorm.weight"),
    LAYER + "pre_mlp_layernorm.weight": Norm(HF_LAYER + "post_attention_layernorm.weight"),
    LAYER + "self_attention.linear_qkv.weight": Qkv(HF_LAYER + "self_attn.{}_proj.weight"),
    LAYER + "self_attention.linear_qkv.bias": Qkv(HF_LAYER + "self_attn.{}_proj.bias"),
    LAYER + "self_attention.linear_proj.weight": Columns(HF_LAYER + "self_attn.o_proj.weight"),
    LAYER + "self_attention.linear_proj.bias": Whole(HF_LAYER + "self_attn.o_proj.bias"),
    LAYER + "self_attention.q_layernorm.weight": HeadNorm(HF_LAYER + "self_attn.q_norm.weight"),
    LAYER + "self_attention.k_layernorm.weight": HeadNorm(HF_LAYER + "self_attn.k_norm.weight"),
    LAYER + "mlp.router.weight": Whole(HF_LAYER + "mlp.gate.weight"),
    LAYER + "mlp.router.expert_bias": Whole(HF_LAYER + "mlp.gate.e_score_correction_bias"),
    **gated_mlp(LAYER + "mlp.", HF_LAYER + "mlp.", PROJECTIONS),
    **gated_mlp(EXPERT, HF_LAYER + "mlp.experts.{expert}.", PROJECTIONS),
}
"""What most decoders call their tensors; a model may have only some of them."""

LATENT_ATTENTION: Mapping[str, Value] = {
    LAYER + "self_attention.linear_q_proj.weight": Rows(HF_LAYER + "self_attn.q_proj.weight"),
    LAYER + "self_attention.linear_q_down_proj.weight": Rows(
        HF_LAYER + "self_attn.q_a_proj.weight"
    ),
    LAYER + "self_attention.q_layernorm.weight": Norm(HF_LAYER + "self_attn.q_a_layernorm.weight"),
    LAYER + "self_attention.linear_q_up_proj.weight": Rows(HF_LAYER + "self_attn.q_b_proj.weight"),
    LAYER + "self_attention.linear_kv_down_proj.weight": Rows(
        HF_LAYER + "self_attn.kv_a_proj_with_mqa.weight"
    ),
    LAYER + "self_attention.kv_layernorm.weight": Norm(
        HF_LAYER + "self_attn.kv_a_layernorm.weight"
    ),
    LAYER + "self_attention.linear_kv_up_proj.weight": Rows(
        HF_LAYER + "self_attn.kv_b_proj.weight"
    ),
}
"""Megatron's own modules for down projections are column parallel."""

INDEX_HEADS, INDEX_DIM = 16, 32
"""So many heads that no key's score is 0 in all of them, which would leave the choice open."""
_INDEXER, _HF_INDEXER = (
    LAYER + "self_attention.core_attention.indexer.",
    HF_LAYER + "self_attn.indexer.",
)
SPARSE_ATTENTION: Mapping[str, Value] = {
    **LATENT_ATTENTION,
    _INDEXER + "linear_wq_b.weight": IndexHeads(Whole(_HF_INDEXER + "wq_b.weight")),
    _INDEXER + "linear_wk.weight": IndexHeads(Whole(_HF_INDEXER + "wk.weight")),
    _INDEXER + "k_norm.weight": IndexHeads(Norm(_HF_INDEXER + "k_norm.weight")),
    _INDEXER + "k_norm.bias": IndexHeads(Whole(_HF_INDEXER + "k_norm.bias")),
    _INDEXER + "linear_weights_proj.weight": Whole(_HF_INDEXER + "weights_proj.weight"),
}
"""Indexers rotate the first part of their heads on both sides."""


def sparse_config(spec: Spec) -> Values:
    return {
        "index_n_heads": INDEX_HEADS,
        "index_head_dim": INDEX_DIM,
        "index_topk": spec.index_topk,
    }


def sparse_arguments(spec: Spec, interleaved: bool) -> Values:
    return {
        "experimental_attention_variant": "dsa",
        "dsa_indexer_n_heads": INDEX_HEADS,
        "dsa_indexer_head_dim": INDEX_DIM,
        "dsa_indexer_topk": spec.index_topk,
        "dsa_indexer_topk_freq": spec.index_every,
        "dsa_indexer_skip_topk_offset": int(spec.index_every > 1),
        "dsa_indexer_loss_coeff": 0.001,
        "dsa_indexer_use_sparse_loss": True,
        "dsa_kernel_backend": "none",
        "dsa_indexer_rope_interleaved": interleaved,
        "dsa_indexer_rotate_activation": True,
        "dsa_indexer_scoring_relu": True,
        "dsa_indexer_k_norm_epsilon": 1e-6,
        "dsa_indexer_k_norm_fp32": False,
        "qk_layernorm": True,
    }


MTP = "mtp.layers.{layer}."
MTP_BEHIND: Mapping[str, Value] = {
    MTP + "enorm.weight": Norm(HF_LAYER + "enorm.weight"),
    MTP + "hnorm.weight": Norm(HF_LAYER + "hnorm.weight"),
    MTP + "eh_proj.weight": Rows(HF_LAYER + "eh_proj.weight"),
    MTP + "final_layernorm.weight": Norm(HF_LAYER + "shared_head.norm.weight"),
}
"""{layer} counts on behind the decoder's. Names: the hub's index of deepseek-ai/DeepSeek-V3, and
Megatron-Bridge:src/megatron/bridge/models/deepseek/common.py."""

AT_MTP_APART = "mtp.layers.{mtp}."
MTP_APART: Mapping[str, Value] = {
    MTP + "enorm.weight": Norm("mtp.pre_fc_norm_embedding.weight"),
    MTP + "hnorm.weight": Norm("mtp.pre_fc_norm_hidden.weight"),
    MTP + "eh_proj.weight": Rows("mtp.fc.weight"),
    MTP + "final_layernorm.weight": Norm("mtp.norm.weight"),
}
"""Names: Megatron-Bridge:src/megatron/bridge/models/qwen/qwen3_next_bridge.py. The layer inside is
under mtp.layers."""

# -- the transformers config ----------------------------------------------------------------------


def rope(spec: Spec) -> Values:
    theta = float(spec.rope_theta)
    if spec.llama3_rope_factor is None:
        return {"rope_type": "default", "rope_theta": theta}
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": spec.llama3_rope_factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def decoder_config(spec: Spec) -> Values:
    """What the config classes of most decoders call the same."""
    return {
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "rope_parameters": rope(spec),
    }


def latent_config(spec: Spec) -> Values:
    """What the config classes of models with multi-latent attention call the same."""
    found = dict(decoder_config(spec))
    del found["head_dim"]
    if spec.yarn is not None:
        factor, mscale, all_dim = spec.yarn
        found["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": float(spec.rope_theta),
            "factor": factor,
            "mscale": mscale,
            "mscale_all_dim": all_dim,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 4096,
        }
    return {
        **found,
        "num_key_value_heads": spec.heads,
        "q_lora_rank": spec.q_lora,
        "kv_lora_rank": spec.kv_lora,
        "qk_nope_head_dim": spec.qk_nope,
        "qk_rope_head_dim": spec.qk_rope,
        "v_head_dim": spec.v_head,
    }


# -- the family -----------------------------------------------------------------------------------


def no_arguments(spec: Spec) -> Values:
    return {}


def no_lists(spec: Spec) -> Mapping[str, list[int]]:
    return {}


@dataclass(frozen=True)
class Family:
    specs: Mapping[str, Spec]
    config: Callable[[Spec], Values] = decoder_config
    """What transformers' config class is called with, beside the vocabulary and token ids."""
    arguments: Callable[[Spec], Values] = no_arguments
    """Megatron-LM's arguments for the model, where they differ from `saved_args`; the model that
    is saved is built from them too."""
    norms_whole_projections: bool = False
    """Not each head has a norm, but all query heads together, and all key heads."""
    norms_only_outputs: bool = False
    """There are norms of what attention and MLP put out, and none of what they take in."""
    mtp_at: str = ""
    """Names of layers for multi-token prediction, with {mtp}, where they do not count on behind the
    decoder's."""
    mtp_norm: str = "shared_head.norm"
    """The norm behind layers for multi-token prediction that count on behind the decoder's. If it
    is another, they hold no copies of the embedding and the output layer."""
    mtp_moved: bool = False
    """They are in `mtp_at`, for which transformers' class has no place, have a window, and call the
    norm before their MLP pre_mlp_layernorm."""
    mtp_is_dense: bool = False
    """Layers for multi-token prediction have no experts, though the decoder's last layer has."""
    mtp_lists: Callable[[Spec], Mapping[str, list[int]]] = no_lists
    """How arguments that are lists over layers go on for those for multi-token prediction, of which
    the trainer makes their own and megatron-core 0.16 counts on."""
    zeros: tuple[str, ...] = ()
    """Ends of the names of what transformers' model has in fp32, and Megatron's has not: zeros."""
    built: Callable[[Spec], Values] = no_arguments
    """What the model that is saved has beyond its arguments, in further arguments."""
    vision: Callable[[Spec], Values] | None = None
    """Of a model that sees: what transformers' config class is called with beside text_config,
    which is `config`. Its language model's tensors go by their names in one by itself."""
    hub_names: bool = False
    """Of a model that sees: its save names its language model's tensors as one by itself does, and
    what sees `visual`."""
    turned: tuple[str, ...] = ()
    """Ends of the names of tensors [expert, out, in] that the hub's files have as
    [expert, in, out]: transformers 4 saves them so, 5 reads them so, and saves them otherwise."""
    parameters: Mapping[str, Value] = field(default_factory=lambda: DECODER)
    """By Megatron's name, with {layer} and {expert} (in the whole model) for numbers. The layer
    inside one for multi-token prediction is the decoder's next."""

    @property
    def mtp_apart(self) -> bool:
        """transformers' class has no place for layers for multi-token prediction, and they do not
        count on behind the decoder's."""
        return self.mtp_at == AT_MTP_APART

    @property
    def has_place_for_mtp(self) -> bool:
        return bool(self.mtp_at) and not (self.mtp_apart or self.mtp_moved)
