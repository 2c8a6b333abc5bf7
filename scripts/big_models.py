"""Which rank of a large run saves which part of which tensor, as megatron-core cuts them.

Facts: Megatron-LM:megatron/core/ models/gpt/gpt_model.py, transformer/{mlp,moe/experts,
multi_latent_attention,multi_token_prediction}.py (names, axes, cuts; `_extra_state`),
optimizer/distrib_optimizer.py (sharded_param_state_*), distributed/param_and_grad_buffer.py
(buckets), parallel_state.py (order of ranks). tests/test_big_metadata.py compares what comes of it
with checkpoints that megatron-core wrote.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

Shape = tuple[int, ...]
Optimizer = Literal["none", "fully_reshardable", "fully_sharded_model_space", "dp_reshardable"]
STATES = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """What one rank saves of a tensor; without sizes, an object."""

    key: str
    shape: Shape = ()
    offsets: Shape = ()
    sizes: Shape | None = None
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Parameter:
    """A parameter on all ranks of its stage."""

    key: str
    shape: Shape
    cut: int | None = None
    """The axis cut by tensor parallelism; None: all ranks have the same."""
    gated: bool = False
    """Rows of the gate, then of what it gates: two chunks of each rank."""
    stacked: tuple[tuple[int, int], ...] = ()
    """(index, size) of the axes before, each of which a chunk has one of: layer, expert."""
    expert: int | None = None
    is_buffer: bool = False
    """In no optimizer."""

    def pieces(self, rank: int, ranks: int) -> list[Piece]:
        """What `rank` of so many tensor-parallel ones holds."""
        before = tuple(index for index, _ in self.stacked)
        shape = (*(size for _, size in self.stacked), *self.shape)
        sizes, offsets = list(self.shape), [0] * len(self.shape)
        starts = [0]
        if self.cut is not None:
            sizes[self.cut] //= ranks * (2 if self.gated else 1)
            starts = [rank * sizes[self.cut]]
            if self.gated:
                starts.append(self.shape[self.cut] // 2 + starts[0])
        made = []
        for start in starts:
            if self.cut is not None:
                offsets[self.cut] = start
            where, size = (*before, *offsets), (*(1,) * len(before), *sizes)
            made.append(
                Piece(self.key, shape, where, size, "float32" if self.is_buffer else "bfloat16")
            )
        return made

    def numel(self, ranks: int) -> int:
        """How many elements one rank has."""
        return math.prod(self.shape) // (1 if self.cut is None else ranks)

    @property
    def has_extra_state(self) -> bool:
        """TransformerEngine's linear layers do."""
        return self.key.endswith(".weight") and (".linear_" in self.key or ".eh_proj" in self.key)

    @property
    def extra_state(self) -> Piece:
        axes = self.stacked or ((0, 1),)
        index, size = (".".join(map(str, numbers)) for numbers in zip(*axes, strict=True))
        return Piece(f"{self.key.removesuffix('weight')}_extra_state/shard_{index}_{size}")


@dataclass(frozen=True)
class Run:
    """A model, and the layout that trains it."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    experts: int
    moe_ffn: int
    ffn: int
    topk: int
    tp: int
    pp: int
    ep: int
    etp: int
    world: int
    stages: tuple[int, ...]
    """Layers in each pipeline stage."""
    groups: int = 0
    head_dim: int = 128
    dense_layers: int = 0
    """How many come first; then no layer axis is stored."""
    shared_ffn: int = 0
    latent: tuple[int, int, int, int, int] | None = None
    """q_lora, kv_lora, qk_nope, qk_rope, v of multi-latent attention."""
    mtp: bool = False
    optimizer: Optimizer = "none"
    bucket: int = 40_000_000
    """Parameters in a bucket of the distributed optimizer."""
    args: dict[str, object] = field(default_factory=dict)

    @property
    def dp(self) -> int:
        return self.world // (self.tp * self.pp)

    @property
    def edp(self) -> int:
        return self.world // (self.etp * self.ep * self.pp)

    def saved(self) -> dict[int, list[Piece]]:
        """What each rank writes, in the order of its state dict."""
        ranks: dict[int, list[Piece]] = {rank: [] for rank in range(self.world)}
        first = 0
        for stage, count in enumerate(self.stages):
            parameters = list(self._stage(stage, range(first, first + count)))
            first += count
            self._save_model(stage, parameters, ranks)
            if self.optimizer in ("fully_sharded_model_space", "dp_reshardable"):
                self._save_buckets(stage, parameters, ranks)
        for rank, pieces in ranks.items():
            pieces.append(Piece(f"rng_state/shard_{rank}_{self.world}"))
        return ranks

    def _rank(self, stage: int, group: int, member: int, parallel: int) -> int:
        """Of member `member` of the data-parallel group number `group` in a stage."""
        return stage * (self.world // self.pp) + member * parallel + group

    def _groups(self, is_expert: bool) -> tuple[int, int, int]:
        """(tensor-parallel ranks, ranks that hold different parameters, ranks that hold alike)."""
        if is_expert:
            return self.etp, self.etp * self.ep, self.edp
        return self.tp, self.tp, self.dp

    def _held(self, parameters: Sequence[Parameter], group: int, expert: bool) -> list[Parameter]:
        """Those that a data-parallel group has."""
        local = self.experts // self.ep
        return [
            parameter
            for parameter in parameters
            if (parameter.expert is not None) == expert
            and (parameter.expert is None or parameter.expert // local == group // self.etp)
        ]

    def _save_model(
        self, stage: int, parameters: Sequence[Parameter], ranks: dict[int, list[Piece]]
    ) -> None:
        """Each part once, the members of a data-parallel group taking turns."""
        states = STATES if self.optimizer == "fully_reshardable" else ()
        for expert in (False, True):
            tensor, groups, members = self._groups(expert)
            for group in range(groups):
                turn = itertools.cycle(range(members))
                rank = group % tensor
                held = self._held(parameters, group, expert)
                held = [p for p in held if p.cut is not None or rank == 0]
                for state, parameter in itertools.product(("", *states), held):
                    if state and parameter.is_buffer:
                        continue
                    owner = ranks[self._rank(stage, group, next(turn), groups)]
                    for piece in parameter.pieces(rank, tensor):
                        owner.append(in_optimizer(piece, state) if state else piece)
                    if rank == 0 and not state and parameter.has_extra_state:
                        ranks[self._rank(stage, group, 0, groups)].append(parameter.extra_state)

    def _save_buckets(
        self, stage: int, parameters: Sequence[Parameter], ranks: dict[int, list[Piece]]
    ) -> None:
        """The optimizer's share of each rank: a run of each bucket, which cuts parameters."""
        for expert in (False, True):
            tensor, groups, members = self._groups(expert)
            for group in range(groups):
                held = self._held(parameters, group, expert)
                held = [p for p in reversed(held) if not p.is_buffer]
                if not held:
                    continue
                prefix = f"chained_{int(expert)}.optimizer.distributed.dp_group_idx_"
                prefix += str(stage * groups + group)
                if self.optimizer == "dp_reshardable":
                    for name in ("optimizer", "per_bucket_numel", "per_bucket_numel_unpadded"):
                        rank = self._rank(stage, group, 0, groups)
                        ranks[rank].append(Piece(f"{prefix}.{name}/shard_0_1"))
                for number, bucket in enumerate(self._buckets(held, tensor)):
                    key = f"{prefix}.gbuf_idx_0.dtype_(torch.bfloat16, torch.bfloat16)"
                    key += f".bucket_idx_{number}"
                    for member, state, piece in self._shares(key, bucket, tensor, group, members):
                        rank = self._rank(stage, group, member, groups)
                        ranks[rank].append(in_bucket(piece, state))

    def _buckets(self, held: Sequence[Parameter], tensor: int) -> Iterator[list[Parameter]]:
        bucket: list[Parameter] = []
        for parameter in held:
            bucket.append(parameter)
            if sum(p.numel(tensor) for p in bucket) >= self.bucket:
                yield bucket
                bucket = []
        if bucket:
            yield bucket

    def _shares(
        self, key: str, bucket: Sequence[Parameter], tensor: int, group: int, members: int
    ) -> Iterator[tuple[int, str, Piece]]:
        """(member, state, piece) of each run of one parameter (or of padding) on one member."""
        runs: list[tuple[int, int, Parameter | None]] = []
        end = 0
        for parameter in bucket:
            start = -(-end // 64) * 64
            if start > end:
                runs.append((end, start, None))
            end = start + parameter.numel(tensor)
            runs.append((start, end, parameter))
        share = -(-end // math.lcm(members, 128)) * math.lcm(members, 128) // members
        for start, stop, owner in runs:
            for member in range(start // share, (stop - 1) // share + 1):
                low, high = max(start, member * share), min(stop, (member + 1) * share)
                for state in STATES:
                    if self.optimizer == "dp_reshardable":
                        piece = Piece(key, (end,), (low,), (high - low,))
                        yield member, state, piece
                    elif owner is not None and (owner.cut is not None or group == 0):
                        yield from (
                            (member, state, piece)
                            for piece in _flattened(
                                owner.pieces(group % tensor, tensor), low - start, high - start
                            )
                        )

    def _stage(self, stage: int, layers: range) -> Iterator[Parameter]:
        """All parameters of a pipeline stage, in the order of its modules."""
        if stage == 0:
            yield Parameter("embedding.word_embeddings.weight", (self.vocab, self.hidden), 0)
        for layer in layers:
            if self.dense_layers:
                yield from self._layer(f"decoder.layers.{layer}.", (), layer >= self.dense_layers)
            else:
                yield from self._layer("decoder.layers.", ((layer, self.layers),), True)
        if stage == len(self.stages) - 1:
            yield Parameter("decoder.final_layernorm.weight", (self.hidden,))
            if self.mtp:
                yield from self._mtp("mtp.layers.0.")
            yield Parameter("output_layer.weight", (self.vocab, self.hidden), 0)

    def _mtp(self, prefix: str) -> Iterator[Parameter]:
        yield Parameter(f"{prefix}enorm.weight", (self.hidden,))
        yield Parameter(f"{prefix}hnorm.weight", (self.hidden,))
        yield Parameter(f"{prefix}eh_proj.weight", (self.hidden, 2 * self.hidden), 0)
        yield from self._layer(f"{prefix}transformer_layer.", (), True)
        yield Parameter(f"{prefix}final_layernorm.weight", (self.hidden,))

    def _layer(
        self, prefix: str, stacked: tuple[tuple[int, int], ...], has_experts: bool
    ) -> Iterator[Parameter]:
        named = self._latent() if self.latent else self._attention()
        for name, shape, cut in named:
            yield Parameter(prefix + name, shape, cut, stacked=stacked)
        if not has_experts:
            norm = f"{prefix}mlp.linear_fc1.layer_norm_weight"
            yield Parameter(norm, (self.hidden,), stacked=stacked)
            yield from self._mlp(f"{prefix}mlp.", self.ffn, stacked, None)
            return
        yield Parameter(f"{prefix}pre_mlp_layernorm.weight", (self.hidden,), stacked=stacked)
        router = f"{prefix}mlp.router."
        yield Parameter(f"{router}weight", (self.experts, self.hidden), stacked=stacked)
        if self.latent:
            yield Parameter(f"{router}expert_bias", (self.experts,), is_buffer=True)
        for expert in range(self.experts):
            axes = (*stacked, (expert, self.experts))
            yield from self._mlp(f"{prefix}mlp.experts.experts.", self.moe_ffn, axes, expert)
        if self.shared_ffn:
            yield from self._mlp(f"{prefix}mlp.shared_experts.", self.shared_ffn, stacked, None)

    def _mlp(
        self, prefix: str, ffn: int, stacked: tuple[tuple[int, int], ...], expert: int | None
    ) -> Iterator[Parameter]:
        name, shape = f"{prefix}linear_fc1.weight", (2 * ffn, self.hidden)
        yield Parameter(name, shape, 0, gated=True, stacked=stacked, expert=expert)
        name, shape = f"{prefix}linear_fc2.weight", (self.hidden, ffn)
        yield Parameter(name, shape, 1, stacked=stacked, expert=expert)

    def _attention(self) -> Iterator[tuple[str, Shape, int | None]]:
        prefix, rows = "self_attention.", (self.heads + 2 * self.groups) * self.head_dim
        yield f"{prefix}linear_proj.weight", (self.hidden, self.heads * self.head_dim), 1
        yield f"{prefix}linear_qkv.layer_norm_weight", (self.hidden,), None
        yield f"{prefix}linear_qkv.weight", (rows, self.hidden), 0
        yield f"{prefix}q_layernorm.weight", (self.head_dim,), None
        yield f"{prefix}k_layernorm.weight", (self.head_dim,), None

    def _latent(self) -> Iterator[tuple[str, Shape, int | None]]:
        assert self.latent is not None
        (q, kv, nope, rope, v), prefix = self.latent, "self_attention."
        yield "input_layernorm.weight", (self.hidden,), None
        yield f"{prefix}linear_proj.weight", (self.hidden, self.heads * v), 1
        yield f"{prefix}linear_q_down_proj.weight", (q, self.hidden), 0
        yield f"{prefix}linear_q_up_proj.layer_norm_weight", (q,), None
        yield f"{prefix}linear_q_up_proj.weight", (self.heads * (nope + rope), q), 0
        yield f"{prefix}linear_kv_down_proj.weight", (kv + rope, self.hidden), 0
        yield f"{prefix}linear_kv_up_proj.layer_norm_weight", (kv,), None
        yield f"{prefix}linear_kv_up_proj.weight", (self.heads * (nope + v), kv), 0


def in_optimizer(piece: Piece, state: str) -> Piece:
    return replace(piece, key=f"optimizer.state.{state}.{piece.key}", dtype="float32")


def in_bucket(piece: Piece, state: str) -> Piece:
    if ".bucket_idx_" in piece.key:
        return replace(piece, key=f"{piece.key}.{state}", dtype="float32")
    return in_optimizer(piece, "fp32_param" if state == "param" else state)


def _flattened(pieces: Sequence[Piece], start: int, stop: int) -> Iterator[Piece]:
    """Elements [start, stop) of what `pieces` hold one after the other, as megatron-core up to 0.15
    stored them: the shape is (how many chunks on each axis, elements in a chunk)."""
    at = 0
    for piece in pieces:
        assert piece.sizes is not None
        numel = math.prod(piece.sizes)
        low, high = max(start, at), min(stop, at + numel)
        if low < high:
            counts = tuple(n // s for n, s in zip(piece.shape, piece.sizes, strict=True))
            where = tuple(o // s for o, s in zip(piece.offsets, piece.sizes, strict=True))
            yield replace(
                piece,
                shape=(*counts, numel),
                offsets=(*where, low - at),
                sizes=(*(1,) * len(counts), high - low),
            )
        at += numel


def count(ranks: dict[int, list[Piece]]) -> Counter[str]:
    """How many entries of each kind there are."""
    kinds: Counter[str] = Counter()
    for piece in itertools.chain(*ranks.values()):
        if piece.key.startswith(("optimizer.", "chained_")):
            kinds["optimizer"] += 1
        else:
            kinds["model" if piece.sizes else "objects"] += 1
    return kinds


def by_key(pieces: Sequence[Piece]) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        found[piece.key].append(piece)
    return found


_COMMON_ARGS: dict[str, object] = {
    "layernorm_epsilon": 1e-6,
    "norm_epsilon": 1e-6,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}
QWEN3_30B_A3B = Run(
    layers=48,
    hidden=2048,
    heads=32,
    groups=4,
    vocab=151_936,
    experts=128,
    moe_ffn=768,
    ffn=6144,
    topk=8,
    tp=4,
    pp=2,
    ep=4,
    etp=1,
    world=32,
    stages=(24, 24),
    optimizer="fully_reshardable",
    args={**_COMMON_ARGS, "rotary_base": 1_000_000, "max_position_embeddings": 40_960},
)
DEEPSEEK_V3 = Run(
    layers=61,
    hidden=7168,
    heads=128,
    vocab=129_280,
    experts=256,
    moe_ffn=2048,
    ffn=18_432,
    topk=8,
    tp=2,
    pp=16,
    ep=64,
    etp=1,
    world=1024,
    stages=(*(4,) * 15, 1),
    dense_layers=3,
    shared_ffn=2048,
    latent=(1536, 512, 128, 64, 128),
    mtp=True,
    optimizer="fully_reshardable",
    args={
        **_COMMON_ARGS,
        "rotary_base": 10_000,
        "max_position_embeddings": 163_840,
        "multi_latent_attention": True,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_head_dim": 128,
        "qk_pos_emb_head_dim": 64,
        "v_head_dim": 128,
        "qk_layernorm": True,
        "rope_type": None,
        "rotary_scaling_factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "mtp_num_layers": 1,
        "moe_shared_expert_intermediate_size": 2048,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 8,
        "moe_router_group_topk": 4,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_pre_softmax": False,
    },
)
