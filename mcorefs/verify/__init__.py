"""Checking a checkpoint: against a directory, its own manifest, its checksums, itself."""

from __future__ import annotations

from mcorefs.verify.compare import Verdict, verify
from mcorefs.verify.findings import Difference, Findings

__all__ = ["Difference", "Findings", "Verdict", "verify"]
