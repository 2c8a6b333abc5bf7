"""Which family a checkpoint belongs to, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mcorefs.errors import MappingError
from mcorefs.mapping.families import FAMILIES
from mcorefs.mapping.families.falcon_h1 import FALCON_H1
from mcorefs.mapping.families.nemotron_h import NEMOTRON_H
from mcorefs.mapping.families.step3p5 import STEP3P5
from mcorefs.mapping.family import Facts, Family
from mcorefs.mapping.plan import against, doubts
from mcorefs.mapping.reference import Reference
from mcorefs.names import VISION
from mcorefs.views import View

_OTHERS: Mapping[str, str] = {
    r"cross_attention\.": "a T5: an encoder and a decoder",
    r"(?:binary_head|pooler|embedding\.tokentype_embeddings)\.": "a BERT: an encoder",
    r"(?:.*\.)?(?:vision_model|vision_projection|visual)\.": "a vision-language model",
}
"""What else Megatron trains, by the beginning of a tensor's name (in its layer, if it is in one):
Megatron-LM:megatron/core/models/{T5/t5_model,bert/bert_model,multimodal/llava_model}.py."""
_NOT_YET: Mapping[str, str] = {
    "step3p7": (
        "what sees for it has no place here; its language model is a Step-3.5, which is supported "
        "by itself (step3p5)"
    ),
}
"""Families that trainers name, and why they are not here."""
_STEP35_ARGUMENTS = ("head_wise_attn_gate", "sliding_attention_setting")
_GATES_OF_ELEMENTS = (
    "it is a Step-3.5 that was trained with attention_output_gate, which gives each element of a "
    "head a gate of its own, where the Hugging Face model has one gate for each head: Megatron-"
    "Bridge does so where its megatron-core knows no head_wise_attn_gate. Its export keeps the "
    "first gate of each head, which loses what the others have learnt"
)
"""Megatron-Bridge:src/megatron/bridge/models/stepfun/step35_bridge.py provider_bridge, models/
conversion/param_mapping.py split_qkvg_weights."""
_HYBRIDS: Mapping[str, Family] = {
    r"(?:.*\.)?mamba_mixer\.": FALCON_H1,
    r"(?:.*\.)?mixer\.": NEMOTRON_H,
}
"""By the beginning of a name in Mamba mixers, beside attention in one layer or in their own
(Megatron-Bridge:src/megatron/bridge/models/falcon_h1/modeling_falconh1/falconh1_layer.py,
Megatron-LM:megatron/core/ssm/mamba_layer.py)."""
_IN_LAYER = re.compile(r"(?:encoder|decoder)\.layers\.\*\.")


@dataclass(frozen=True)
class Choice:
    """A family and what speaks for it, in words."""

    family: Family
    evidence: tuple[str, ...]


def choose(
    tensors: Mapping[str, View],
    facts: Facts,
    named: str | None,
    reference: Reference,
    hint: str | None = None,
) -> Choice:
    """The family that the user names, that a reference config names, that the trainer's `hint`
    (a model_type) names if it is one of ours, or that tensors and arguments show.

    Raises MappingError, with the evidence and the near misses, where none or several fit.
    """
    model_type = reference.config.get("model_type")
    _refuse_what_is_not_yet(facts, named, model_type, hint)
    if named is not None:
        family = by_name(named, "--family")
        if model_type is not None and not family.is_called(model_type):
            raise MappingError(
                f"--family is {named} but model_type in {reference.where} is {model_type}; "
                "pass the one that is right",
                [],
            )
        return Choice(family, (f"--family {named}",))
    if isinstance(model_type, str):
        family = by_name(model_type, f"model_type in {reference.where}")
        return Choice(family, (f"model_type {model_type} in {reference.where}",))
    hinted = next((family for family in FAMILIES if family.is_called(hint)), None)
    # Of a model that sees, a run may have trained but the language model.
    if hinted is not None and bool(hinted.sections) <= _sees(facts):
        return Choice(hinted, (f"the trainer names model_type {hint}",))
    return _shown(tensors, facts)


def _refuse_what_is_not_yet(
    facts: Facts, named: str | None, model_type: object, hint: str | None
) -> None:
    """Raises MappingError for a family of `_NOT_YET`, by the first that names any, and for a
    Step-3.5, by its name or its arguments, whose gates no Hugging Face model has."""
    name = named or model_type or hint
    if (why := _NOT_YET.get(str(name))) is not None:
        raise MappingError(f"it is a {name}, which is not supported yet: {why}", [])
    is_step = STEP3P5.is_called(name) or any(facts.arg(one) for one in _STEP35_ARGUMENTS)
    if is_step and facts.arg("attention_output_gate"):
        raise MappingError(_GATES_OF_ELEMENTS, [])


def _shown(tensors: Mapping[str, View], facts: Facts) -> Choice:
    """The family that has a use for each kind of tensor there is; of several, the one against which
    the fewest shapes and arguments speak. What else speaks against it is for planning to report."""
    sees = _sees(facts)
    families = [family for family in FAMILIES if bool(family.sections) == sees]
    weighed = {family.name: against(family, facts) for family in families}
    fitting = [family for family in families if not weighed[family.name]]
    if not fitting:
        if (other := _other(facts)) is not None:
            near = [_not_that(name, weighed[name]) for name in weighed if sees]
            raise MappingError(f"it is {other}, which is not supported yet", near)
        if (hybrid := _hybrid(facts)) is not None:
            raise MappingError(
                "it is a hybrid of Mamba and others, of which only "
                f"{' and '.join(family.name for family in _HYBRIDS.values())} are supported yet; "
                f"what speaks against {hybrid.name}:",
                against(hybrid, facts),
            )
        close = {family.name: doubts(family, tensors, facts) for family in families}
        raise _undecided("no supported model family fits", weighed, close, facts)
    doubted = {family.name: doubts(family, tensors, facts) for family in fitting}
    fitting.sort(key=lambda family: (family.named_only, len(doubted[family.name])))
    best, *others = fitting
    rivals = [other for other in others if len(doubted[other.name]) <= len(doubted[best.name])]
    # Where nothing is recorded there is nothing to doubt either: then nobody named such a family.
    if not facts.args:
        rivals = [rival for rival in rivals if not rival.named_only]
    if rivals or best.named_only:
        raise _undecided("several model families fit", doubted, doubted, facts)
    return Choice(
        best,
        (*_evidence(weighed), *(f"not {other.name}: {doubted[other.name][0]}" for other in others)),
    )


def _sees(facts: Facts) -> bool:
    return any(kind.startswith(VISION) for kind in facts.kinds)


def _not_that(name: str, reasons: Sequence[str]) -> str:
    more = f"; and {len(reasons) - 4} more" if len(reasons) > 4 else ""
    return f"no {name}: {'; '.join(reasons[:4])}{more}"


def _other(facts: Facts) -> str | None:
    """What it is, if it is of a kind that no family here is of."""
    names = _in_layers(facts)
    found = (what for begin, what in _OTHERS.items() if any(re.match(begin, n) for n in names))
    return next(found, None)


def _hybrid(facts: Facts) -> Family | None:
    """The family that a model with Mamba mixers is nearest to; None if it has none."""
    names = _in_layers(facts)
    found = (one for begin, one in _HYBRIDS.items() if any(re.match(begin, n) for n in names))
    return next(found, None)


def _in_layers(facts: Facts) -> list[str]:
    """The kinds of tensors, by their names in a layer where they are in one."""
    return [_IN_LAYER.sub("", kind) for kind in sorted(facts.kinds)]


def _evidence(weighed: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What rules out all other families, as briefly as that goes without layers for multi-token
    prediction, which hold once more what those of the decoder hold."""

    def weight(reason: str) -> tuple[bool, int, bool, int]:
        return ("mtp." in reason, -counts[reason], reason.startswith("lacks "), len(reason))

    left = [against for against in weighed.values() if against]
    while left:
        counts = Counter(reason for against in left for reason in against)
        most = min(counts, key=weight)
        yield re.sub("^lacks ", "no ", most)
        left = [against for against in left if most not in against]


def _undecided(
    which: str,
    weighed: Mapping[str, Sequence[str]],
    doubted: Mapping[str, Sequence[str]],
    facts: Facts,
) -> MappingError:
    """What is `weighed` is told; of what is equally near, the less `doubted` comes first."""
    hint = " --no-mtp leaves out its multi-token prediction." if facts.dims.get("mtp") else ""
    nearest = sorted(weighed, key=lambda name: (len(weighed[name]), len(doubted[name])))[:5]
    return MappingError(
        f"{which} the tensors of this checkpoint. If you know which it is, pass --family NAME or "
        f"--hf-config DIR (the model it was trained from).{hint} Nearest, with what speaks against "
        "each:",
        [f"{name}: {'; '.join(weighed[name]) or 'fits'}" for name in nearest],
    )


def by_name(name: str, where: str) -> Family:
    """The family that is called `name`. Raises MappingError if there is none."""
    for family in FAMILIES:
        if family.is_called(name):
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise MappingError(f"{where} is {name!r}, which is not supported yet. Supported: {known}", [])
