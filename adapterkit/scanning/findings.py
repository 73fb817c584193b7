"""Define the rules, findings and results of a scan. A result can be shown as plain data, HTML or SARIF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.arguments import checks_types
from ..core.tables import html_table

SEVERITIES = ("note", "low", "medium", "high")
"""The severities, lowest first. By default, a scan fails if a finding has the severity `medium` or a higher one."""

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


@dataclass(frozen=True, slots=True)
class ScanRule:
    """One kind of finding.

    Attributes:
        name: the rule's stable name, which is its `ruleId` in SARIF.
        severity: one of `SEVERITIES`.
        title: a short description.
        why: a sentence that says why such a finding matters.
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
    ScanRule("code-file", "high", "a code file", "With trust_remote_code, loaders run code files next to the weights."),
    ScanRule(
        "code-in-config", "high", "a config that names code", "A loader imports and runs the class named in the config."
    ),
    ScanRule(
        "template",
        "high",
        "a chat template that accesses more than its data",
        "Outside Jinja's sandbox, the template can run code. Inside the sandbox, rendering it fails.",
    ),
    ScanRule(
        "template-address",
        "medium",
        "an address in a chat template",
        "The template can add text to prompts, and this text can make a model send data to the address.",
    ),
    ScanRule("hidden-file", "medium", "a hidden or misleading file", "The name hides what kind of file it is."),
    ScanRule(
        "lookalike-name", "medium", "characters that look like others", "People may misread the name as another name."
    ),
    ScanRule(
        "other-content",
        "high",
        "a file that is not what its name says",
        "Some loaders rely on the name, others on the content, so two tools can read the file differently.",
    ),
    ScanRule(
        "second-weights",
        "medium",
        "two weight files that differ",
        "Two tools can load two different adapters from the same folder.",
    ),
    ScanRule(
        "link",
        "high",
        "a link that leaves the folder",
        "A program that follows the link reads a file outside the folder.",
    ),
    ScanRule("not-finite", "high", "values that are not finite", "A merge can spread such values to the whole weight."),
    ScanRule(
        "foreign-bits",
        "medium",
        "a few values that need more bits than the training dtype",
        "Most values of the tensor are exact in 16 bits. The others were probably changed after training.",
    ),
    ScanRule(
        "token-rows", "low", "changed embedding rows", "A trigger word can be trained into one row of the embedding."
    ),
    ScanRule("head", "low", "a change of the output layer", "The change can favour some tokens in any context."),
    ScanRule("router", "low", "a change of an expert router", "The change can send chosen inputs to a chosen expert."),
    ScanRule("single-expert", "low", "a change of few experts", "Inputs routed to these experts trigger the change."),
    ScanRule(
        "spike",
        "medium",
        "a change dominated by one direction",
        "A manual edit that adds a trigger to a model changes weights in one direction far more than in all others.",
    ),
    ScanRule(
        "outlier",
        "medium",
        "one target with most of the change",
        "Training spreads changes over all layers; a manual edit changes one layer.",
    ),
    ScanRule(
        "norm",
        "medium",
        "a change larger than the weight",
        "Such a change replaces the base's behaviour instead of adapting it.",
    ),
)

RULES = {rule.name: rule for rule in _EVERY}
"""A map from the name of each rule to the rule."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding of a scan.

    Attributes:
        rule: the name of the rule.
        file: the file, relative to the scanned folder.
        where: the location in the file: a key, a target or a byte offset; empty for the whole file.
        evidence: the reason for the finding: a quotation from the file, a measured value, or a description.
    """

    rule: str
    file: str
    where: str
    evidence: str

    @property
    def severity(self) -> str:
        return RULES[self.rule].severity

    def record(self) -> dict[str, str]:
        """Return the finding as plain data."""
        rule = RULES[self.rule]
        return {
            "rule": self.rule, "severity": rule.severity, "title": rule.title, "file": self.file, "where": self.where,
            "evidence": self.evidence, "why": rule.why,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scan:
    """The result of a scan.

    Attributes:
        source: the scanned file, folder or address.
        findings: the findings, the most severe first.
        files: the number of scanned files.
        unread: one line for each file or part of a file that could not be scanned. Each line states the reason.
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
        """The highest severity, or `none` if there are no findings."""
        return max((each.severity for each in self.findings), key=SEVERITIES.index, default="none")

    @checks_types
    def fails(self, at: str = "medium") -> bool:
        """Whether a finding has the severity `at` or a higher one."""
        return self.worst != "none" and SEVERITIES.index(self.worst) >= SEVERITIES.index(at)

    def record(self) -> dict[str, JsonValue]:
        """Return the result as plain data."""
        return {
            "source": self.source, "worst": self.worst, "files": self.files, "unread": list(self.unread),
            "findings": [each.record() for each in self.findings],
            "note": "Findings are evidence, not proof; a file without findings is not proven harmless.",
        }  # fmt: skip

    def sarif(self) -> dict[str, object]:
        """Return the result as SARIF 2.1.0, a format that code hosts and editors can show."""
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
    """Return the findings without duplicates, the most severe first."""
    unique = dict.fromkeys(findings)
    return tuple(sorted(unique, key=lambda each: (-SEVERITIES.index(each.severity), each.file, each.where, each.rule)))
