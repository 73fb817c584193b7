"""What a case of the invalid corpus is, and the valid file that the cases differ from in one fault each."""

from __future__ import annotations

import json
from dataclasses import dataclass

from container import native, numbers, stored

EXIT = {"Malformed": 2, "ShapeMismatch": 2, "UsageError": 2, "Unsupported": 3}


@dataclass(frozen=True)
class Invalid:
    """One case.

    Attributes:
        name: of the file without its ending, or of the folder.
        content: the file, or the folder's files by name.
        error: the class of the error.
        where: what its place must contain.
        stage: `read`, or `values` where only the tensors' values are at fault.
        exact: the place is `where` and nothing else.
        opens: `adapter`, or `base` where it is a checkpoint.
    """

    name: str
    content: bytes | dict[str, bytes]
    error: str = "Malformed"
    where: str = ""
    stage: str = "read"
    opens: str = "adapter"
    exact: bool = False

    def expectation(self) -> str:
        """The JSON beside it."""
        fields = {"error": self.error, "where": self.where, "exit": EXIT[self.error]}
        fields |= {"stage": self.stage, "opens": self.opens} | ({"exact": True} if self.exact else {})
        return json.dumps(fields, indent=2) + "\n"


TENSORS = {
    "q.A": stored(numbers("invalid.A", 2, 4), "F32"),
    "q.B": stored(numbers("invalid.B", 3, 2), "F32"),
}
LORA = {
    "target": {"path": "q"},
    "method": "lora",
    "version": 1,
    "tensors": {"A": "q.A", "B": "q.B"},
    "attributes": {"scaling": 0.5},
}
RECORD = {"version": "1.0", "updates": [LORA]}
VALID = native(RECORD, TENSORS)
HEADER_END = 8 + int.from_bytes(VALID[:8], "little")
DEEP = "[" * 20000 + "]" * 20000
