"""A Gantt chart of any logged episode: what each instance did and when, and the lives of single requests.

``Simulator(scenario, rules, seed, log=True)`` keeps the log; :func:`draw_timeline` draws it. How the log is read is
``history.py``, which is open to a script of one's own, too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, PathPatch, Rectangle
from matplotlib.path import Path

from ooco_gym.cluster import log as events
from ooco_gym.evaluation.history import Log, Span, Stage, Transfer, end_of, read_spans, read_transfers

#: Blue is online and orange offline (Okabe-Ito), dark is prefill and light is decode.
COLOURS = {
    "online prefill": "#0072B2",
    "offline prefill": "#E69F00",
    "online decode": "#A9D2EC",
    "offline decode": "#F8DFA9",
    "thrown away": "#D55E00",
    "recomputed": "#000000",
    "down": "#8C8C8C",
    "draining": "#CC79A7",
}
_HATCHES = {"thrown away": "////", "recomputed": "xxx"}
_INK = "#333333"
_HALF = 0.38  # half the height of a row
_UNITS = {"s": 1.0, "ms": 1e3}


def _mark(span: Span) -> str:
    """How a bar is hatched: work that is lost, or done a second time; empty for any other."""
    return span.kind if span.kind == "thrown away" else "recomputed" if span.recomputed else ""


def _merged(spans: Sequence[Span], shortest_s: float) -> list[Span]:
    """Neighbours that look the same and are too short to be told apart become one bar."""
    merged: list[Span] = []
    last: dict[int, int] = {}  # of each instance, where its last span is
    for span in spans:
        at = last.get(span.instance, -1)
        before = merged[at] if at >= 0 else None
        if (
            before is not None
            and span.kind == before.kind == "iteration"
            and (span.parts, _mark(span)) == (before.parts, _mark(before))
            and span.seconds < shortest_s
            and abs(span.start_s - before.end_s) < 1e-9
        ):
            merged[at] = replace(before, end_s=span.end_s)
            continue
        last[span.instance] = len(merged)
        merged.append(span)
    return merged


def _boxes(axis: Axes, boxes: Sequence[tuple[float, float, float, float]], **style: Any) -> None:
    """Rectangles (left, right, bottom, top) of one look as a single path: one element of an SVG instead of hundreds."""
    corners = [[(l, b), (r, b), (r, t), (l, t), (l, b)] for l, r, b, t in boxes]  # noqa: E741
    if corners:
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(corners)
        axis.add_patch(PathPatch(Path(np.array(corners).reshape(-1, 2), codes), **style))


def _bars(axis: Axes, spans: Sequence[Span], row: Mapping[int, float], unit: float, shortest_s: float) -> None:
    boxes: dict[tuple[str, bool], list[tuple[float, float, float, float]]] = defaultdict(list)
    hatched: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
    for span in _merged(spans, shortest_s):
        middle, left, right = row[span.instance], span.start_s * unit, span.end_s * unit
        if span.kind == "draining":
            boxes["draining", False].append((left, right, middle + _HALF + 0.02, middle + _HALF + 0.14))
            continue
        if span.kind == "down":
            boxes["down", False].append((left, right, middle - _HALF, middle + _HALF))
            continue
        if mark := _mark(span):
            hatched[mark].append((left, right, middle - _HALF, middle + _HALF))
        height = 2 * _HALF / max(len(span.parts), 1)
        for index, part in enumerate(span.parts):
            bottom = middle - _HALF + index * height
            boxes[part, span.seconds > shortest_s].append((left, right, bottom, bottom + height))
    for (part, edged), found in boxes.items():
        _boxes(axis, found, facecolor=COLOURS[part], edgecolor="white" if edged else "none", linewidth=0.5)
    for hatch, found in hatched.items():
        _boxes(axis, found, facecolor="none", edgecolor=COLOURS[hatch], hatch=_HATCHES[hatch], linewidth=0.6)


def _arrow(axis: Axes, transfer: Transfer, row: Mapping[int, float], unit: float) -> None:
    start, end = row[transfer.source], row[transfer.target]
    edge = _HALF if end < start else -_HALF
    axis.add_patch(
        FancyArrowPatch(
            (transfer.start_s * unit, start - edge),
            (transfer.end_s * unit, end + edge),
            arrowstyle="-|>",
            mutation_scale=7,
            shrinkA=0,
            shrinkB=0,
            linewidth=1.0,
            linestyle="-" if transfer.why == "hand-over" else (0, (2.5, 1.2)),
            color=_INK,
            zorder=4,
        )
    )


def draw_timeline(
    log: Log,
    axis: Axes | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
    unit: str = "s",
    names: Mapping[int, str] | None = None,
    arrivals: bool = True,
    transfers: bool = True,
    legend: bool = True,
) -> Axes:
    """Draw a logged episode, [events] LOG, from ``start_s`` to ``end_s`` (default: the last event); returns the axis.

    One row per instance that ``names`` maps to a label (default: all that the log mentions). A bar is an iteration,
    a bar of several colours one that does several things at once; neighbours too short to be told apart are drawn as
    one. Arrows are transfers (dashed: pulls and pushbacks), triangles online requests where they were routed.
    ``unit`` is ``s`` or ``ms``. Without ``axis`` a new figure is made:
    ``draw_timeline(log).figure.savefig("episode.svg")``.
    """
    end_s = end_of(log) if end_s is None else end_s
    if names is None:
        names = {i: f"instance {i}" for i in range(1 + max((int(i) for i in log["instance"]), default=0))}
    factor = _UNITS[unit]
    row = {instance: -float(index) for index, instance in enumerate(names)}
    if axis is None:
        figure = Figure(figsize=(9.0, 1.2 + 0.6 * len(row)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
    shown = [s for s in read_spans(log) if s.instance in row and s.end_s > start_s and s.start_s < end_s]
    shown = [replace(s, start_s=max(s.start_s, start_s), end_s=min(s.end_s, end_s)) for s in shown]
    _bars(axis, shown, row, factor, (end_s - start_s) / 300.0)
    for transfer in read_transfers(log) if transfers else ():
        inside = start_s <= transfer.start_s and transfer.end_s <= end_s
        if inside and transfer.source in row and transfer.target in row:
            _arrow(axis, transfer, row, factor)
    if arrivals:
        routed = log[(log["kind"] == events.ROUTED) & (log["time_s"] >= start_s) & (log["time_s"] <= end_s)]
        at = [
            (float(e["time_s"]) * factor, row[int(e["instance"])] + _HALF) for e in routed if int(e["instance"]) in row
        ]
        if at:
            x, y = zip(*at, strict=True)
            axis.plot(x, y, linestyle="none", marker=7, markersize=6, color=_INK, clip_on=False, zorder=5)
    axis.set_yticks(list(row.values()), [names[instance] for instance in row])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(-len(row) + 1 - 0.55, 0.6)
    axis.set_xlim(start_s * factor, end_s * factor)
    axis.set_xlabel(f"simulated time [{unit}]")
    if legend:
        handles = legend_handles(parts_of(shown))
        axis.legend(
            handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=max(len(handles), 1), frameon=False
        )
    return axis


def parts_of(spans: Iterable[Span]) -> list[str]:
    """The colours that some spans need, in the order of :data:`COLOURS`."""
    used = {part for span in spans for part in (*span.parts, span.kind, _mark(span))}
    return [name for name in COLOURS if name in used]


def legend_handles(parts: Iterable[str]) -> list[Rectangle]:
    """A labelled patch for each colour, for a legend of one's own."""
    handles = []
    for part in parts:
        hatch = _HATCHES.get(part)
        face, edge = ("none", COLOURS[part]) if hatch else (COLOURS[part], "none")
        handles.append(Rectangle((0, 0), 1, 1, facecolor=face, edgecolor=edge, hatch=hatch, linewidth=0.6, label=part))
    return handles


#: Colours of :func:`draw_stages`; a pair is (online, offline), one colour stands for both.
STAGE_COLOURS = {
    "waiting": ("#E4E4E4", "#E4E4E4"),
    "prefill": (COLOURS["online prefill"], COLOURS["offline prefill"]),
    "begun": ("#C9C9C9", "#C9C9C9"),
    "held": ("#C9C9C9", "#C9C9C9"),
    "transfer": ("#666666", "#666666"),
    "decode": (COLOURS["online decode"], COLOURS["offline decode"]),
    "resident": ("#C9C9C9", "#C9C9C9"),
    "on host": ("#56B4E9", "#009E73"),
    "thrown away": (COLOURS["online prefill"], COLOURS["offline prefill"]),
}


def draw_stages(axis: Axes, stages: Sequence[Stage], offline: bool, row: float, unit: str = "s") -> None:
    """The life of one request as a bar at height ``row`` of an axis: see :func:`read_stages`."""
    factor = _UNITS[unit]
    for name, colours in STAGE_COLOURS.items():
        boxes = [(s.start_s * factor, s.end_s * factor, row - 0.25, row + 0.25) for s in stages if s.name == name]
        _boxes(axis, boxes, facecolor=colours[offline], edgecolor="none")
        if name in _HATCHES:
            _boxes(axis, boxes, facecolor="none", edgecolor=COLOURS[name], hatch=_HATCHES[name], linewidth=0.6)


def draw_tokens(axis: Axes, times_s: Sequence[float], row: float, unit: str = "s") -> None:
    """A short stroke at every token of a request."""
    factor = _UNITS[unit]
    points = [(t * factor, row + end) for t in times_s if math.isfinite(t) for end in (-0.25, 0.25)]
    if points:
        codes = [Path.MOVETO, Path.LINETO] * (len(points) // 2)
        axis.add_patch(PathPatch(Path(np.array(points), codes), edgecolor=_INK, linewidth=0.6))
