"""The report that functions such as `export`, `inject` and `merge` return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..core.adapter import Target
    from ..io.strict_json import JsonValue
    from .resolved import ResolvedTarget
    from .saturation import Saturation


@dataclass(frozen=True, slots=True, eq=False)
class GraphReport:
    """The report of an export, an injection or a merge: the written files, the targets, and the check's results.

    Attributes:
        out: the path of the written graph or folder.
        files: all written files.
        found: the adapter's targets, each with its layers in the graph.
        difference: the largest difference between the outputs that the check compared; None if the check did not run.
        note: a note for the user, for example why the check did not run. If the adapter has prompts, new tokens or a
            prefix, the note says how to use them.
        damage: rounding errors. After a merge, the keys are the targets whose merged weight was quantized again; each
            has an `error` (relative to the merged weight) and `kept` (the fraction of the adapter's change that is left
            after quantization). After an export with `quantize`, the keys are the quantized modules; each has an
            `error`.
        reference: the largest difference between the outputs of ONNX's reference implementation and of onnxruntime for
            the written graph; None if the reference implementation did not run, e.g. because of operators outside of
            ONNX.
        saturation: how many values static quantization clips without the adapter, and how many with the adapter. None
            if the graph has no static quantization, or if the check did not run.
        warnings: sentences for the user, each with a remedy.
        parts: for a folder of graphs, the report of each changed graph, by the graph's name.
        beside: targets whose quantized weight the merge leaves unchanged. Their updates are attached to the graph
            beside this weight, as floating-point factors. If the merge first tried to quantize the merged weight,
            `damage` has the error of that quantization.
        left: for an export with `allow_partial`, a map from an adapter's name to those of its targets that the graph
            lacks.
    """

    out: Path
    files: tuple[Path, ...]
    found: tuple[ResolvedTarget, ...]
    difference: float | None = None
    note: str | None = None
    damage: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    reference: float | None = None
    saturation: Saturation | None = None
    warnings: tuple[str, ...] = ()
    parts: Mapping[str, GraphReport] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    left: Mapping[str, tuple[Target, ...]] = field(default_factory=dict)

    def record(self) -> dict[str, JsonValue]:
        """Return the report as a dictionary that can be written as JSON."""
        if self.parts:
            targets = [{"graph": name, **at.record()} for name, part in self.parts.items() for at in part.found]
            files = [file.relative_to(self.out).as_posix() for file in self.files]
            return {
                **replace(self, parts={}).record(),
                "files": files,
                "targets": targets,
                "graphs": {
                    name: {"targets": len(part.found), "difference": part.difference, "note": part.note}
                    for name, part in self.parts.items()
                },
            }
        return {
            "out": str(self.out), "files": [file.name for file in self.files],
            "targets": [place.record() for place in self.found], "difference": self.difference, "note": self.note,
            "reference": self.reference, "warnings": list(self.warnings),
            **({"saturation": self.saturation.record()} if self.saturation else {}),
            **({"damage": dict(self.damage)} if self.damage else {}),
            **({"beside": list(self.beside)} if self.beside else {}),
        }  # fmt: skip
