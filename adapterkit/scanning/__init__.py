"""Scan what an adapter from a stranger could do: evidence with a severity, never a proof.

A file without findings is not proven harmless, and a finding is not proof of intent: each names what was seen, where,
and why it matters. Nothing of the files is executed or imported; pickles are read as lists of opcodes.
"""

from __future__ import annotations

from .findings import RULES, SEVERITIES, Finding, Scan, ScanRule
from .scanner import scan

__all__ = ["RULES", "SEVERITIES", "Finding", "Scan", "ScanRule", "scan"]
