"""Which family a checkpoint belongs to, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mcorefs.errors import MappingError
from mcorefs.mapping.families import FAMILIES
from mcorefs.mapping.family import Family
from mcorefs.mapping.plan import evidence
from mcorefs.mapping.reference import Reference
from mcorefs.views import View


@dataclass(frozen=True)
class Choice:
    """A family and what speaks for it, in words."""

    family: Family
    evidence: tuple[str, ...]


def choose(
    tensors: Mapping[str, View],
    named: str | None,
    reference: Reference,
    hint: str | None = None,
) -> Choice:
    """The family that the user names, that a reference config names, that the trainer's `hint`
    (a model_type) names if it is one of ours, or that the tensors show.

    Raises MappingError, with the evidence and the near misses, where none or several fit.
    """
    model_type = reference.config.get("model_type")
    if named is not None:
        family = _by_name(named, "--family")
        if model_type not in (None, family.name):
            raise MappingError(
                f"--family is {named} but model_type in {reference.where} is {model_type}; "
                "pass the one that is right",
                [],
            )
        return Choice(family, (f"--family {named}",))
    if isinstance(model_type, str):
        family = _by_name(model_type, f"model_type in {reference.where}")
        return Choice(family, (f"model_type {model_type} in {reference.where}",))
    if (hinted := next((family for family in FAMILIES if family.name == hint), None)) is not None:
        return Choice(hinted, (f"the trainer names model_type {hint}",))
    weighed = [(family, *evidence(family, tensors)) for family in FAMILIES]
    fitting = [(family, reasons) for family, reasons, against in weighed if not against]
    if len(fitting) == 1:
        family, reasons = fitting[0]
        return Choice(family, tuple(reasons))
    nearest = sorted(weighed, key=lambda item: len(item[2]))[:5]
    problems = [f"{family.name}: {'; '.join(against) or 'fits'}" for family, _, against in nearest]
    which = "several model families fit" if fitting else "no supported model family fits"
    raise MappingError(
        f"{which} the tensors of this checkpoint. If you know which it is, pass --family NAME or "
        "--hf-config DIR (the model it was trained from). Nearest, with what speaks against each:",
        problems,
    )


def _by_name(name: str, where: str) -> Family:
    for family in FAMILIES:
        if name in (family.name, family.architecture):
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise MappingError(f"{where} is {name!r}, which is not supported yet. Supported: {known}", [])
