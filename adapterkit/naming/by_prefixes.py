"""Map names by exchanging a prefix.

A change is accepted if it maps every target with the prefix to a name in the base.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from .architectures import shape_of
from .moves import Move, Resolution, Rule, ambiguous
from .parts import exchangeable, keeps_parts
from .stored_names import Left, Names, swap, template_of

Fits = Callable[[str, str], bool]
"""A function of (name in the adapter, name in the base) that returns whether the shapes of both fit."""


def by_prefixes(
    left: Left,
    base: Names,
    resolution: Resolution,
    partial: bool,
    fits: Fits,
    loses_a_part: Callable[[str, str], bool] | None = None,
) -> Left:
    """Map targets by changes of prefixes: one rule per prefix, which must map every target with this prefix.

    A change must not remove the name of a part of the model, such as a vision tower. `loses_a_part` knows these names
    for the base's family. Which words name a part depends on the family: `model.text_model.` is a part of an Idefics,
    but LLaVA's text part is `language_model.model.`.

    Args:
        left: the targets that are not mapped yet.
        base: the names in the base.
        resolution: the result; the function adds moves and rules to it.
        partial: whether the base may lack some targets; if so, the prefix that maps the most targets is also accepted.
        fits: a function that returns whether the shapes of a target and of a name in the base fit.
        loses_a_part: a function of (name, changed name) that returns whether the change removes the name of a part;
            None if the family is unknown.

    Returns:
        the targets that are still not mapped.

    Raises:
        TargetNotFound: several prefixes map all targets that share a prefix.
    """
    templates = _trials(left, base)
    if loses_a_part is not None:
        templates = {
            name: {p for p in pairs if keeps_parts(*p) and not loses_a_part(name, swap(name, *p))}
            for name, pairs in templates.items()
        }
    # Try to exchange the shortest prefix first, because the names then share a longer ending. So `decoder.layers`
    # becomes `model.decoder.layers`, not `model.encoder.layers`, although both would fit.
    prefixes = sorted(
        {off for trials in templates.values() for off, _ in trials}, key=lambda prefix: (prefix.count("."), prefix)
    )
    # Exclude names of the base to which another target is already mapped. Otherwise a decoder's layers could be mapped
    # to the encoder.
    taken = {move.path for moves in resolution.moves.values() for move in moves}
    rest, found = left, True
    while rest and found:
        # Start over after each rule. With the targets of `model.text.` mapped, one change may fit all remaining targets
        # of `model.`.
        found = False
        for off in prefixes:
            group = [(target, name) for target, name in rest if name.startswith(off)]
            on = _exchanged(group, off, templates, base, taken, fits) if group else None
            if on is not None:
                rest = _placed(group, rest, off, on, base, taken, resolution)
                found = True
                break
    if rest and partial:
        tried = _tried(rest, "", templates, base, taken)
        most = max(tried.values(), default=0)
        best = [on for on, count in tried.items() if count == most and most]
        if len(best) == 1:
            rest = _placed(rest, rest, "", best[0], base, taken, resolution)
    return rest


def _exchanged(
    group: Left,
    off: str,
    templates: Mapping[str, set[tuple[str, str]]],
    base: Names,
    taken: Collection[str],
    fits: Fits,
) -> str | None:
    """Return the prefix to put in the place of `off`, so that every target of a group is mapped; None if none does.

    Raises:
        TargetNotFound: several prefixes map the whole group.
    """
    full = [on for on, count in _tried(group, off, templates, base, taken).items() if count == len(group)]
    if full:
        # Also try to change only the first words of the prefix. VibeVoice has two towers with the same names and
        # shapes, `acoustic.` and `semantic.`; only removing `model.` from `model.acoustic.` leads to the right tower.
        full += [
            on for on in _shorter(group, off, templates) if on not in full and _all_land(group, off, on, base, taken)
        ]
    if len(full) > 1:
        full = [on for on in full if all(fits(target, swap(name, off, on)) for target, name in group)] or full
    if len(full) > 1:
        full = _keeping_words(off, full) or full
    if len(full) > 1:
        target, name = group[0]
        raise ambiguous(target, [swap(name, off, on) for on in full])
    return full[0] if full else None


def _shorter(group: Left, off: str, templates: Mapping[str, set[tuple[str, str]]]) -> list[str]:
    """List replacements for a prefix that change only its first words."""
    ours = sorted({template_of(name) for _, name in group})
    changes = {(front, on) for template in ours for front, on in templates[template] if front and front != off}
    return sorted({on + off[len(front) :] for front, on in changes if off.startswith(front)})


def _all_land(group: Left, off: str, on: str, base: Names, taken: Collection[str]) -> bool:
    return all(_lands(target, name, off, on, base, taken) for target, name in group)


def _keeping_words(off: str, candidates: Sequence[str]) -> list[str]:
    """Return a list with the only candidate that merely adds words to `off`, or merely drops words from it.

    The list is empty unless exactly one candidate does so. It is also empty if this candidate keeps no words of `off`
    but `model` and `transformer`, or if another candidate keeps all words that this one keeps.

    Video-LLaVA has two towers of the same shape: `image_tower.vision_model.` becomes `image_tower.`, not
    `video_tower.`.
    """
    words = off.split(".")[:-1]
    kept = {on: [word for word in words if word in on.split(".")] for on in candidates}
    plain = [on for on in candidates if kept[on] in (words, on.split(".")[:-1])]
    if len(plain) != 1 or not set(kept[plain[0]]) - {"model", "transformer"}:
        return []
    others = (set(kept[on]) for on in candidates if on != plain[0])
    return plain if all(set(kept[plain[0]]) - other for other in others) else []


def _tried(
    group: Left, off: str, templates: Mapping[str, set[tuple[str, str]]], base: Names, taken: Collection[str]
) -> dict[str, int]:
    """Return a map from each possible replacement of a prefix to the number of targets that the replacement maps."""
    ours = sorted({template_of(name) for _, name in group})
    tried = dict.fromkeys([on for template in ours for prefix, on in sorted(templates[template]) if prefix == off], 0)
    for on in tried:
        tried[on] = sum(_lands(target, name, off, on, base, taken) for target, name in group)
    return tried


def _placed(group: Left, rest: Left, off: str, on: str, base: Names, taken: set[str], resolution: Resolution) -> Left:
    """Map a group's targets by replacing `off` with `on`; return the targets of `rest` that are still not mapped."""
    placed = 0
    for target, name in group:
        if _lands(target, name, off, on, base, taken):
            resolution.moves[target] = (Move(swap(name, off, on)),)
            placed += 1
    taken.update(resolution.moves[target][0].path for target, _ in group if target in resolution.moves)
    resolution.prefixes.append((off, on))
    resolution.rules.append(Rule("prefix", f"{off or '(none)'} -> {on or '(none)'}", placed))
    return [(target, name) for target, name in rest if target not in resolution.moves]


def _trials(left: Left, base: Names) -> dict[str, set[tuple[str, str]]]:
    """Return a map from each template to the changes of prefix to try.

    A number in a prefix must be the same in all names.
    """
    names: dict[str, list[str]] = {}
    for _, name in left:
        names.setdefault(template_of(name), []).append(name)
    found: dict[str, set[tuple[str, str]]] = {}
    for template, several in names.items():
        found[template] = set()
        for off, on in ends(template, base):
            words = off.count(".")
            fronts = {".".join(name.split(".", words)[:words]) + "." for name in several} if "#" in off else {off}
            if len(fronts) == 1:
                found[template].add((fronts.pop(), on))
    return found


def _lands(target: str, name: str, off: str, on: str, base: Names, taken: Collection[str]) -> bool:
    path = swap(name, off, on)
    return path not in taken and base.has(path, target)


def ends(template: str, base: Names) -> set[tuple[str, str]]:
    """Return the changes of prefix, as (removed, added), that turn a template into a template of the base.

    A change adds no layer number and keeps the word before the first number: `layers.#` is not renamed, only the
    modules around it.
    """
    words = template.split(".")
    keep = max(words.index("#") - 1 if "#" in words else len(words) - 1, 0)
    found = set()
    for cut in range(len(words)):
        end = shape_of(".".join(words[cut:]))
        for shape in base.endings.get(end, ()):
            on = "".join(f"{word}." for word in shape.split(".")[: shape.count(".") + 1 - (len(words) - cut)])
            off = "".join(f"{word}." for word in words[:cut])
            # Allow a change without an added prefix: the base may be a part of a model, such as a single layer.
            whole = cut <= keep or not on
            if whole and "#" not in on and (not on or not off or exchangeable(off, on)):
                found.add((off, on))
    return found
