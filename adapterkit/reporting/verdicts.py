"""Describe the measurements of a report in plain sentences, which are called verdicts.

Each rule in `RULES` has a code, a level and a function, which yields one sentence per finding. A report shows at most
`MOST` sentences per rule, followed by the number of omitted sentences. An adapter without problems gets only sentences
of level `note`. The rules' thresholds are constants in this file.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .inspecting import Facts
    from .measuring import Effect, Measurements, MergedShare

LEVELS = ("fault", "warning", "note")

MOST = 5
"""The largest number of sentences to show for a rule."""

MIN_SHARE = 0.25
"""The rule `concentrated` reports a target if it has at least this share of the adapter's squared norm, and at least
`TIMES` times the average share of a target."""

TIMES = 4
"""The rule `concentrated` reports a target only if its share of the adapter's squared norm is at least this many times
the average share. The rules `concentrated` and `by-module` skip adapters with fewer than twice this many targets."""

SCALED = 3.0
"""To find layers that are out of scale, each norm in a layer is divided by the median norm of the same module in the
neighbouring layers. The layer is out of scale if all these ratios are above `SCALED`, or all are below `1 / SCALED`."""

DEAD = 1e-6
"""A target is dead if its norm is at most this many times the median norm of the same module over all layers. A layer
is dead if its norm is at most this many times the median norm of all layers."""

SPIKE = 0.9
"""A change of rank 4 or more is a rank-1 spike if the square of its largest singular value is more than this share of
its squared norm."""

WIDE = 0.35
"""An adapter's rank is mostly unused if the median of (effective rank / stored rank) is below this limit. The median is
taken over the targets with rank 4 or more."""

OPPOSED, ALIKE, SAME = -0.2, 0.5, 0.9999
"""Limits for the cosine of two changes. The changes oppose each other if the cosine is at most `OPPOSED`, and are
similar if the cosine is at least `ALIKE`. If the absolute value of the cosine is at least `SAME`, the changes are equal
except for a factor."""

CONFLICT = 0.6
"""Two adapters conflict at a target if they change more than this share of its elements in opposite directions. For
unrelated adapters, the share is 0.5."""

LOST = 0.5
"""A sum of two changes loses too much if more than this share of their absolute values cancels out. The share is 0.29
for two unrelated changes of equal size."""

LOUDER = 4.0
"""If the largest norm of the adapters is more than this many times the smallest norm, the adapter with the smallest
norm has almost no effect in a plain sum."""

LARGE = 0.5
"""A change is too large if its norm is more than this share of the norm of the base's weight."""

PEAK = 40.0
"""An element of a change is an outlier if its absolute value is more than this many times the root mean square of the
change's elements."""

SCALING = (1 / 64, 64.0)
"""The smallest and largest plausible scaling of a LoRA. Outside these bounds, the file's alpha is most likely wrong."""

KEPT, NOTHING, WRONG = 0.95, 0.05, 1.0
"""Limits for a merged model. A change is partly lost if the merged model contains less than the share `KEPT` of it, and
not merged if the model contains less than the share `NOTHING`. The rounding error of a merged weight is larger than the
change if the norm of the error, divided by the norm of the change, is above `WRONG`."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A sentence about the measurements.

    Attributes:
        code: the code of the rule.
        level: `fault` for something broken, `warning` for something probably unintended, `note` for useful information.
        text: the sentence.
        adapter: the index of the adapter that the sentence is about, or None.
        target: the target that the sentence is about, or None.
    """

    code: str
    level: str
    text: str
    adapter: int | None = None
    target: str | None = None


@dataclass(frozen=True, slots=True)
class Findings:
    """The input of the rules: the measurements, and the facts about each adapter."""

    measured: Measurements
    facts: Sequence[Facts]

    def each(self) -> Iterator[tuple[int, str, list[Effect]]]:
        """Yield (index, prefix, measured effects) for each adapter.

        Sentences about the adapter begin with the prefix. The prefix is `name: `, or empty if the report has only one
        adapter.
        """
        alone = len(self.facts) == 1
        for at, facts in enumerate(self.facts):
            yield at, "" if alone else f"{facts.name}: ", self.measured.of(at)

    def title(self, target: str) -> str:
        return self.measured.cells[target].title

    def pairs(self) -> Iterator[tuple[int, int, str]]:
        names = [facts.name for facts in self.facts]
        for a in range(len(names)):
            for b in range(a + 1, len(names)):
                yield a, b, f"{names[a]} and {names[b]}"


Details = Iterable[tuple[str, int | None, str | None]]
"""The result of a rule. Each finding is a tuple (sentence, index of the adapter or None, target or None)."""


@dataclass(frozen=True, slots=True)
class VerdictRule:
    """A rule. Its function `find` returns the findings, which become verdicts with the rule's code and level."""

    code: str
    level: str
    find: Callable[[Findings], Details]


def verdicts(measured: Measurements, facts: Sequence[Facts]) -> list[Verdict]:
    """Return the verdicts of all rules, faults first.

    Args:
        measured: the measurements.
        facts: the facts about the adapters, one entry per adapter.
    """
    findings, verdicts_made = Findings(measured, facts), list[Verdict]()
    for rule in RULES:
        findings_of_rule = [*rule.find(findings)]
        verdicts_made += [Verdict(rule.code, rule.level, *each) for each in findings_of_rule[:MOST]]
        if len(findings_of_rule) > MOST:
            verdicts_made.append(
                Verdict(
                    rule.code, rule.level, f"... and {len(findings_of_rule) - MOST:,} more findings like the last one."
                )
            )
    return sorted(verdicts_made, key=lambda verdict: LEVELS.index(verdict.level))


def percent(share: float) -> str:
    """Return a share as a percentage: `40 %`, `0.3 %`."""
    value = 100 * share
    return f"{value:.0f} %" if abs(value) >= 9.95 else f"{value:.2g} %"


def _energy(effects: Iterable[Effect]) -> float:
    return math.fsum((effect.norm or 0.0) ** 2 for effect in effects)


def _unread(findings: Findings) -> Details:
    for effect in findings.measured.effects:
        if effect.why is not None and effect.code not in ("usage", "not-mergeable"):
            text = f"{effect.target} of {findings.facts[effect.adapter].name} is damaged: {effect.why}."
            yield text, effect.adapter, effect.target


def _unmeasured(code: str, sentence: str) -> Callable[[Findings], Details]:
    def find(findings: Findings) -> Details:
        methods: dict[tuple[int, str], list[str]] = defaultdict(list)
        for effect in findings.measured.effects:
            if effect.code == code:
                methods[effect.adapter, effect.method].append(effect.target)
        for (at, method), targets in methods.items():
            name = findings.facts[at].name
            yield sentence.format(name=name, method=method, count=f"{len(targets):,}"), at, targets[0]

    return find


def _misfit(findings: Findings) -> Details:
    if findings.measured.base_why is not None:
        yield f"The adapter does not fit the given base: {findings.measured.base_why}", None, None


def _other_base(findings: Findings) -> Details:
    for why in findings.measured.bases:
        yield f"This is probably the wrong base: {why}.", None, None


def _different_bases(findings: Findings) -> Details:
    named = {facts.base.lower(): facts for facts in findings.facts if facts.base}
    if len(named) > 1:
        bases_text = " and ".join(f"{facts.name} for {facts.base}" for facts in named.values())
        yield f"The adapters were made for different bases: {bases_text}.", None, None


def _silent(findings: Findings) -> Details:
    for at, _, effects in findings.each():
        if effects and not any(effect.norm or effect.bias_norm for effect in effects):
            name = findings.facts[at].name
            yield f"{name} changes nothing: every change is zero. It was probably saved before training.", at, None


def _dead_layers(findings: Findings) -> Details:
    for at, name, effects in findings.each():
        layers = _by_layer(findings, effects)
        if len(layers) < 2:
            continue
        sizes = {layer: math.sqrt(_energy(group)) for layer, group in layers.items()}
        middle = statistics.median(sizes.values())
        for layer, size in sizes.items():
            if middle and size <= DEAD * middle and len(layers[layer]) > 1:
                yield (
                    f"{name}{_layer(layer)} is dead: none of its {len(layers[layer])} targets has a noticeable change.",
                    at,
                    None,
                )


def _layer(layer: str) -> str:
    return f"layer {layer}" if layer.isdecimal() else layer


def _by_layer(findings: Findings, effects: Iterable[Effect]) -> dict[str, list[Effect]]:
    """Group effects by layer. The layers are sorted by layer number.

    Omit the effects of targets that are in no layer.
    """
    cells = findings.measured.cells
    by_layer: dict[str, list[Effect]] = defaultdict(list)
    for effect in sorted(effects, key=lambda each: cells[each.target].order):
        if cells[effect.target].layer:
            by_layer[cells[effect.target].layer].append(effect)
    return dict(by_layer)


def _by_module(findings: Findings, effects: Iterable[Effect]) -> dict[str, list[Effect]]:
    by_module: dict[str, list[Effect]] = defaultdict(list)
    for effect in effects:
        by_module[findings.measured.cells[effect.target].module].append(effect)
    return dict(by_module)


def _dead_targets(findings: Findings) -> Details:
    for at, name, effects in findings.each():
        layers = _by_layer(findings, effects)
        dead_layers = {
            id(effect) for group in layers.values() if len(group) > 1 and not _energy(group) for effect in group
        }
        if not _energy(effects):
            continue
        for group in _by_module(findings, effects).values():
            middle = statistics.median(effect.norm or 0.0 for effect in group) or max(e.norm or 0.0 for e in group)
            for effect in group:
                if (effect.norm or 0.0) <= DEAD * middle and id(effect) not in dead_layers:
                    yield (
                        f"{name}{findings.title(effect.target)} is dead: its change is zero or almost zero.",
                        at,
                        effect.target,
                    )


def _scaled_layers(findings: Findings) -> Details:
    for at, name, effects in findings.each():
        layers = _by_layer(findings, effects)
        ratios = {layer: _ratio(findings, layers, layer) for layer in layers} if len(layers) > 3 else {}
        for layer, ratio in ratios.items():
            if ratio is not None and not 1 / SCALED < ratio < SCALED:
                times = f"{ratio:.3g} times" if ratio >= 1 else f"{percent(ratio)} of"
                text = f"{name}{_layer(layer)} is out of scale: its changes are {times} those of its neighbours."
                yield text, at, None


def _ratio(findings: Findings, layers: Mapping[str, list[Effect]], layer: str) -> float | None:
    """Return the median ratio of a layer's norms to the norms of its neighbours; None if the layer is not out of scale.

    Each norm is divided by the median norm of the same module in the neighbours: up to two layers before and up to two
    layers after the layer. The layer is out of scale if it has at least two ratios, and all of them are above `SCALED`
    or all of them are below `1 / SCALED`.
    """
    order = [*layers]
    at = order.index(layer)
    near = [order[i] for i in range(max(0, at - 2), min(len(order), at + 3)) if i != at]
    ratios = []
    for effect in layers[layer]:
        module = findings.measured.cells[effect.target].module
        others = [
            other.norm for name in near for other in layers[name]
            if findings.measured.cells[other.target].module == module and other.norm
        ]  # fmt: skip
        if others and effect.norm:
            ratios.append(effect.norm / statistics.median(others))
    if len(ratios) < 2:
        return None
    low, high = min(ratios), max(ratios)
    return statistics.median(ratios) if low > SCALED or high < 1 / SCALED else None


def _concentrated(findings: Findings) -> Details:
    for at, name, effects in findings.each():
        total = _energy(effects)
        if not total or len(effects) < 2 * TIMES:
            continue
        for effect in sorted(effects, key=lambda each: -(each.norm or 0.0)):
            share = (effect.norm or 0.0) ** 2 / total
            if share >= max(MIN_SHARE, TIMES / len(effects)):
                text = f"{name}{findings.title(effect.target)} has {percent(share)} of the change."
                yield text, at, effect.target


def _in_layers(findings: Findings) -> Details:
    for at, name, effects in findings.each():
        total, layers = _energy(effects), _by_layer(findings, effects)
        if not total or len(layers) < 6:
            continue
        third = len(layers) // 3
        groups = [*layers.values()]
        for word, group in (("first", groups[:third]), ("last", groups[-third:])):
            share = math.fsum(map(_energy, group)) / total
            if share > 0.5:
                yield f"{name}the {word} third of the layers has {percent(share)} of the change.", at, None


def _in_modules(findings: Findings) -> Details:
    for at, name, effects in findings.each():
        total, modules = _energy(effects), _by_module(findings, effects)
        if not total or len(modules) < 3 or len(effects) < 2 * TIMES:
            continue
        for module, group in modules.items():
            share, part = _energy(group) / total, len(group) / len(effects)
            if share > 0.5 and share > 2 * part and len(group) > 1:
                yield f"{name}{module} has {percent(share)} of the change, summed over all layers.", at, None


def _spikes(findings: Findings) -> Details:
    for at, name, effects in findings.each():
        several = [e for e in effects if len(e.spectrum) >= 2 and (e.rank or len(e.spectrum)) >= 4]
        spiked = [effect for effect in several if (effect.spike or 0.0) > SPIKE]
        if len(spiked) > 3 and len(spiked) > len(effects) / 2:
            how = f"more than {percent(SPIKE)} of each change lies in one direction"
            yield (
                f"{name}{len(spiked):,} of {len(effects):,} targets have changes of almost rank 1: {how}.",
                at,
                None,
            )
            continue
        for effect in spiked:
            share, rank = percent(effect.spike or 0.0), effect.rank or "full"
            how = f"{share} of its change lies in one direction, but its rank is {rank}"
            yield f"{name}{findings.title(effect.target)} is a rank-1 spike: {how}.", at, effect.target


def _unused_rank(findings: Findings) -> Details:
    for at, name, effects in findings.each():
        ranked = [
            e for e in effects if e.rank and e.rank >= 4 and e.effective_rank is not None and e.rank_99 and e.norm
        ]
        if not ranked:
            continue
        used = statistics.median((effect.effective_rank or 0.0) / (effect.rank or 1) for effect in ranked)
        if used < WIDE:
            rank, needed = max(e.rank or 0 for e in ranked), max(e.rank_99 or 0 for e in ranked)
            text = f"{name}most of the rank is unused: the median effective rank is {percent(used)} of the stored rank."
            if needed < rank:
                text += f" Rank {needed} of {rank} keeps 99 % of every change: adapterkit resize --rank {needed}."
            yield text, at, None


def _ranks(findings: Findings) -> Details:
    for at, facts in enumerate(findings.facts):
        if len(facts.ranks) > 1:
            ranks_text = ", ".join(f"{rank} ({count:,})" for rank, count in facts.ranks.items())
            yield f"{facts.name} has targets of different ranks: {ranks_text}.", at, None


def _scalings(findings: Findings) -> Details:
    low, high = SCALING
    for at, name, effects in findings.each():
        strange = [e for e in effects if e.scaling is not None and e.scaling and not low <= abs(e.scaling) <= high]
        if strange:
            one = strange[0]
            where = "every target" if len(strange) == len(effects) else findings.title(one.target)
            yield f"{name}{where} has a scaling of {one.scaling:g}: is alpha right?", at, one.target
        values = {e.scaling for e in effects if e.scaling is not None}
        if len(values) > 1 and not strange:
            scalings_text = ", ".join(f"{value:g}" for value in sorted(values)[:6])
            yield f"{name}targets have different scalings: {scalings_text}.", at, None


def _gaps(findings: Findings) -> Details:
    """Yield a sentence for each module that an adapter changes in almost all layers of a group, but not in all.

    The names of the layers in a group differ only in their numbers.
    """
    cells = findings.measured.cells
    for at, name, effects in findings.each():
        here = [effect for effect in findings.measured.effects if effect.adapter == at]
        # Do not compare layers of different groups: in a U-Net, the blocks and the middle have different modules.
        kinds: dict[str, list[str]] = defaultdict(list)
        for layer in _by_layer(findings, here):
            kinds[re.sub(r"\d+", "#", layer)].append(layer)
        for module, group in _by_module(findings, here).items():
            there = {cells[effect.target].layer for effect in group}
            for layers in kinds.values():
                missing = [layer for layer in layers if layer not in there]
                if effects and len(layers) >= 6 and missing and len(missing) <= max(1, len(layers) // 8):
                    word = "layer" if len(missing) == 1 else "layers"
                    yield (
                        f"{name}{module} is missing in {word} {', '.join(missing)}; all other layers have it.",
                        at,
                        None,
                    )


def _peaks(findings: Findings) -> Details:
    for at, name, effects in findings.each():
        for effect in effects:
            if effect.peak is not None and effect.peak > PEAK:
                how = f"one element is {effect.peak:.0f} times the root mean square"
                yield f"{name}{findings.title(effect.target)} has outliers: {how}.", at, effect.target


def _too_large(findings: Findings) -> Details:
    for at, name, effects in findings.each():
        large = [effect for effect in effects if (effect.relative or 0.0) > LARGE]
        if large:
            most = max(large, key=lambda effect: effect.relative or 0.0)
            how = f"the change of {findings.title(most.target)} is {percent(most.relative or 0.0)} of its weight"
            more = f"; {len(large):,} of {len(effects):,} targets are above {percent(LARGE)}" if large[1:] else ""
            yield f"{name}{how}{more}.", at, most.target


def _intruders(findings: Findings) -> Details:
    for at, name, effects in findings.each():
        looked = [effect for effect in effects if effect.intruders is not None]
        with_intruders = [effect for effect in looked if effect.intruders]
        if with_intruders:
            most = max(with_intruders, key=lambda effect: effect.intruders or 0)
            total = sum(effect.intruders or 0 for effect in with_intruders)
            many = "intruder dimension" if total == 1 else "intruder dimensions"
            where = f"most in {findings.title(most.target)}: {most.intruders} of its first 10"
            summary = f"{name}{total:,} {many} in {len(with_intruders):,} of {_looked(looked, effects)}"
            yield f"{summary}: singular vectors that the base does not have; {where}.", at, most.target


def _no_intruders(findings: Findings) -> Details:
    for at, name, effects in findings.each():
        looked = [effect for effect in effects if effect.intruders is not None]
        if looked and not any(effect.intruders for effect in looked):
            yield f"{name}no intruder dimensions in {_looked(looked, effects)}.", at, None


def _looked(looked: Sequence[Effect], effects: Sequence[Effect]) -> str:
    """Return a phrase with the number of examined targets and, if not all were examined, the number of all targets."""
    many = f"{len(looked):,} target" if len(looked) == 1 else f"{len(looked):,} targets"
    return many if len(looked) == len(effects) else f"the {many} examined (of {len(effects):,}, largest changes first)"


def _same(findings: Findings) -> Details:
    measured = findings.measured
    for a, b, both in findings.pairs():
        cosine, one, other = measured.cosine(a, b), measured.norm(a), measured.norm(b)
        if cosine is None or abs(cosine) < SAME:
            continue
        ratio = one / other
        if cosine < 0:
            yield f"{both} undo one another: their cosine is {cosine:.4f}.", None, None
        elif abs(ratio - 1) < 1e-3:
            yield f"{both} are the same adapter: their cosine is {cosine:.4f} and their norms are equal.", None, None
        else:
            name, against = findings.facts[a].name, findings.facts[b].name
            yield f"{name} is {ratio:.3g} times as large as {against}: they differ only in scale.", None, None


def _opposed(findings: Findings) -> Details:
    for a, b, both in findings.pairs():
        cosine = findings.measured.cosine(a, b)
        if cosine is not None and -SAME < cosine <= OPPOSED:
            yield f"{both} work against one another: their cosine is {cosine:.2f}.", None, None


def _conflicts(findings: Findings) -> Details:
    """Yield a sentence for each target at which two adapters conflict.

    Skip a pair of adapters if their cosine over all targets is unknown, or is at most `OPPOSED`.
    """
    names = [facts.name for facts in findings.facts]
    for each in findings.measured.relations:
        whole = findings.measured.cosine(each.first, each.second)
        if each.cosine is None or whole is None or whole <= OPPOSED:
            continue
        if each.cosine <= OPPOSED or (each.sign_conflict or 0.0) > CONFLICT:
            signs = "" if each.sign_conflict is None else f"; {percent(each.sign_conflict)} of the signs differ"
            both = f"{names[each.first]} and {names[each.second]}"
            text = f"{both} conflict at {findings.title(each.target)}: cosine {each.cosine:.2f}{signs}."
            yield text, None, each.target


def _interfering(findings: Findings) -> Details:
    lost = findings.measured.together
    if len(findings.facts) == 2 and lost:
        # In a sum of two unrelated changes of equal size, the share 0.29 of their absolute values cancels out. So
        # report only targets with a much larger share.
        worst = sorted((share, target) for target, share in lost.items() if share > LOST)[::-1]
        for share, target in worst:
            text = f"A plain sum loses {percent(share)} of the absolute changes at {findings.title(target)}."
            yield text, None, target


def _loud(findings: Findings) -> Details:
    measured = findings.measured
    together = {at for each in measured.relations for at in (each.first, each.second)}
    sizes = [(measured.norm(at), findings.facts[at].name) for at in together if measured.norm(at)]
    if len(sizes) > 1 and max(sizes)[0] > LOUDER * min(sizes)[0]:
        (large, loud), (small, quiet) = max(sizes), min(sizes)
        ratio = large / small
        text = f"{loud} is {ratio:.3g} times as large as {quiet} and drowns it in a plain sum"
        yield f"{text}: set --weight (weights=).", None, None


def _alike(findings: Findings) -> Details:
    for a, b, both in findings.pairs():
        cosine = findings.measured.cosine(a, b)
        if cosine is not None and ALIKE <= cosine < SAME:
            yield f"{both} are very similar: their cosine is {cosine:.2f}.", None, None


def _sharing(findings: Findings) -> Details:
    """Yield a sentence for each pair of adapters that make different changes in the same subspace.

    In a sum, each adapter of such a pair overwrites what the other one learned.
    """
    measured = findings.measured
    for a, b, both in findings.pairs():
        cosine = measured.cosine(a, b)
        out, into = measured.mean(a, b, "overlap_out"), measured.mean(a, b, "overlap_in")
        if cosine is None or out is None or into is None or abs(cosine) >= ALIKE:
            continue
        if min(out, into) > 0.5 and not _fills(measured.of(a)) and not _fills(measured.of(b)):
            text = (
                f"{both} use the same subspace ({percent(out)} of outputs, {percent(into)} of inputs) for different "
                "changes."
            )
            yield text, None, None


def _fills(effects: Sequence[Effect]) -> bool:
    """Whether most changes have a high rank.

    The subspaces of two changes of high rank overlap even if the changes are unrelated.
    """
    sides = [len(each.spectrum) / min(each.shape[0], math.prod(each.shape[1:])) for each in effects if each.shape]
    return bool(sides) and statistics.median(sides) > 0.2


def _apart(findings: Findings) -> Details:
    measured = findings.measured
    common = {tuple(sorted((each.first, each.second))) for each in measured.relations}
    for a, b, both in findings.pairs():
        if (a, b) not in common and measured.of(a) and measured.of(b):
            yield f"{both} have no target in common.", None, None


def _independent(findings: Findings) -> Details:
    measured, pairs = findings.measured, [*findings.pairs()]
    cosines = [measured.cosine(a, b) for a, b, _ in pairs]
    if pairs and measured.relations and all(c is not None and abs(c) < 0.05 for c in cosines):
        who = pairs[0][2] if len(pairs) == 1 else "The adapters"
        yield (
            f"{who} are independent: every cosine is between -0.05 and 0.05, so a plain sum keeps all changes.",
            None,
            None,
        )


def _merged(findings: Findings) -> Details:
    merged = [each for each in findings.measured.merged if not _is_rounding(each)]
    if not merged:
        return
    kept = {each.target: each.kept for each in merged}
    nothing = [target for target, share in kept.items() if abs(share) < NOTHING]
    if len(nothing) == len(findings.measured.merged):
        yield "The merged model contains none of the change: it equals the base.", None, None
        return
    for target in nothing:
        yield f"The merged model contains none of the change at {findings.title(target)}.", None, target
    other = [each for each in merged if abs(each.kept) >= NOTHING and not KEPT <= each.kept <= 2 - KEPT]
    if other:
        farthest = max(other, key=lambda each: abs(each.kept - 1))
        text = f"the merged model contains {percent(farthest.kept)} of the change at {findings.title(farthest.target)}"
        total = len(findings.measured.merged)
        more = (
            f"; at {len(other):,} of {total:,} targets, this share differs from 100 % by more than {percent(1 - KEPT)}"
            if other[1:]
            else ""
        )
        yield f"{text}{more}.", None, farthest.target


def _is_rounding(share: MergedShare) -> bool:
    """Whether rounding to the merged model's dtype is the only reason why a part of the change is lost."""
    return share.rounded < KEPT and abs(share.kept - share.rounded) <= 1 - KEPT


def _merged_narrow(findings: Findings) -> Details:
    """Yield a sentence if rounding to the merged model's dtype loses a part of the change."""
    rounded = [each for each in findings.measured.merged if _is_rounding(each)]
    if rounded:
        least = min(rounded, key=lambda each: each.kept)
        text = (
            f"Rounding to {least.dtype} loses a part of the change at {len(rounded):,} of "
            f"{len(findings.measured.merged):,} targets: at {findings.title(least.target)}, {percent(least.kept)} of "
            "the change is left. The merge itself is correct. To keep the whole change, merge with --dtype fp32 "
            "(dtype='fp32'); fp16 keeps more than bf16, because it rounds eight times finer."
        )
        yield text, None, least.target


def _merged_noise(findings: Findings) -> Details:
    """Yield a sentence if the rounding error of the merged weights is larger than the change."""
    noisy = [e for e in findings.measured.merged if e.error > WRONG and abs(e.kept - 1) <= 1 - KEPT]
    if noisy:
        worst = max(noisy, key=lambda each: each.error)
        count, total = len(noisy), len(findings.measured.merged)
        text = f"At {count:,} of {total:,} targets, the rounding error of the merged weights is larger than the change"
        yield f"{text}: at {findings.title(worst.target)}, it is {worst.error:.2g} times as large.", None, worst.target


def _merged_well(findings: Findings) -> Details:
    merged = findings.measured.merged
    if merged and all(abs(each.kept - 1) <= 1 - KEPT for each in merged):
        worst, error = min(each.kept for each in merged), max(each.error for each in merged)
        text = (
            f"The merged model contains the change: at least {percent(worst)} of it at each of {len(merged):,} targets"
        )
        yield f"{text}, with an error of {percent(error)} at most.", None, None


def _summary(findings: Findings) -> Details:
    measured = findings.measured
    for at, facts in enumerate(findings.facts):
        effects = measured.of(at)
        if not effects:
            continue
        total = _energy(effects)
        if not total:
            continue
        top = max(effects, key=lambda effect: effect.norm or 0.0)
        share = (top.norm or 0.0) ** 2 / total
        text = f"{facts.name}: norm {measured.norm(at):.4g} over {len(effects):,} targets"
        yield (
            f"{text}; the largest change is at {findings.title(top.target)}: {percent(share)} of the total.",
            at,
            top.target,
        )


_BASE = "{name}: {count} targets of {method} cannot be measured without their base: pass --base (base=)."
_ELSEWHERE = "{name}: {count} targets of {method} change outputs or inputs, not weights: they have no norm or spectrum."

RULES = (
    VerdictRule("damaged", "fault", _unread),
    VerdictRule("does-not-fit", "fault", _misfit),
    VerdictRule("wrong-base", "fault", _other_base),
    VerdictRule("different-bases", "warning", _different_bases),
    VerdictRule("untrained", "fault", _silent),
    VerdictRule("dead-layer", "warning", _dead_layers),
    VerdictRule("dead-target", "warning", _dead_targets),
    VerdictRule("scaled-layer", "warning", _scaled_layers),
    VerdictRule("concentrated", "warning", _concentrated),
    VerdictRule("spike", "warning", _spikes),
    VerdictRule("outliers", "warning", _peaks),
    VerdictRule("too-large", "warning", _too_large),
    VerdictRule("scaling", "warning", _scalings),
    VerdictRule("missing-targets", "warning", _gaps),
    VerdictRule("intruders", "warning", _intruders),
    VerdictRule("same", "warning", _same),
    VerdictRule("opposed", "warning", _opposed),
    VerdictRule("conflict", "warning", _conflicts),
    VerdictRule("interference", "warning", _interfering),
    VerdictRule("louder", "warning", _loud),
    VerdictRule("nothing-in-common", "warning", _apart),
    VerdictRule("shared-subspace", "warning", _sharing),
    VerdictRule("merged-less", "fault", _merged),
    VerdictRule("merged-dtype", "warning", _merged_narrow),
    VerdictRule("merged-rounding", "warning", _merged_noise),
    VerdictRule("needs-base", "note", _unmeasured("usage", _BASE)),
    VerdictRule("no-weights", "note", _unmeasured("not-mergeable", _ELSEWHERE)),
    VerdictRule("summary", "note", _summary),
    VerdictRule("first-or-last", "note", _in_layers),
    VerdictRule("by-module", "note", _in_modules),
    VerdictRule("no-intruders", "note", _no_intruders),
    VerdictRule("unused-rank", "note", _unused_rank),
    VerdictRule("several-ranks", "note", _ranks),
    VerdictRule("alike", "note", _alike),
    VerdictRule("independent", "note", _independent),
    VerdictRule("merged-well", "note", _merged_well),
)
"""All rules. A report shows verdicts of the same level in the order of their rules in this tuple."""
