"""The rules of a scan as data, its findings, and its result in forms for people and machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.tables import html_table

SEVERITIES = ("note", "low", "medium", "high")
"""From the least to the worst. `medium` and above fail a scan unless the caller says otherwise."""

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


@dataclass(frozen=True, slots=True)
class ScanRule:
    """One kind of finding.

    Attributes:
        name: stable name, the `ruleId` in SARIF.
        severity: one of `SEVERITIES`.
        title: what was found, in a few words.
        why: why it matters.
    """

    name: str
    severity: str
    title: str
    why: str


_EVERY = (
    ScanRule(
        "pickle-call",
        "high",
        "a pickle that calls a function",
        "Loading the file with pickle, or with torch.load without weights_only, runs that function.",
    ),
    ScanRule("code-file", "high", "a file of code", "Loaders with trust_remote_code run code beside the weights."),
    ScanRule(
        "code-in-config", "high", "a config that names code", "A loader imports and runs the class that it names."
    ),
    ScanRule(
        "template",
        "high",
        "a chat template that reaches beyond its data",
        "Outside Jinja's sandbox it runs code; inside it, it fails.",
    ),
    ScanRule(
        "template-address",
        "medium",
        "an address in a chat template",
        "Text that it adds to prompts can make a model send data there.",
    ),
    ScanRule("hidden-file", "medium", "a hidden or misleading file", "Its name does not show what it is."),
    ScanRule("lookalike-name", "medium", "characters that look like others", "A name reads as another one than it is."),
    ScanRule(
        "other-content",
        "high",
        "a file that is not what its name says",
        "Loaders choose by name or by content, so two tools can read two files.",
    ),
    ScanRule(
        "second-weights",
        "medium",
        "two files of weights that differ",
        "Two tools load two different adapters from one folder.",
    ),
    ScanRule("link", "high", "a link that leaves the folder", "Reading it reads another file of this machine."),
    ScanRule("not-finite", "high", "numbers that are not finite", "A merge spreads them over whole weights."),
    ScanRule(
        "foreign-bits",
        "medium",
        "numbers outside the type they were trained in",
        "Most numbers of the tensor are exact in 16 bits and a few are not: some were changed after training.",
    ),
    ScanRule(
        "token-rows", "low", "rows of single tokens", "A trigger word can be trained into one row of the embedding."
    ),
    ScanRule(
        "head", "low", "a change of the output layer", "It can favour tokens whatever the layers before it compute."
    ),
    ScanRule("router", "low", "a change of a router of experts", "It can send chosen inputs to a chosen expert."),
    ScanRule("single-expert", "low", "a change of few experts", "A router sends chosen inputs to an expert."),
    ScanRule(
        "spike",
        "medium",
        "a change of one direction",
        "One direction, far stronger than the other changes, is how a trigger is edited into a model.",
    ),
    ScanRule(
        "outlier",
        "medium",
        "one target with most of the change",
        "Training spreads a change over layers; an edit does not.",
    ),
    ScanRule("norm", "medium", "a change as large as the weight", "The base's behaviour is replaced, not adapted."),
)

RULES = {rule.name: rule for rule in _EVERY}
"""Name -> rule."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    Attributes:
        rule: the name of its rule.
        file: the file, relative to what was scanned.
        where: the place inside the file: a key, a target, a byte offset; empty for the file as a whole.
        evidence: what was seen, quoted or measured.
    """

    rule: str
    file: str
    where: str
    evidence: str

    @property
    def severity(self) -> str:
        return RULES[self.rule].severity

    def record(self) -> dict[str, str]:
        """The finding as plain data."""
        rule = RULES[self.rule]
        return {
            "rule": self.rule, "severity": rule.severity, "title": rule.title, "file": self.file, "where": self.where,
            "evidence": self.evidence, "why": rule.why,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scan:
    """The result of a scan.

    Attributes:
        source: what was scanned.
        findings: the worst first.
        files: how many files were looked at.
        unread: files and parts that could not be looked at, each with the reason.
    """

    source: str
    findings: tuple[Finding, ...]
    files: int
    unread: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Scan({self.source!r}: {len(self.findings):,} findings in {self.files:,} files, worst: {self.worst})"

    def _repr_html_(self) -> str:
        rows = [[f.severity, RULES[f.rule].title, f.file, f.where, f.evidence] for f in self.findings]
        return html_table(repr(self), ("severity", "finding", "file", "where", "evidence"), rows)

    @property
    def worst(self) -> str:
        """The worst severity; `none` without findings."""
        return max((each.severity for each in self.findings), key=SEVERITIES.index, default="none")

    def fails(self, at: str = "medium") -> bool:
        """Whether a finding is of severity `at` or worse."""
        return self.worst != "none" and SEVERITIES.index(self.worst) >= SEVERITIES.index(at)

    def record(self) -> dict[str, JsonValue]:
        """The result as plain data."""
        return {
            "source": self.source, "worst": self.worst, "files": self.files, "unread": list(self.unread),
            "findings": [each.record() for each in self.findings],
            "note": "Findings are evidence, not proof; a file without findings is not proven harmless.",
        }  # fmt: skip

    def sarif(self) -> dict[str, object]:
        """The result in SARIF 2.1.0, which code hosts and editors show."""
        from .. import __version__

        levels = {"note": "note", "low": "note", "medium": "warning", "high": "error"}
        rules = [
            {
                "id": rule.name, "shortDescription": {"text": rule.title}, "fullDescription": {"text": rule.why},
                "defaultConfiguration": {"level": levels[rule.severity]}, "properties": {"severity": rule.severity},
            }
            for rule in RULES.values()
        ]  # fmt: skip
        results = [
            {
                "ruleId": each.rule, "level": levels[each.severity], "message": {"text": _sentence(each)},
                "locations": [{"physicalLocation": {"artifactLocation": {"uri": each.file or "."}}}],
            }
            for each in self.findings
        ]  # fmt: skip
        driver = {"name": "adapterkit", "version": __version__, "rules": rules}
        return {
            "$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0",
            "runs": [{"tool": {"driver": driver}, "results": results}],
        }  # fmt: skip


def _sentence(finding: Finding) -> str:
    rule = RULES[finding.rule]
    place = f" at {finding.where}" if finding.where else ""
    return f"{rule.title}{place}: {finding.evidence}. {rule.why}"


def ordered(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Findings, the worst first, each once."""
    unique = dict.fromkeys(findings)
    return tuple(sorted(unique, key=lambda each: (-SEVERITIES.index(each.severity), each.file, each.where, each.rule)))
