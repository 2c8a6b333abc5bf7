"""Is a fixture what it says? Its Megatron model must compute the logits of its transformers model.

Checked by each rank before it saves, with megatron-core's own modules, so that the tables in
`families` rest on more than having been read twice: every parameter takes part in the logits, and
so does every argument that says how they are used. Only where there is one pipeline stage, no
context parallelism, an oracle whose weights are the model's, and a model that megatron-core can
compute.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe import moe_utils
from torch import Tensor
from transformers import AutoModelForCausalLM

from .megatron_model import build_models
from .spec import Spec
from .stand_ins import CudaMeansCpu

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
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    torch.save(model(_tokens(spec)).logits, path)


@torch.no_grad()
def check(spec: Spec, model: GPTModel, expected: Path) -> None:
    """Raises AssertionError where Megatron's `model` makes something else of them. Collective."""
    CudaRNGStatesTracker.fork = lambda *_: nullcontext()  # only dropout uses it, and there is none
    moe_utils.te_general_gemm = None  # megatron-core 0.16.1 forgets this name without TE
    (exact,) = build_models(spec.but(dtype="fp32"))
    exact.load_state_dict(model.state_dict())
    found, wanted = _logits(spec, exact.eval()), torch.load(expected)
    difference, scale = ((a.abs().max().item()) for a in (found - wanted, wanted))
    if not difference < TOLERANCE * max(scale, 1.0):
        raise AssertionError(f"logits of magnitude {scale:.2f} differ by {difference:.2g}")


def _logits(spec: Spec, model: GPTModel) -> Tensor:
    tokens = _tokens(spec)
    length = tokens.shape[1]
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    with CudaMeansCpu():  # for the mask of a sliding window
        local = model(tokens, torch.arange(length)[None], mask)
    parts = [torch.empty_like(local) for _ in range(spec.tp)]
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim=-1)[..., : spec.vocab_size]
