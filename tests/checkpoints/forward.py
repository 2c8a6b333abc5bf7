"""Is a fixture what it says? Megatron loads the checkpoint back and computes logits; so does
transformers with the oracle; they must agree. Run as `python -m tests.checkpoints.forward NAME...`.

Every tensor of the model takes part in the logits, so a wrong slice anywhere shows. Only for
fixtures that need one pipeline stage and no context parallelism, and whose common state is in
`common.pt`, where megatron-core 0.16 looks for it.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe import moe_utils
from torch import Tensor
from transformers import AutoModelForCausalLM

from .launcher import run_all
from .megatron_writer import (
    build_models,
    destroy_parallel,
    init_parallel,
    model_states,
)
from .pool import Fixture, ensure
from .spec import Spec
from .stand_ins import prepare

TOLERANCE = 1e-4
"""In fp32, of logits of magnitude 1; a swapped pair of heads makes a difference of 0.1 and more."""


def is_checkable(spec: Spec) -> bool:
    whole = spec.format == "torch_dist" and spec.common != "common_state"
    return whole and spec.pp == spec.cp == 1 and spec.oracle_weights == "model"


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    prepare()
    CudaRNGStatesTracker.fork = lambda *_: nullcontext()  # only dropout uses it, and there is none
    moe_utils.te_general_gemm = None  # megatron-core 0.16.1 forgets this name without TE
    for name, fixture in ensure(names).items():
        check(fixture)
        sys.stdout.write(f"{name}: logits agree\n")


def check(fixture: Fixture) -> None:
    with tempfile.TemporaryDirectory() as work:
        tokens = torch.arange(0, fixture.spec.vocab_size, 9)[None]
        expected = Path(work) / "logits.pt"
        deadline = time.monotonic() + 120
        run_all([lambda: torch.save(_hf_logits(fixture, tokens), expected)], deadline)
        ranks = [
            lambda rank=rank: _compare(fixture, rank, Path(work) / "rendezvous", tokens, expected)
            for rank in range(fixture.spec.world)
        ]
        run_all(ranks, deadline)


@torch.no_grad()
def _hf_logits(fixture: Fixture, tokens: Tensor) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(fixture.hf).float()
    logits: Tensor = model(tokens).logits
    return logits


def _compare(fixture: Fixture, rank: int, rendezvous: Path, tokens: Tensor, expected: Path) -> None:
    init_parallel(fixture.spec, rank, rendezvous, timeout_s=60)
    actual = _megatron_logits(fixture, tokens)
    if rank == 0:
        wanted = torch.load(expected)
        difference = (actual - wanted).abs().max().item()
        scale = wanted.abs().max().item()
        if not difference < TOLERANCE * max(scale, 1.0):
            raise AssertionError(f"logits of magnitude {scale:.2f} differ by {difference:.2g}")
    destroy_parallel()


@torch.no_grad()
def _megatron_logits(fixture: Fixture, tokens: Tensor) -> Tensor:
    spec = fixture.spec
    state = dist_checkpointing.load(
        model_states(spec, build_models(spec)),
        str(fixture.iteration),
        validate_access_integrity=False,
    )
    (model,) = build_models(spec.but(dtype="fp32"))
    model.load_state_dict(state["model"])
    model.eval()
    positions = torch.arange(tokens.shape[1])[None]
    mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1]).triu(1).bool()
    local = model(tokens, positions, mask)
    parts = [torch.empty_like(local) for _ in range(spec.tp)]
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim=-1)[..., : spec.vocab_size]


if __name__ == "__main__":
    main(sys.argv[1:])
