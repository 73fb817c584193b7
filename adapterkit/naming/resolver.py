"""Map the names in an adapter to the names in a base.

For each target the resolver tries, in this order: a rule of the user; the exact name; the name without words that
wrappers such as FSDP insert; the file of the base's family; a change of prefixes that maps every target. If a name can
mean two modules of the base, the resolver raises an error instead of guessing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .architectures import Architecture
from .by_family import by_family, family_names
from .by_prefixes import Fits, by_prefixes
from .moves import Move, Resolution, Rule
from .renames import Rename, renamed_by
from .stored_names import PERHAPS, WRAPPERS, Left, Names


def resolve(
    targets: Sequence[str],
    base: Names,
    *,
    architecture: Architecture | None = None,
    renames: Sequence[Rename] = (),
    partial: bool = False,
    fits: Fits = lambda *_: True,
) -> Resolution:
    """Map the names in an adapter to the names in a base.

    Args:
        targets: the names in the adapter.
        base: the names in the base.
        architecture: the architecture of the base's family, if a file describes it.
        renames: the user's rules; the first rule that matches a name is used.
        partial: whether targets that the base does not have are allowed.
        fits: a function that returns whether the shapes of a target and of a name in the base fit; called if several
            names are possible.

    Returns:
        where each target is in the base; `missing` lists the targets that the base lacks.

    Raises:
        TargetNotFound: a target's name can mean two different modules.
    """
    inside = base.without_wrappers
    if inside is not None:
        names, real = inside
        bare = {path: name for name, path in real.items()}
        ours = {bare.get(target, target): target for target in targets}
        found = resolve(
            list(ours), names, architecture=architecture, renames=renames, partial=partial,
            fits=lambda target, path: fits(ours[target], real.get(path, path)),
        )  # fmt: skip
        count = sum(any(move.path in real for move in moves) for moves in found.moves.values())
        found.moves = {
            ours[target]: tuple(replace(move, path=real.get(move.path, move.path)) for move in moves)
            for target, moves in found.moves.items()
        }
        found.missing = [ours[target] for target in found.missing]
        found.rules.append(Rule("wrapper", "in the base", count))
        return found
    resolution = Resolution()
    left = _by_renames(targets, base, renames, resolution)
    halves: Left = []
    if architecture is not None:
        # If the base has only a bias under a name, map the target with the family's file. In Jev's heads, the bias is
        # stored as `proj.bias`, but the weight as `weight`.
        halves = [each for each in left if base.lacks_weight(each[1]) and each[0] not in base.anywhere]
        left = [each for each in left if each not in halves] if halves else left
    left = _exact(left, base, resolution)
    left = _unwrapped(left, base, resolution)
    left = _of_modules(left)
    if left and architecture is not None:
        left = by_family(left, base, architecture, resolution)
    if halves and architecture is not None:
        left += _exact(by_family(halves, base, architecture, resolution), base, resolution)
    if left:
        loses_a_part = None if architecture is None else family_names(base, architecture).loses_a_part
        left = by_prefixes(left, base, resolution, partial, fits, loses_a_part)
    resolution.missing = [target for target, _ in left]
    return resolution


def _by_renames(targets: Sequence[str], base: Names, renames: Sequence[Rename], resolution: Resolution) -> Left:
    if not renames:
        return [(target, target) for target in targets]
    left, counts = list[tuple[str, str]](), dict[str, int]()
    for target in targets:
        name, rule = renamed_by(target, renames)
        if rule is not None:
            counts[rule.text] = counts.get(rule.text, 0) + 1
        if name != target and base.has(name, target):
            resolution.moves[target] = (Move(name),)
        else:
            left.append((target, name))
    resolution.rules += [Rule("user", text, count) for text, count in counts.items()]
    return left


def _exact(left: Left, base: Names, resolution: Resolution) -> Left:
    rest = []
    for target, name in left:
        if base.has(name, target):
            resolution.moves[target] = (Move(name),)
        else:
            rest.append((target, name))
    if len(rest) < len(left):
        resolution.rules.append(Rule("exact", "", len(left) - len(rest)))
    return rest


def _unwrapped(left: Left, base: Names, resolution: Resolution) -> Left:
    """Remove words that wrappers inserted into names, and map the targets whose shortened names are in the base."""
    perhaps = WRAPPERS | PERHAPS
    if not any(word in name for _, name in left for word in perhaps):
        return left
    known = {word for shape in base.templates for word in shape.split(".")}
    off = WRAPPERS | (PERHAPS - known)
    rest, seen, placed = list[tuple[str, str]](), set[str](), 0
    for target, name in left:
        words = name.split(".")
        if not off.isdisjoint(words):
            seen |= off.intersection(words)
            name = ".".join(word for word in words if word not in off)
            if base.has(name, target):
                resolution.moves[target] = (Move(name),)
                placed += 1
                continue
        rest.append((target, name))
    if seen:
        resolution.rules.append(Rule("wrapper", " ".join(f"{word}." for word in sorted(seen)), placed))
    return rest


def _of_modules(left: Left) -> Left:
    """Replace the name of a weight with the name of its module, which the other rules and the families' files use.

    PEFT's `target_parameters=["mlp.gate.weight"]` is the weight of a router, whose module is `block_sparse_moe.gate` in
    Mixtral's files.
    """
    return [(target, name.removesuffix(".weight")) for target, name in left]
