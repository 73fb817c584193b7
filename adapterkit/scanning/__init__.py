"""Scan an untrusted adapter for signs of an attack. Each finding is evidence with a severity, not proof.

A file without findings is not proven harmless, and a finding does not prove intent. Each finding has evidence, a
location, and the reason why it matters. Nothing in the files is executed or imported; pickles are read as lists of
opcodes.
"""

from __future__ import annotations

from .findings import RULES, SEVERITIES, Finding, Scan, ScanRule
from .scanner import scan

__all__ = ["RULES", "SEVERITIES", "Finding", "Scan", "ScanRule", "scan"]
