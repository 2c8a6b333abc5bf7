"""`torch`: what Megatron-LM's `--ckpt-format torch` writes, one `torch.save` file per rank.

    iter_0000100/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt

A rank's file holds its modules' own state dict: local layer numbers, local expert numbers, its
part of every parameter. `files` reads them, `ranks` puts them in their places, `stages` makes the
tensors of the whole model from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mcorefs.formats.base import Checkpoint, Replica, WeightsFrom, refusal
from mcorefs.formats.torch_legacy.files import rank_files
from mcorefs.formats.torch_legacy.ranks import Ranks, arrange
from mcorefs.formats.torch_legacy.replicas import between_ranks
from mcorefs.formats.torch_legacy.stages import stage_tensors, stages
from mcorefs.formats.torch_legacy.tensor_parallel import EMBEDDING
from mcorefs.index import StoredTensor
from mcorefs.storage import is_file, sees

HEAD = "output_layer.weight"


class TorchLegacy:
    """Format `torch`."""

    name = "torch"

    def detect(self, path: Path) -> bool:
        return sees(lambda: any(is_file(file) for file, _ in rank_files(path)))

    def index(self, path: Path, weights: WeightsFrom = "model") -> Checkpoint:
        problems: list[str] = []
        if weights == "optimizer":
            problems.append(
                "--weights optimizer: this format keeps the main parameters by number, in buffers "
                "of each rank, which are not read; --weights model serves the model's own weights"
            )
        ranks = arrange(path, problems)
        if ranks is None or problems:
            raise refusal(path, problems)
        tensors, copies = _assembled(ranks, stages(ranks, problems), problems)
        skipped = Counter[str]()
        for file in ranks.files:
            skipped.update(file.skipped)
        if any(copy.fqn == HEAD for copy in copies):
            skipped["copy of the tied embedding"] += 1
        if problems:
            raise refusal(path, list(dict.fromkeys(problems)))
        identities = {file.path: file.identity for file in ranks.files}
        source = ranks.files[0].args_source
        return Checkpoint(self.name, path, tensors, ranks.args, source, identities, dict(skipped))

    def replicas(self, path: Path) -> Iterator[Replica]:
        """See `KeepsReplicas`. Raises CheckpointError as `index` does."""
        problems: list[str] = []
        ranks = arrange(path, problems)
        if ranks is None or problems:
            raise refusal(path, problems)
        order = stages(ranks, problems)
        tensors, copies = _assembled(ranks, order, problems)
        first, last = "the first pipeline stage", "a later one"
        for copy in copies:
            yield Replica(copy.fqn, tensors[EMBEDDING], first, copy, last)
        yield from between_ranks(ranks, {(pp, stage): layer for pp, stage, layer in order})


def _assembled(
    ranks: Ranks, order: Sequence[tuple[int, int, int]], problems: list[str]
) -> tuple[dict[str, StoredTensor], list[StoredTensor]]:
    """(the tensors of the model by name, the copies of its embedding in later stages)."""
    tensors: dict[str, StoredTensor] = {}
    copies: list[StoredTensor] = []
    for pp, stage, first_layer in order:
        for name, tensor in stage_tensors(ranks, pp, stage, first_layer, problems):
            if name not in tensors:
                tensors[name] = tensor
            elif name == EMBEDDING:  # the stage with the MTP layers holds a copy of it
                copies.append(tensor)
            else:
                problems.append(f"{name} is held by more than one pipeline stage")
    if _has_tied_copy(ranks, tensors, problems):
        copies.append(tensors.pop(HEAD))
    return tensors, copies


def _has_tied_copy(ranks: Ranks, tensors: Mapping[str, StoredTensor], problems: list[str]) -> bool:
    """Whether the last stage's output layer is its copy of the embedding: what it holds when the
    two are tied and lie in different stages (megatron/core/models/gpt/gpt_model.py)."""
    apart = ranks.pp * ranks.virtual > 1
    tied = ranks.args.get("untie_embeddings_and_output_weights") is False
    if not (tied and apart and HEAD in tensors and EMBEDDING in tensors):
        return False
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    if head.shape != embedding.shape or head.dtype != embedding.dtype:
        problems.append(
            f"{HEAD} should be a copy of the embedding (they are tied in the training arguments) "
            f"but is {list(head.shape)} where the embedding is {list(embedding.shape)}"
        )
    return True
