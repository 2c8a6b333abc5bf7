"""What a model was trained to put out, and what that makes of its family.

    causal_lm   output_layer.weight [vocabulary, hidden]    lm_head.weight; XForCausalLM
    seq_cls     output_layer.weight [labels, hidden]        score.weight; XForSequenceClassification
    embedding   no output layer                             XModel, whose names have no prefix

The last two are ms-swift's (classifiers, reward models, rerankers; embedding models), which says so
in `task_type`. Layout facts: mcore-bridge:src/mcore_bridge/model/gpt_model.py OutputLayerLinear,
bridge/gpt_bridge.py _convert_post_process, and hf_score_key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, get_args

from mcorefs.errors import MappingError
from mcorefs.mapping.blocks.model import HEAD
from mcorefs.mapping.blocks.names import EMBEDDING, OUTPUT
from mcorefs.mapping.family import Facts, Family, Key, Proven, Soft, whole
from mcorefs.views import View

Task = Literal["causal_lm", "seq_cls", "embedding"]
TASKS: tuple[Task, ...] = get_args(Task)
_GENERATES = ("causal_lm", "generative_reranker")
_SCORE = replace(HEAD, hf="score.weight", shape=("labels", "hidden"), block=whole)
_PREFIXES = ("model.", "transformer.")


def task_of(tensors: Mapping[str, View], stated: str | None) -> tuple[Task, list[str]]:
    """(what canonical `tensors` are for, what speaks against that); `stated`: by the user or the
    trainer, in ms-swift's words."""
    if stated == "embedding":
        return "embedding", []
    if stated == "seq_cls":
        missing = f"its task is seq_cls, but the checkpoint holds no {OUTPUT}"
        return "seq_cls", [] if OUTPUT in tensors else [missing]
    problems = []
    if stated is not None and stated not in _GENERATES:
        problems.append(f"it was trained for the task {stated!r}, which is not known")
    head, words = (tensors.get(name) for name in (OUTPUT, EMBEDDING))
    if head is not None and words is not None and head.shape[:1] < words.shape[:1]:
        rows = head.shape[0] if head.shape else 0
        kind = "a value head (an RL critic) or a reward model" if rows == 1 else "a classifier"
        problems.append(
            f"{OUTPUT} has {rows} row{'s' * (rows != 1)} where the vocabulary has "
            f"{words.shape[0]}: this is no language model but {kind}; --task seq_cls presents it "
            "as a model ForSequenceClassification (score.weight)"
        )
    return "causal_lm", problems


def for_task(family: Family, task: Task, facts: Facts, reference: Mapping[str, object]) -> Family:
    """`family` with the head that `task` has; `reference`: a config.json of the model.

    Raises MappingError where transformers has no such class."""
    if task == "causal_lm":
        return family
    if family.only_words:
        raise MappingError(
            f"transformers has {family.architecture}, but no class of that family for {task}", []
        )
    if family.sections:
        raise MappingError(f"{family.architecture} is not served for the task {task}", [])
    stem = family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    body = tuple(rule for rule in family.rules if rule.source != OUTPUT)
    config = {**family.config, "tie_word_embeddings": Key(_tied, default=False)}
    if task == "embedding":
        return family.but(
            architecture=f"{stem}Model",
            rules=tuple(replace(rule, hf=_without_prefix(rule.hf)) for rule in body),
            config=config,
        )
    numbers = range(facts.dims.get("labels", 0))
    by_number = {str(number): f"LABEL_{number}" for number in numbers}
    by_name = {name: int(number) for number, name in by_number.items()}
    named = reference.get("id2label")
    fits = isinstance(named, dict) and len(named) == len(numbers)
    kind = Soft if fits else Proven
    return family.but(
        architecture=f"{stem}ForSequenceClassification",
        rules=(*body, _SCORE),
        config={
            **config,
            "id2label": Key(lambda facts: kind(by_number)),
            "label2id": Key(lambda facts: kind(by_name)),
        },
    )


def _without_prefix(name: str) -> str:
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def _tied(facts: Facts) -> object | None:
    """What the run says: there is no output layer of words that could show it."""
    untied = facts.arg("untie_embeddings_and_output_weights")
    return None if untied is None else Soft(not untied)
