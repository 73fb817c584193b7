"""Charts: Vega-Lite specifications of the measurements, and the same charts as SVG and PNG.

vl-convert draws the charts with the machine's fonts. It needs no browser, display or network. A page contains
finished drawings instead of a chart library. A library would add 0.9 MB of script, and scripts do not run in mail
readers, in notebooks on hubs, or in pages with a strict content security policy. Text is drawn in `currentColor`, so
that a drawing suits both light and dark pages.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import Unsupported
from .grid import reading_order
from .measuring import QUANTILES
from .verdicts import SPIKE, percent

if TYPE_CHECKING:
    from types import ModuleType

    from ..io.strict_json import JsonValue
    from .measuring import Effect, Measurements, Relation

PALETTE = ["#4c78a8", "#e4572e", "#2a9d6f", "#b279a2", "#d8a31a", "#17a2b8", "#9d755d", "#7a7f87"]
"""The colours of adapters. Most colour-blind readers can distinguish them. The contrast is at
least 2.2 on white, and 4.5 on black."""

FLAGGED, PLAIN = "#e4572e", "#8a94a6"

_INK = "currentColor"
CONFIG: dict[str, Any] = {
    "background": None,
    "font": "DejaVu Sans, Verdana, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": _INK, "titleColor": _INK, "domainColor": _INK, "tickColor": _INK, "gridColor": _INK,
        "gridOpacity": 0.12, "domainOpacity": 0.4, "tickOpacity": 0.4, "labelFontSize": 11, "titleFontSize": 11,
        "titleFontWeight": "normal", "labelLimit": 220,
    },
    "legend": {"labelColor": _INK, "titleColor": _INK, "labelFontSize": 11, "titleFontSize": 11,
               "titleFontWeight": "normal"},
    "title": {"color": _INK, "fontSize": 13, "anchor": "start", "fontWeight": "bold"},
    "text": {"color": _INK},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture of a report.

    Attributes:
        name: the name of the picture's file without extension: lower-case words with hyphens.
        group: the heading above the picture on the page.
        title: the text above the picture.
        caption: an explanation of how to read the picture.
        spec: the Vega-Lite specification.
    """

    name: str
    group: str
    title: str
    caption: str
    spec: dict[str, Any]


def charts(measured: Measurements) -> list[Chart]:
    """Return the pictures that can be drawn from the measurements, in the order of the page."""
    return [chart for draw in (_norms, _spectra, _ranks, _values, _base, _likeness, _conflict, _merged)
            for chart in draw(measured)]  # fmt: skip


def svg(chart: Chart) -> str:
    """Return a chart as an SVG document.

    Raises:
        Unsupported: the package vl-convert-python is not installed.
    """
    drawn: str = _drawing().vegalite_to_svg({**chart.spec, "config": CONFIG})
    # Put the chart's name into its ids. Vega's own ids for clip paths and gradients contain a counter that runs through
    # the whole process. So a chart's ids would depend on the charts that were drawn before it, and different charts
    # from several runs could have equal ids in one page.
    for number, name in enumerate(dict.fromkeys(re.findall(r'\bid="(\w+)"', drawn))):
        drawn = re.sub(rf'(\bid="|url\(#){name}(?="|\))', rf"\g<1>{chart.name}-{number}", drawn)
    return drawn


def png(chart: Chart, scale: float = 2.0) -> bytes:
    """Return a chart as a PNG with a white background.

    Raises:
        Unsupported: the package vl-convert-python is not installed.
    """
    spec = {**chart.spec, "config": {**CONFIG, "background": "white", "padding": 12}}
    drawn: bytes = _drawing().vegalite_to_png(spec, scale=scale)
    return drawn


def inline(chart: Chart) -> str:
    """Return a chart as SVG for use inside a page: screen readers treat it as one image, and its ids are unique.

    Raises:
        Unsupported: the package vl-convert-python is not installed.
    """
    from html import escape

    text = svg(chart)
    for noise in (r' role="graphics-[a-z]+"', r' aria-roledescription="[^"]*"', r' xmlns:xlink="[^"]*"'):
        text = re.sub(noise, "", text)
    text = re.sub(r"(?<=\d\.\d\d)\d+", "", text)
    text = re.sub(r' aria-label="[^"]*(axis|legend)[^"]*"', "", text)
    # Rename the marks' `aria-label` attributes, so that screen readers do not read the labels. `page.js` shows the
    # labels as tooltips.
    text = text.replace(' aria-label="', ' data-tip="')
    label = escape(f"{chart.title}. {chart.caption}")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _drawing() -> ModuleType:
    try:
        import vl_convert
    except ImportError as error:
        why = "drawing charts needs the package vl-convert-python"
        cure = 'pip install "adapterkit[report]"; or print only the numbers: --json (AdapterReport.record())'
        raise Unsupported(why, cure=cure) from error
    return vl_convert


def _named(measured: Measurements, at: int) -> tuple[str, str]:
    """Return two suffixes for an adapter's charts: one for their names, and one for their titles.

    If there is only one adapter, both suffixes are empty.
    """
    if len(measured.names) == 1:
        return "", ""
    slug = re.sub(r"[^a-z0-9]+", "-", measured.names[at].lower()).strip("-") or "adapter"
    return f"-{at + 1}-{slug}", f" of {measured.names[at]}"


def _norms(measured: Measurements) -> Iterator[Chart]:
    largest = max((effect.norm or 0.0 for effect in measured.effects), default=0.0)
    for at in range(len(measured.names)):
        effects = measured.of(at)
        if not effects:
            continue
        total = math.fsum((effect.norm or 0.0) ** 2 for effect in effects)
        end, of = _named(measured, at)

        def label(value: float, total: float = total) -> str:
            share = value * value / total if total else 0.0
            return f"norm {value:.3g}, {percent(share)} of the change"

        spec = _map(measured, effects, lambda e: e.norm, _root_sum, label, "norm", domain=(0.0, largest), root=True)
        caption = "Frobenius norm of the change at each target. Dark is small. Layers run from top to bottom."
        yield Chart(f"norms{end}", "Where the adapters change the model", f"Norm of the changes{of}", caption, spec)


def _root_sum(values: Sequence[float]) -> float:
    return math.hypot(*values)


def _average(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


E = TypeVar("E", bound="Effect | Relation | _At")


def _map(
    measured: Measurements, effects: Sequence[E], value: Callable[[E], float | None],
    together: Callable[[Sequence[float]], float], label: Callable[[float], str], title: str,
    *, domain: tuple[float, float] | None = None, middle: float | None = None, scheme: str = "viridis",
    reverse: bool = False, root: bool = False,
) -> dict[str, object]:  # fmt: skip
    """Return a chart with layers as rows and modules as columns, where the colour shows a number."""
    cells_by_column: dict[tuple[str, str], list[E]] = defaultdict(list)
    order: dict[str, Any] = {}
    for each in effects:
        cell = measured.cells[each.target]
        order.setdefault(cell.layer or "-", cell.order)
        cells_by_column[cell.layer or "-", cell.module].append(each)
    rows = sorted(order, key=lambda layer: (layer == "-", order[layer]))
    columns = sorted({module for _, module in cells_by_column}, key=reading_order)
    values = []
    for (layer, module), here in cells_by_column.items():
        numbers = [number for each in here if (number := value(each)) is not None]
        if numbers:
            number = together(numbers)
            where = measured.cells[here[0].target].title
            values.append({"layer": layer, "module": module, "value": number, "label": f"{where}: {label(number)}"})
    # Map the square root of a norm to the colour, so that small changes are visible next to a change 20 times as large.
    scale: dict[str, Any] = {"scheme": scheme, "reverse": reverse, **({"type": "sqrt"} if root else {})}
    if domain is not None and domain[1] > domain[0]:
        scale["domain"] = list(domain)
    if middle is not None:
        scale["domainMid"] = middle
    height = 15 if len(rows) <= 40 else 9 if len(rows) <= 90 else 5
    return {
        "data": {"values": values},
        "width": {"step": 30 if max(map(len, columns), default=0) <= 12 else 26},
        "height": {"step": height},
        "mark": {"type": "rect", "stroke": None, "cornerRadius": 1},
        "encoding": {
            "x": {"field": "module", "type": "nominal", "sort": columns, "title": None,
                  "axis": {"labelAngle": -40, "orient": "bottom", "domain": False, "ticks": False}},
            "y": {"field": "layer", "type": "nominal", "sort": rows, "title": "layer",
                  "axis": {"domain": False, "ticks": False, "labelOverlap": True}},
            "color": {"field": "value", "type": "quantitative", "title": title, "scale": scale,
                      "legend": {"orient": "right", "gradientLength": min(180, max(60, height * len(rows)))}},
            "description": {"field": "label"},
        },
    }  # fmt: skip


def _spectra(measured: Measurements) -> Iterator[Chart]:
    for at in range(len(measured.names)):
        effects = [effect for effect in measured.of(at) if len(effect.spectrum) > 1]
        if not effects:
            continue
        end, of = _named(measured, at)
        values = []
        for effect in sorted(_few(effects), key=_spiked):
            where = measured.cells[effect.target].title
            share = percent(effect.spike or 0.0)
            label = f"{where}: {share} in the first direction, effective rank {effect.effective_rank:.3g}"
            for index, size in enumerate(effect.spectrum[:32], 1):
                if size > 1e-9 * effect.spectrum[0]:
                    values.append({
                        "target": effect.target, "index": index, "value": size / effect.spectrum[0],
                        "kind": "rank-1 spike" if _spiked(effect) else "other targets", "label": label,
                    })  # fmt: skip
        kinds = ["rank-1 spike", "other targets"]
        spec = {
            "data": {"values": values}, "width": 340, "height": 210,
            "mark": {"type": "line", "clip": True},
            "encoding": {
                "x": {"field": "index", "type": "quantitative", "title": "singular value", "scale": {"zero": False},
                      "axis": {"tickMinStep": 1, "grid": False}},
                "y": {"field": "value", "type": "quantitative", "title": "relative to the first",
                      "scale": {"type": "log"}, "axis": {"format": ".1g", "values": TICKS}},
                "detail": {"field": "target"},
                "color": {"field": "kind", "type": "nominal", "title": None,
                          "scale": {"domain": kinds, "range": [FLAGGED, PLAIN]}, "legend": {"orient": "top"}},
                "strokeWidth": {"condition": {"test": "datum.kind === 'rank-1 spike'", "value": 2.5}, "value": 1},
                "strokeOpacity": {"condition": {"test": "datum.kind === 'rank-1 spike'", "value": 1}, "value": 0.35},
                "description": {"field": "label", "type": "nominal"},
            },
        }  # fmt: skip
        caption = (
            f"One line per target, for up to {LINES} targets. If a line drops right after its first point, the change "
            f"has one main direction. A line is a rank-1 spike if this direction has more than {percent(SPIKE)} of the "
            "squared norm, and the rank is at least 4."
        )
        yield Chart(f"spectra{end}", "How the adapters change the model", f"Singular values{of}", caption, spec)


TICKS = [1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0001]

LINES = 60
"""The largest number of spectra that are drawn for an adapter. Targets with a spike come first. The other targets are
sorted by norm, largest first, and every n-th of them is drawn."""


def _few(effects: Sequence[Effect]) -> list[Effect]:
    spikes = [effect for effect in effects if _spiked(effect)][:LINES]
    others = sorted((effect for effect in effects if not _spiked(effect)), key=lambda effect: -(effect.norm or 0.0))
    room = LINES - len(spikes)
    step = max(1, math.ceil(len(others) / max(room, 1)))
    return [*spikes, *others[::step][:room]]


def _spiked(effect: Effect) -> bool:
    return (effect.spike or 0.0) > SPIKE and (effect.rank or len(effect.spectrum)) >= 4


def _ranks(measured: Measurements) -> Iterator[Chart]:
    values, ranks = [], []
    for effect in measured.effects:
        if effect.effective_rank is None or effect.rank is None:
            continue
        cell, name = measured.cells[effect.target], measured.names[effect.adapter]
        values.append({
            "module": cell.module, "value": effect.effective_rank, "adapter": name, "rank": effect.rank,
            "label": f"{name}: {cell.title}: effective rank {effect.effective_rank:.3g} of {effect.rank}",
        })  # fmt: skip
        ranks.append(effect.rank)
    if not values:
        return
    several = len(measured.names) > 1
    columns = sorted({str(each["module"]) for each in values}, key=reading_order)
    points: dict[str, Any] = {
        "mark": {"type": "circle", "size": 26, "opacity": 0.55},
        "encoding": {
            "y": {"field": "module", "type": "nominal", "sort": columns, "title": None, "axis": {"grid": True}},
            "x": {"field": "value", "type": "quantitative", "title": "effective rank", "scale": {"zero": True}},
            "color": _colour(measured) if several else {"value": PALETTE[0]},
            "description": {"field": "label"},
        },
    }  # fmt: skip
    if several:
        points["encoding"]["yOffset"] = {"field": "adapter", "type": "nominal", "sort": list(measured.names)}
    stored: dict[str, Any] = {
        "mark": {"type": "tick", "thickness": 3},
        "encoding": {
            "y": {"field": "module", "type": "nominal", "sort": columns},
            "x": {"aggregate": "max", "field": "rank", "type": "quantitative"},
            "color": points["encoding"]["color"] if several else {"value": FLAGGED},
        },
    }
    if several:  # Draw one tick per adapter, because adapters can have different ranks.
        stored["encoding"]["yOffset"] = points["encoding"]["yOffset"]
    spec = {
        "data": {"values": values}, "width": 340, "height": {"step": 22 if not several else 9},
        "layer": [points, stored],
    }  # fmt: skip
    caption = (
        "Each point is a target's effective rank: the exponential of the entropy of its singular values. The vertical "
        "line is the stored rank. If the points are far left of the line, a smaller rank is enough."
    )
    yield Chart("ranks", "How the adapters change the model", "Effective rank against rank", caption, spec)


def _colour(measured: Measurements) -> dict[str, JsonValue]:
    names = list(measured.names)
    return {
        "field": "adapter", "type": "nominal", "title": None, "sort": names, "legend": {"orient": "top", "columns": 4},
        "scale": {"domain": names, "range": [PALETTE[at % len(PALETTE)] for at in range(len(names))]},
    }  # fmt: skip


def _values(measured: Measurements) -> Iterator[Chart]:
    ranges: dict[tuple[str, str], list[Sequence[float]]] = defaultdict(list)
    for effect in measured.effects:
        if effect.quantiles:
            ranges[measured.cells[effect.target].module, measured.names[effect.adapter]].append(effect.quantiles)
    if not ranges:
        return
    values = []
    for (module, name), here in ranges.items():
        middle = [math.fsum(column) / len(column) for column in zip(*here, strict=True)]
        quantiles_text = ", ".join(
            f"{percent(share)}: {value:.2g}" for share, value in zip(QUANTILES, middle, strict=True)
        )
        keys = {f"q{at}": value for at, value in enumerate(middle)}
        values.append({"module": module, "adapter": name, "label": f"{name}: {module}: {quantiles_text}", **keys})
    several = len(measured.names) > 1
    columns = sorted({module for module, _ in ranges}, key=reading_order)
    y: dict[str, Any] = {"field": "module", "type": "nominal", "sort": columns, "title": None}
    offset = {"yOffset": {"field": "adapter", "type": "nominal", "sort": list(measured.names)}} if several else {}
    colour: dict[str, Any] = _colour(measured) if several else {"value": PALETTE[0]}

    def bar(low: int, high: int, size: int, opacity: float) -> dict[str, JsonValue]:
        return {
            "mark": {"type": "rule", "strokeWidth": size, "strokeCap": "round", "opacity": opacity},
            "encoding": {
                "y": y, **offset, "color": colour, "description": {"field": "label"},
                "x": {"field": f"q{low}", "type": "quantitative", "title": "value of an element of the change",
                      "axis": {"format": ".1e", "tickCount": 4}},
                "x2": {"field": f"q{high}"},
            },
        }  # fmt: skip

    width = 10 if not several else 5
    spec = {
        "data": {"values": values}, "width": 340, "height": {"step": 22 if not several else 9},
        "layer": [bar(0, 6, 1, 0.9), bar(1, 5, width // 2, 0.45), bar(2, 4, width, 0.9)],
    }  # fmt: skip
    caption = (
        "The thick bar contains the middle half of the elements, the medium bar 90 %, and the thin bar 98 %. The bars "
        "are measured in a block of up to 25,600 elements per target. Their ends are averaged over the layers."
    )
    yield Chart("values", "How the adapters change the model", "Values of the elements", caption, spec)


def _base(measured: Measurements) -> Iterator[Chart]:
    group = "Against the base"
    for at in range(len(measured.names)):
        end, of = _named(measured, at)
        effects = [effect for effect in measured.of(at) if effect.relative is not None]
        if effects:
            spec = _map(
                measured,
                effects,
                lambda e: e.relative,
                max,
                lambda value: f"{percent(value)} of the weight",
                "share",
            )
            caption = "Norm of the change, divided by the norm of the base's weight."
            yield Chart(f"relative{end}", group, f"Size against the base{of}", caption, spec)
        effects = [effect for effect in measured.of(at) if effect.intruders is not None]
        if effects:
            spec = _map(
                measured, effects, lambda e: e.intruders, max, lambda value: f"{value:.0f} of 10", "intruders",
                domain=(0.0, 10.0),
            )  # fmt: skip
            caption = (
                "The number of intruders among the first ten singular vectors of the tuned weight. An intruder is one "
                "whose absolute cosine with each singular vector of the base's weight is under 0.6. Intruders are "
                "associated with forgetting. The targets with the largest relative changes are checked first. The "
                "total cost of the decompositions is limited."
            )
            yield Chart(f"intruders{end}", group, f"Intruder dimensions{of}", caption, spec)


def _likeness(measured: Measurements) -> Iterator[Chart]:
    names = list(measured.names)
    if len(names) < 2 or not measured.relations:
        return
    for name, title, caption, value, domain, scheme in (
        ("cosine", "Cosine between the adapters",
         "1: same direction; 0: unrelated; -1: opposite directions. Computed over all targets together.",
         measured.cosine, (-1.0, 1.0), "redblue"),
        ("overlap", "Subspace overlap",
         "The part of the smaller input subspace that lies in the larger one, from 0 to 1; mean over common targets.",
         lambda a, b: measured.mean(a, b, "overlap_in"), (0.0, 1.0), "viridis"),
    ):  # fmt: skip
        values = []
        for a in range(len(names)):
            for b in range(len(names)):
                number = 1.0 if a == b else value(a, b)
                if number is not None:
                    text = f"{number:.2f}".replace("-0.00", "0.00")
                    values.append({"a": names[a], "b": names[b], "value": number, "text": text,
                                   "label": f"{names[a]} and {names[b]}: {number:.4f}"})  # fmt: skip
        x = {"field": "a", "type": "nominal", "sort": names, "title": None,
             "axis": {"labelAngle": -40, "domain": False, "ticks": False}}  # fmt: skip
        y = {"field": "b", "type": "nominal", "sort": names, "title": None, "axis": {"domain": False, "ticks": False}}
        dark = "abs(datum.value) > 0.55" if name == "cosine" else "datum.value < 0.6"
        spec = {
            "data": {"values": values}, "width": {"step": 42}, "height": {"step": 30},
            "layer": [
                {"mark": {"type": "rect", "cornerRadius": 2},
                 "encoding": {"x": x, "y": y, "description": {"field": "label"},
                              "color": {"field": "value", "type": "quantitative", "title": None,
                                        "scale": {"scheme": scheme, "domain": list(domain)}}}},
                {"mark": {"type": "text", "fontSize": 11, "aria": False},
                 "encoding": {"x": x, "y": y, "text": {"field": "text"},
                              "color": {"condition": {"test": dark, "value": "white"}, "value": "black"}}},
            ],
        }  # fmt: skip
        yield Chart(name, "Between the adapters", title, caption, spec)


@dataclass(frozen=True, slots=True)
class _At:
    target: str
    value: float


def _conflict(measured: Measurements) -> Iterator[Chart]:
    group = "Between the adapters"
    signs: dict[str, list[float]] = defaultdict(list)
    for each in measured.relations:
        if each.sign_conflict is not None:
            signs[each.target].append(each.sign_conflict)
    if signs:
        points = [_At(target, max(values)) for target, values in signs.items()]
        spec = _map(
            measured, points, lambda each: each.value, max, lambda value: f"{percent(value)} of the signs differ",
            "share", domain=(0.0, 1.0), middle=0.5, scheme="redblue", reverse=True,
        )  # fmt: skip
        caption = (
            "Share of the elements that two adapters change with opposite signs. With several pairs of adapters, the "
            "largest share is shown. For unrelated changes, the share is one half (white). Red means conflict."
        )
        yield Chart("sign-conflict", group, "Sign conflict by target", caption, spec)
    if measured.together:
        points = [_At(target, share) for target, share in measured.together.items()]
        spec = _map(
            measured, points, lambda each: each.value, max, lambda value: f"{percent(value)} cancelled in a sum",
            "cancelled", domain=(0.0, 1.0), scheme="viridis",
        )  # fmt: skip
        count = len(measured.names)
        # The sum of n independent values grows with the square root of n; the sum of their magnitudes grows with n.
        usual = percent(1 - 1 / math.sqrt(count))
        caption = (
            "When the adapters' changes are added element by element, a share of their total magnitude cancels. The "
            f"chart shows this share. With {count} unrelated adapters, {usual} cancels, but each adapter still works, "
            "because the changes have different directions. If more cancels, the adapters work against each other."
        )
        yield Chart("interference", group, "Interference of a plain sum", caption, spec)


def _merged(measured: Measurements) -> Iterator[Chart]:
    if not measured.merged:
        return
    points = [_At(each.target, each.kept) for each in measured.merged]
    low = min(0.9, *(each.value for each in points))
    spec = _map(
        measured, points, lambda each: each.value, min, lambda value: f"{percent(value)} kept", "kept",
        domain=(low, max(1.0, *(each.value for each in points))),
    )  # fmt: skip
    caption = (
        "Share of the adapters' change that is in the merged weights. The difference between the merged weights and "
        "the base's weights is projected onto this change. 100 % is the whole change."
    )
    yield Chart("kept", "In the merged model", "Change kept by the merged model", caption, spec)
