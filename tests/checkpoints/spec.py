"""What a fixture is: one frozen, JSON-able description of a model and of the run that saved it.

A `Spec` holds only facts that change bytes on disk or fields in the saved args. Everything the
generator does follows from it, so a cache key is a hash of it (see `pool`).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

DTypeName = Literal["bf16", "fp16", "fp32"]
Common = Literal["common.pt", "common_state", "no_args"]
"""Where the non-tensor state goes: a file (core <= 0.18), an entry among the tensors (core 0.19+),
or a file without `args` (Megatron-Bridge, verl)."""

Format = Literal["torch_dist", "torch", "fsdp_dtensor", "torch_dcp", "zarr"]
Names = Literal["local", "te", "grouped_mlp"]
"""Whose parameter names a format that keeps them holds: megatron's own modules, those of
TransformerEngine, or those with megatron's GroupedMLP for the experts."""

ShardingType = Literal["dp_reshardable", "fully_reshardable", "dp_zero_gather_scatter"]
"""`distrib_optim_sharding_type`. megatron-core 0.16 still reads but cannot write
fully_sharded_model_space and fully_sharded_bucket_space."""

Trainer = Literal["ms-swift", "megatron-bridge", "canonical"]
"""Whose LoRA modules; "canonical" are Megatron-Bridge's for q, k, v, gate and up apart."""

PADDING_VALUE = 777.0
"""Fills the vocabulary rows that only exist in Megatron: forgetting to cut them is seen at once
(bf16 stores 776)."""


@dataclass(frozen=True)
class Spec:
    family: str = "qwen3"
    """One of `families.FAMILIES`, named as transformers' model_type."""

    # The run: world size is tp * pp * cp * dp; experts ride on the same ranks as ep * etp * pp.
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int | None = None
    """Tensor parallel size inside experts; None is Megatron's default, tp."""
    cp: int = 1
    dp: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    # The model.
    layers: int = 4
    hidden: int = 64
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 16
    ffn: int = 96
    tied: bool = False
    vocab_size: int = 307
    vocab_divisible_by: int = 128
    dtype: DTypeName = "bf16"
    max_positions: int = 512
    rope_theta: int = 1_000_000
    norm_eps: float = 1e-6
    llama3_rope_factor: float | None = None
    """Llama 3.1's scaling of rotary embeddings, if any."""
    linear_bias: bool = False
    """Biases in all linear layers (--add-bias-linear)."""
    fused_gelu: bool = True
    """GELU by the kernel that adds the bias too, which approximates it (--bias-gelu-fusion)."""
    qk_norm: bool = True
    """Norms of query and key heads, in a family that has them both ways."""
    window: int | None = None
    """How many tokens each sees, itself included."""
    zero_centred: bool = False
    """Norms have 1 added to their weights (--apply-layernorm-1p), transformers' have not."""
    rotary_interleaved: bool = False
    """Neighbours are rotated together (--rotary-interleaved), in transformers' the halves of a
    head."""
    output_norms: tuple[str, ...] = ()
    """Where each layer has the norms of what its attention and its MLP put out, if it has any."""
    beyond_core: bool = False
    """The model computes what megatron-core alone cannot."""
    experts: int = 0
    topk: int = 2
    moe_ffn: int = 48
    moe_layer_freq: tuple[int, ...] | None = None
    """1 for a MoE layer, 0 for a dense one; None (all MoE) keeps stacked keys, a list does not."""
    shared_ffn: int = 0
    """Width of the experts that every token goes to."""
    glu_block: int | None = None
    """Each expert has so many gate rows and up rows by turns (--moe-mlp-glu-interleave-size)."""
    norm_topk_prob: bool = True
    expert_bias: bool = False
    """The router is one of sigmoids, with a bias for each expert."""
    expert_groups: tuple[int, int] | None = None
    """(how many groups of experts, how many of them a token's experts are chosen from)."""
    routed_scaling: float = 1.0
    fp32_router: bool = False
    labels: int = 0
    """The output layer gives that many scores (ms-swift's task_type seq_cls); 0: words."""
    bare: bool = False
    """There is no output layer (ms-swift's task_type embedding)."""
    kv_lora: int = 0
    """Rank of the latent of keys and values; 0 for a model without multi-latent attention."""
    q_lora: int | None = None
    """Rank of the latent of queries, if they have one."""
    qk_nope: int = 12
    qk_rope: int = 8
    v_head: int = 10
    yarn: tuple[float, float, float] | None = None
    """(factor, mscale, mscale_all_dim) that stretch the rotary embeddings of latent attention."""
    index_topk: int = 0
    """How many keys the indexer of sparse latent attention leaves each query; 0: there is none."""
    index_every: int = 1
    """One in so many layers has an indexer, whose choice those behind it share."""
    slime_indexers: bool = False
    """They are slime's: other names, and the rotated part of their heads is the last."""
    mtp: int = 0
    """Layers for multi-token prediction."""
    pattern: str | None = None
    """Of a hybrid, what each layer is: Mamba (M), attention (*), an MLP (-), experts (E), or Mamba
    beside attention, then an MLP (P)."""
    mixer_norm: bool = True
    """Mamba mixers have a norm, in a family that has them both ways."""
    moe_latent: int | None = None
    """Width that experts are given and make, if it is not that of the hidden states."""
    seed: int = 20
    vision: Literal["ms-swift", "megatron-bridge", "megatron"] | None = None
    """What sees for the language model: transformers' module where one of the first two has it, or
    Megatron's layers, as mbridge and later versions of Megatron-Bridge build them."""

    # The save.
    format: Format = "torch_dist"
    names: Names = "local"
    """Not in format "torch_dist", which has one set of names for all."""
    flat_buffers: bool = False
    """Parameters are views of a few big buffers, as DistributedDataParallel makes them."""
    per_layer_keys: bool = False
    singleton_local_shards: bool = False
    fully_parallel_save: bool = False
    writer_threads: int = 2
    optimizer_entries: bool = False
    """Also the real sharded optimizer state and the random number generators' state."""
    distributed_optimizer: ShardingType | None = None
    """The state is that of megatron's DistributedOptimizer, laid out so. None: of the optimizer
    whose state is not sharded."""
    saved_again: bool = False
    """Read and saved once more by torch.distributed.checkpoint, which cuts along the first axis."""
    local_norm_keys: bool = False
    """MoE norm saved as `mlp.linear_fc1.layer_norm_weight`, as megatron's local layer spec does;
    otherwise `pre_mlp_layernorm.weight`, as every TransformerEngine (GPU) run does."""
    main_weights: bool = False
    """The oracle is the fp32 weights that the optimizer keeps: the model has their roundings."""
    split_halves: bool = True
    """Format "fsdp_dtensor": the gate and up rows of linear_fc1 in entries of their own, as a run
    with --swiglu saves them. Other runs with a gated MLP (--quick-geglu) save it in one."""
    adapter: Trainer | None = None
    """The model has LoRA modules, and the oracle their product merged into its weights."""
    adapter_only: bool = False
    """Nothing but the adapter is saved."""
    lora_rank: int = 8
    lora_alpha: int = 32
    lora_targets: tuple[str, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    rank_stabilised: bool = False
    trains_head: bool = False
    """The output layer is trained whole (PEFT's modules_to_save)."""
    common: Common = "common.pt"
    iteration: int | Literal["release"] = 100

    # The saved args.
    vocab_size_in_args: bool = False
    epsilon_names: tuple[str, ...] = ("layernorm_epsilon",)
    """Megatron-LM saves `norm_epsilon` up to 0.15 and `layernorm_epsilon` from 0.16 on."""
    tokenizer_model: str | None = None
    """None: the path of the tokenizer made for this fixture. Else this text (say, a hub name)."""

    # The oracle.
    hf_max_shard_size: str | None = None

    def __post_init__(self) -> None:
        expert_ranks = self.ep * self.expert_tp * self.pp
        if self.world % expert_ranks:
            raise ValueError(f"world {self.world} is not a multiple of ep*etp*pp = {expert_ranks}")
        if self.moe_layer_freq is not None and len(self.moe_layer_freq) != self.layers:
            raise ValueError("moe_layer_freq needs one entry per layer")
        if self.pattern is not None and len(self.pattern) != self.layers:
            raise ValueError("pattern needs one letter per layer")

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def expert_tp(self) -> int:
        return self.tp if self.etp is None else self.etp

    @property
    def is_moe(self) -> bool:
        return self.experts > 0

    @property
    def is_whole(self) -> bool:
        """Whether every weight is saved: in torch_dcp all tensor-parallel ranks use the same
        names, so only the part of one of them is kept."""
        return not (self.format == "torch_dcp" and self.tp > 1)

    @property
    def needs_reference(self) -> bool:
        """Whether the save alone does not say all that its config.json must say."""
        return self.common == "no_args" or self.vision is not None

    @property
    def oracle_weights(self) -> Literal["model", "optimizer"]:
        """Where the oracle's weights lie; Megatron-FSDP saves the optimizer's as the model's."""
        beside = self.main_weights and self.format != "fsdp_dtensor"
        return "optimizer" if beside else "model"

    @property
    def oracle_dtype(self) -> DTypeName:
        return "fp32" if self.main_weights else self.dtype

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.vocab_divisible_by * self.tp
        return -(-self.vocab_size // multiple) * multiple

    @property
    def iteration_dir(self) -> str:
        return "release" if self.iteration == "release" else f"iter_{self.iteration:07d}"

    def has_experts(self, layer: int) -> bool:
        if self.pattern is not None:
            return self.pattern[layer] == "E"
        return self.is_moe and (self.moe_layer_freq is None or self.moe_layer_freq[layer] == 1)

    def parameters(self) -> int:
        """How many numbers the model holds: to size timeouts and benchmarks."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        moe_layers = sum(self.has_experts(layer) for layer in range(self.layers))
        experts = 3 * self.hidden * (self.experts * self.moe_ffn + self.shared_ffn)
        dense = 3 * self.hidden * self.ffn
        embeddings = self.vocab_size * self.hidden * (1 if self.tied else 2)
        return (
            embeddings
            + self.layers * attention
            + moe_layers * experts
            + (self.layers - moe_layers) * dense
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        return cls().but(**json.loads(text))

    def but(self, **changes: Any) -> Spec:
        """This spec with some fields changed; lists (from JSON) become tuples."""
        frozen: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()
        }
        return dataclasses.replace(self, **frozen)


_DENSE = Spec()
_MOE = Spec(family="qwen3_moe", experts=8, vocab_size=301)
_TORCH = _DENSE.but(format="torch")
_TORCH_MOE = _MOE.but(format="torch")
_FSDP = _DENSE.but(format="fsdp_dtensor", main_weights=True)
_FSDP_MOE = _MOE.but(format="fsdp_dtensor", main_weights=True)
_DCP = _DENSE.but(format="torch_dcp")
_DCP_MOE = _MOE.but(format="torch_dcp")
_ZARR = _DENSE.but(format="zarr")
_ZARR_MOE = _MOE.but(format="zarr")

SPECS: dict[str, Spec] = {
    # Dense models.
    "qwen3": _DENSE,
    "qwen3-tied": _DENSE.but(tied=True, common="no_args", seed=21),
    "qwen3-tp2": _DENSE.but(tp=2, vocab_size_in_args=True, hf_max_shard_size="60KB", seed=22),
    "qwen3-tp2-pp2-tied": _DENSE.but(
        tp=2, pp=2, tied=True, vocab_size=311, epsilon_names=("norm_epsilon",), seed=23
    ),
    "qwen3-tp4-gqa2": _DENSE.but(tp=4, kv_heads=2, vocab_divisible_by=32, seed=24),
    "qwen3-pp2-vpp2": _DENSE.but(pp=2, vpp=2, layers=8, vocab_divisible_by=1, seed=25),
    "qwen3-pp2-uneven": _DENSE.but(
        pp=2, layers=5, first_stage_layers=2, last_stage_layers=3, dtype="fp32", seed=26
    ),
    "qwen3-dp2": _DENSE.but(dp=2, seed=27),
    "qwen3-tp2-dp2-fully-parallel": _DENSE.but(
        tp=2, dp=2, fully_parallel_save=True, optimizer_entries=True, seed=28
    ),
    "qwen3-cp2-fp16": _DENSE.but(
        cp=2, dtype="fp16", epsilon_names=("norm_epsilon", "layernorm_epsilon"), seed=29
    ),
    "qwen3-per-layer": _DENSE.but(per_layer_keys=True, iteration="release", seed=30),
    "qwen3-tp2-singleton": _DENSE.but(tp=2, singleton_local_shards=True, seed=31),
    "qwen3-tp2-common-state": _DENSE.but(
        tp=2,
        common="common_state",
        iteration=12_345_678,
        tokenizer_model="Qwen/Qwen3-0.6B",
        seed=32,
    ),
    "qwen3-tp2-main-params": _DENSE.but(
        tp=2, tied=True, main_weights=True, optimizer_entries=True, seed=33
    ),
    "qwen3-tp2-dp2-reshardable": _DENSE.but(
        tp=2,
        dp=2,
        main_weights=True,
        optimizer_entries=True,
        distributed_optimizer="fully_reshardable",
        seed=34,
    ),
    "qwen3-dp2-dp-zero": _DENSE.but(
        dp=2, optimizer_entries=True, distributed_optimizer="dp_zero_gather_scatter", seed=35
    ),
    "qwen3-dp3-saved-again": _DENSE.but(
        dp=3, saved_again=True, main_weights=True, optimizer_entries=True, seed=36
    ),
    # Mixtures of experts.
    "qwen3_moe": _MOE.but(norm_topk_prob=False, seed=40),
    "qwen3_moe-ep2": _MOE.but(ep=2, dp=2, etp=1, local_norm_keys=True, seed=41),
    "qwen3_moe-tp2-ep2-etp1": _MOE.but(tp=2, ep=2, etp=1, tied=True, seed=42),
    "qwen3_moe-tp2-pp2-ep2": _MOE.but(tp=2, pp=2, ep=2, etp=1, hf_max_shard_size="100KB", seed=43),
    "qwen3_moe-tp2-pp2-ep2-etp2": _MOE.but(
        tp=2, pp=2, dp=2, ep=2, etp=2, optimizer_entries=True, fully_parallel_save=True, seed=44
    ),
    "qwen3_moe-mixed-pp2": _MOE.but(pp=2, moe_layer_freq=(0, 1, 1, 1), fp32_router=True, seed=45),
    "qwen3_moe-tp2-ep2-singleton": _MOE.but(
        tp=2, ep=2, etp=1, singleton_local_shards=True, dtype="fp32", seed=46
    ),
    "qwen3_moe-tp2-etp2-per-layer": _MOE.but(
        tp=2, per_layer_keys=True, common="common_state", seed=47
    ),
    "qwen3_moe-tp2-ep2-in-turns": _MOE.but(tp=2, ep=2, etp=2, dp=2, glu_block=6, seed=53),
    "qwen3_moe-fp32-router": _MOE.but(fp32_router=True, iteration="release", seed=48),
    "qwen3_moe-ep2-main-params": _MOE.but(
        ep=2,
        dp=2,
        singleton_local_shards=True,
        main_weights=True,
        optimizer_entries=True,
        seed=49,
    ),
    "qwen3_moe-ep2-reshardable": _MOE.but(
        ep=2,
        dp=4,
        main_weights=True,
        optimizer_entries=True,
        distributed_optimizer="fully_reshardable",
        fully_parallel_save=True,
        seed=50,
    ),
    "qwen3_moe-tp2-ep2-dp-reshardable": _MOE.but(
        tp=2,
        ep=2,
        etp=1,
        optimizer_entries=True,
        distributed_optimizer="dp_reshardable",
        common="common_state",
        seed=51,
    ),
    "qwen3_moe-ep2-dp4-saved-again": _MOE.but(
        ep=2, dp=4, etp=1, per_layer_keys=True, saved_again=True, common="common_state", seed=52
    ),
    # One torch.save file per rank.
    "torch-qwen3": _TORCH.but(tied=True, common="no_args", names="te", seed=60),
    "torch-qwen3-tp2": _TORCH.but(
        tp=2, vocab_size_in_args=True, optimizer_entries=True, flat_buffers=True, seed=61
    ),
    "torch-qwen3-tp2-pp2-vpp2-tied": _TORCH.but(
        tp=2, pp=2, vpp=2, layers=8, tied=True, vocab_divisible_by=32, seed=62
    ),
    "torch-qwen3-pp2-uneven": _TORCH.but(
        pp=2,
        layers=5,
        first_stage_layers=2,
        last_stage_layers=3,
        common="no_args",
        dtype="fp32",
        names="te",
        seed=63,
    ),
    "torch-qwen3-tp4-gqa2": _TORCH.but(
        tp=4, kv_heads=2, dtype="fp16", vocab_divisible_by=32, iteration="release", seed=64
    ),
    "torch-qwen3_moe-tp2-pp2-ep2-etp1": _TORCH_MOE.but(tp=2, pp=2, ep=2, etp=1, seed=65),
    "torch-qwen3_moe-tp2-pp2-ep2-etp2": _TORCH_MOE.but(
        tp=2, pp=2, dp=2, ep=2, etp=2, optimizer_entries=True, flat_buffers=True, seed=66
    ),
    "torch-qwen3_moe-tp4-ep2-etp1": _TORCH_MOE.but(tp=4, ep=2, etp=1, names="te", seed=67),
    "torch-qwen3_moe-tp4-ep2-etp2": _TORCH_MOE.but(tp=4, ep=2, etp=2, dtype="fp32", seed=71),
    "torch-qwen3_moe-ep4-dp4": _TORCH_MOE.but(ep=4, dp=4, names="te", tied=True, seed=68),
    "torch-qwen3_moe-mixed-pp2": _TORCH_MOE.but(
        pp=2, moe_layer_freq=(0, 1, 1, 0), fp32_router=True, iteration="release", seed=69
    ),
    "torch-qwen3_moe-grouped-mlp": _TORCH_MOE.but(
        tp=2, dp=2, ep=2, names="grouped_mlp", flat_buffers=True, seed=70
    ),
    "torch-qwen3_moe-tp2-in-turns": _TORCH_MOE.but(tp=2, names="te", glu_block=8, seed=72),
    # DTensors of Megatron-FSDP and of torch's FSDP2.
    "fsdp-qwen3-dp2": _FSDP.but(dp=2, names="te", optimizer_entries=True, seed=80),
    "fsdp-qwen3-tp2-dp2": _FSDP.but(tp=2, dp=2, tied=True, main_weights=False, seed=81),
    "fsdp-qwen3-tp2-dp2-fused": _FSDP.but(
        tp=2, dp=2, split_halves=False, common="no_args", seed=82
    ),
    "fsdp-qwen3_moe-ep2-dp4": _FSDP_MOE.but(
        ep=2, dp=4, names="te", optimizer_entries=True, iteration="release", seed=83
    ),
    "fsdp-qwen3_moe-tp2-dp2-ep2-etp1": _FSDP_MOE.but(tp=2, dp=2, ep=2, etp=1, seed=84),
    "fsdp-qwen3_moe-tp2-dp2-ep2-etp2": _FSDP_MOE.but(
        tp=2, dp=2, ep=2, names="te", moe_layer_freq=(0, 1, 1, 1), main_weights=False, seed=85
    ),
    "dcp-qwen3-dp2": _DCP.but(dp=2, names="te", optimizer_entries=True, seed=90),
    "dcp-qwen3-dp3": _DCP.but(dp=3, iteration="release", seed=91),
    "dcp-qwen3-tp2-dp2": _DCP.but(tp=2, dp=2, seed=92),
    "dcp-qwen3_moe-dp2": _DCP_MOE.but(dp=2, fp32_router=False, seed=93),
    "dcp-qwen3_moe-dp3": _DCP_MOE.but(dp=3, experts=4, names="te", common="no_args", seed=94),
    # One zarr array per tensor, by the last megatron-core that wrote them.
    "zarr-qwen3-tp2": _ZARR.but(tp=2, vocab_size_in_args=True, optimizer_entries=True, seed=100),
    "zarr-qwen3_moe-tp2-pp2-ep2": _ZARR_MOE.but(tp=2, pp=2, ep=2, etp=1, seed=101),
}
"""Of every format and layout. What is a family's own is in `families`."""

_PEFT = _DENSE.but(adapter="ms-swift", lora_alpha=32)
_BRIDGE = _DENSE.but(adapter="megatron-bridge", common="no_args")
_EXPERTS = {"family": "qwen3_moe", "experts": 8, "vocab_size": 301}
_LATENT = _DENSE.but(
    family="deepseek_v3",
    kv_heads=8,
    head_dim=8,
    kv_lora=24,
    q_lora=32,
    experts=4,
    shared_ffn=96,
    moe_layer_freq=(0, 1, 1, 1),
    expert_bias=True,
    routed_scaling=2.5,
    rope_theta=10_000,
    vocab_size=301,
    lora_targets=(
        "linear_q_down_proj",
        "linear_q_up_proj",
        "linear_kv_down_proj",
        "linear_kv_up_proj",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    ),
)
_DELTA_NETS = _DENSE.but(
    family="qwen3_5_text",
    lora_targets=("in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"),
)

ADAPTED: dict[str, Spec] = {
    "swift-qwen3": _PEFT.but(seed=120),
    "swift-qwen3-tp2-only": _PEFT.but(tp=2, adapter_only=True, seed=121),
    "swift-qwen3-tp4-rslora-head": _PEFT.but(
        tp=4, rank_stabilised=True, trains_head=True, vocab_divisible_by=32, seed=122
    ),
    "swift-qwen3_moe-tp2-pp2-ep2-only": _PEFT.but(
        **_EXPERTS,
        tp=2,
        pp=2,
        ep=2,
        etp=1,
        adapter_only=True,
        lora_targets=("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "router"),
        seed=123,
    ),
    "swift-qwen3_moe-mixed-fp32": _PEFT.but(
        **_EXPERTS, tp=2, etp=1, moe_layer_freq=(0, 1, 1, 1), dtype="fp32", seed=124
    ),
    "bridge-qwen3-tp2": _BRIDGE.but(tp=2, seed=125),
    "bridge-qwen3-pp2-only": _BRIDGE.but(pp=2, tied=True, adapter_only=True, seed=126),
    "bridge-qwen3_moe-only": _BRIDGE.but(**_EXPERTS, adapter_only=True, lora_alpha=12, seed=127),
    "bridge-qwen3-tp2-canonical": _BRIDGE.but(tp=2, adapter="canonical", seed=128),
    "bridge-qwen3-canonical-some-only": _BRIDGE.but(
        adapter="canonical", lora_targets=("linear_qkv", "linear_fc1"), adapter_only=True, seed=129
    ),
    "swift-deepseek_v3-tp2-only": _LATENT.but(
        adapter="ms-swift", tp=2, ep=2, etp=1, adapter_only=True, seed=130
    ),
    "bridge-deepseek_v3-tp2": _LATENT.but(
        adapter="megatron-bridge", common="no_args", tp=2, etp=1, seed=131
    ),
    "bridge-qwen3_5_text-tp2-only": _DELTA_NETS.but(
        adapter="megatron-bridge", tp=2, adapter_only=True, seed=132
    ),
    # The base models of those that are only an adapter: the same model by its seed, cut otherwise.
    "swift-qwen3-tp2-only-base": _DENSE.but(pp=2, seed=121),
    "swift-qwen3_moe-tp2-pp2-ep2-only-base": _MOE.but(ep=2, dp=2, etp=1, seed=123),
    "bridge-qwen3-pp2-only-base": _DENSE.but(tp=2, tied=True, seed=126),
    "bridge-qwen3_moe-only-base": _MOE.but(tp=2, seed=127),
    "swift-deepseek_v3-tp2-only-base": _LATENT.but(seed=130),
    "bridge-qwen3_5_text-tp2-only-base": _DELTA_NETS.but(seed=132),
    "bridge-qwen3-canonical-some-only-base": _DENSE.but(tp=2, common="no_args", seed=129),
}
"""Models with LoRA modules, and models to which an adapter belongs."""

HEADED: dict[str, Spec] = {
    "scores-qwen3-tp2-pp2": _DENSE.but(tp=2, pp=2, labels=3, seed=140),
    "scores-qwen3_moe-ep2": _MOE.but(ep=2, dp=2, etp=1, labels=1, common="no_args", seed=141),
    "scores-torch-llama-tp2": _TORCH.but(family="llama", tp=2, names="te", labels=1, seed=142),
    "embeds-qwen3-tp2": _DENSE.but(tp=2, tied=True, bare=True, seed=143),
    "embeds-torch-qwen2-pp2": _TORCH.but(family="qwen2", head_dim=8, pp=2, bare=True, seed=144),
}
"""Models that put out something else than words."""
