"""Parse YAML from untrusted files. Only plain values are allowed, and time and memory are limited."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import Malformed, Path

if TYPE_CHECKING:
    import yaml

MAX_BYTES = 256 << 10
"""The largest document, in bytes. NeMo configs have about 10 KB, and PyYAML parses about 200 KB per second."""

MAX_NODES = 20_000
"""The largest number of values in a document; PyYAML takes minutes for hundreds of thousands of values."""

MAX_DEPTH = 32
MAX_DIGITS = 40


def load_yaml(data: bytes, *, path: Path | None = None, where: str | None = None) -> Any:
    """Return the value of a YAML document: strings, numbers, booleans, null, lists, and mappings with string keys.

    The function refuses aliases, because a few aliases can expand to gigabytes. It also refuses tags, repeated keys,
    infinities, NaNs and lone surrogates, because adapterkit's own format stores the values as JSON and cannot store any
    of these. Integers of more than 40 digits are refused too. Dates stay strings. YAML 1.1's numbers with colons
    (`1:30`) also stay strings, because PyYAML parses them in quadratic time.

    Args:
        data: the document in UTF-8.
        path: the path of the file, for error messages.
        where: the location inside the file, for error messages.

    Raises:
        Malformed: the document is not valid YAML, contains something that the function refuses, or is too large.
    """
    import yaml

    def fault(why: str) -> Malformed:
        cure = "Correct the file. Use only strings, numbers, true, false, null, lists and mappings"
        return Malformed(why, path=path, where=where, cure=cure)

    if len(data) > MAX_BYTES:
        raise fault(f"the document has more than {MAX_BYTES:,} bytes")
    try:
        return yaml.load(data.decode("utf-8"), _loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        place = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise fault(
            f"the document is not plain YAML: {problem}{f' in line {place.line + 1}' if place else ''}"
        ) from None


@cache
def _loader() -> type[yaml.SafeLoader]:
    import yaml

    class StrictLoader(yaml.SafeLoader):
        nodes = depth = 0
        yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML declares it so
            first: [entry for entry in entries if not entry[0].endswith(":timestamp")]
            for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            self.nodes += 1
            if isinstance(event, yaml.AliasEvent):
                raise _fault("aliases are not supported", event)
            # Refuse a tag that names a type. Accept the tag `!`, which marks a value as a string.
            if event.tag not in (None, "!"):
                raise _fault(f"the tag {event.tag!r} is not supported", event)
            if self.nodes > MAX_NODES or self.depth >= MAX_DEPTH:
                raise _fault(f"there are more than {MAX_NODES:,} values, or more than {MAX_DEPTH} levels", event)
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str):
                    raise _fault(f"the key {str(key)[:80]!r} is not a string", key_node)
                if key in mapping:
                    raise _fault(f"the key {key[:80]!r} occurs twice", key_node)
                mapping[key] = self.construct_object(value_node, deep=deep)
            return mapping

        def construct_yaml_map(self, node: Any) -> Any:
            yield self.construct_mapping(node, deep=True)

        def construct_scalar(self, node: Any) -> Any:
            text = super().construct_scalar(node)
            text.encode()  # This raises an error for a lone surrogate.
            return text

        def construct_yaml_int(self, node: Any) -> int:
            if len(node.value) > MAX_DIGITS:
                raise _fault(f"a number has {len(node.value)} digits, more than {MAX_DIGITS}", node)
            return int(super().construct_yaml_int(node))

        def construct_yaml_float(self, node: Any) -> float:
            value = super().construct_yaml_float(node)
            if not math.isfinite(value):
                raise _fault(f"{node.value[:40]} is not a finite number", node)
            return float(value)

        def resolve(self, kind: object, value: Any, implicit: object) -> Any:
            tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
            number = tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
            return "tag:yaml.org,2002:str" if number and ":" in value else tag

    def _fault(why: str, at: Any) -> Exception:
        return yaml.constructor.ConstructorError(None, None, why, at.start_mark)

    for kind in ("map", "int", "float"):
        StrictLoader.add_constructor(f"tag:yaml.org,2002:{kind}", getattr(StrictLoader, f"construct_yaml_{kind}"))
    return StrictLoader
