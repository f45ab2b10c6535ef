"""A Gantt chart of any logged episode: what each instance did and when, from the event log alone.

``Simulator(scenario, rules, seed, log=True)`` keeps the log; :func:`draw_timeline` draws it. The same reading of the
log is open to a script of one's own: :func:`read_spans`, :func:`read_transfers`, :func:`read_stages`,
:func:`token_times`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, PathPatch, Rectangle
from matplotlib.path import Path

from ooco_gym.cluster import log as events

Log = npt.NDArray[np.void]
Key = tuple[bool, int]  # (offline, row or serial number): names a request in a log

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
ROLES = ("relaxed", "strict", "unified")
_HATCHES = {"thrown away": "////", "recomputed": "xxx"}
_INK = "#333333"
_HALF = 0.38  # half the height of a row


@dataclass(frozen=True)
class Span:
    """What one instance did for a time; pairs are (online, offline).

    ``kind`` is ``iteration``, ``thrown away`` (an interrupted prefill, or one that a failure cut off), ``down`` or
    ``draining``. ``recomputed`` counts the prompt tokens that had been prefilled before.
    """

    instance: int
    start_s: float
    end_s: float
    kind: str = "iteration"
    decodes: tuple[int, int] = (0, 0)
    prompt_tokens: tuple[int, int] = (0, 0)
    recomputed: int = 0

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    @property
    def parts(self) -> tuple[str, ...]:
        """Colours of the bar: one for each class and phase that takes part."""
        amounts = (*self.decodes, *self.prompt_tokens)
        names = ("online decode", "offline decode", "online prefill", "offline prefill")
        return tuple(name for name, amount in zip(names, amounts, strict=True) if amount)

    @property
    def hatch(self) -> str:
        """How the bar is marked: work that is lost, or done a second time; empty for any other."""
        return self.kind if self.kind == "thrown away" else "recomputed" if self.recomputed else ""


@dataclass(frozen=True)
class Transfer:
    """KV on its way, time in the link's queue included. ``why``: ``hand-over``, ``pull`` or ``push``."""

    source: int
    target: int
    start_s: float
    end_s: float
    request: Key
    tokens: int
    why: str


@dataclass(frozen=True)
class Stage:
    """A time in a request's life: ``waiting``, ``prefill``, ``thrown away``, ``held``, ``transfer``, ``decode``,
    ``resident`` (with its KV there, not in the decode batch), ``begun`` (a partial prefill) or ``on host``."""

    name: str
    instance: int
    start_s: float
    end_s: float


def _key(event: Any) -> Key:
    return bool(event["offline"]), int(event["request"])


def _end_of(log: Log) -> float:
    return float(log["time_s"][-1]) if len(log) else 0.0


_ENDS_BATCH = (events.ITERATION_END, events.INTERRUPTED, events.FAILED)


def _pieces(log: Log) -> Iterable[tuple[Any, list[Any]]]:
    """Every event with the pieces of the batch that it ends, where it ends one."""
    open_pieces: dict[int, list[Any]] = defaultdict(list)
    for event in log:
        instance = int(event["instance"])
        if event["kind"] == events.PIECE:
            open_pieces[instance].append(event)
            yield event, []
        elif event["kind"] in _ENDS_BATCH:
            yield event, open_pieces.pop(instance, [])
        else:
            yield event, []


def read_spans(log: Log) -> list[Span]:
    """Iterations, work thrown away, down times and drains, in order of their ends.

    The log does not say when a decode iteration began that a failure cut off; it is left out.
    """
    spans: list[Span] = []
    selected: dict[int, set[Key]] = defaultdict(set)
    since: dict[tuple[str, int], float] = {}
    for event, pieces in _pieces(log):
        kind, instance, time_s = int(event["kind"]), int(event["instance"]), float(event["time_s"])
        tokens = tuple(sum(int(p["a"]) for p in pieces if bool(p["offline"]) == offline) for offline in (False, True))
        prompt = (tokens[0], tokens[1])
        if kind == events.ENTER:
            selected[instance].add(_key(event))
        elif kind == events.EXIT:
            selected[instance].discard(_key(event))
        elif kind == events.ITERATION_END:
            offline = sum(key[0] for key in selected[instance]) if event["a"] else 0
            decodes = (int(event["a"]) - offline, offline)
            start_s = time_s - float(event["seconds"])
            spans.append(Span(instance, start_s, time_s, "iteration", decodes, prompt, int(event["d"])))
        elif kind == events.INTERRUPTED:
            spans.append(Span(instance, time_s - float(event["seconds"]), time_s, "thrown away", (0, 0), prompt))
        elif kind == events.FAILED:
            since["down", instance] = time_s
            if pieces:
                spans.append(Span(instance, float(pieces[0]["time_s"]), time_s, "thrown away", (0, 0), prompt))
        elif kind == events.STARTS_DRAINING and ("draining", instance) not in since:
            since["draining", instance] = time_s
        else:
            ended = {events.RECOVERED: "down", events.ROLE_CHANGED: "draining", events.STARTS_DRAINING: "draining"}
            if (start := since.pop((ended.get(kind, ""), instance), None)) is not None:
                spans.append(Span(instance, start, time_s, ended[kind]))
    spans += [Span(instance, start_s, _end_of(log), kind) for (kind, instance), start_s in since.items()]
    return spans


def read_transfers(log: Log) -> list[Transfer]:
    """Every hand-over, pull and pushback, in order of their starts. One that is under way at the end of the log ends
    there; one that a failure cut off ends with the failure."""
    found: list[Transfer] = []
    open_at: dict[Key, int] = {}
    why: dict[Key, str] = {}
    for event in log:
        kind, key = int(event["kind"]), _key(event)
        if kind in (events.PULLED, events.PUSHED):
            why[key] = "pull" if kind == events.PULLED else "push"
        elif kind == events.TRANSFER_START:
            open_at[key] = len(found)
            source, target, tokens = int(event["instance"]), int(event["a"]), int(event["b"])
            start_s = float(event["time_s"])
            found.append(Transfer(source, target, start_s, _end_of(log), key, tokens, why.pop(key, "hand-over")))
        elif kind in (events.TRANSFERRED, events.LOST) and key in open_at:
            at = open_at.pop(key)
            found[at] = replace(found[at], end_s=float(event["time_s"]))
    return found


def token_times(log: Log) -> dict[Key, list[float]]:
    """When each request emitted its tokens, seconds: the first is TTFT's, the gaps are TBT."""
    times: dict[Key, list[float]] = defaultdict(list)
    selected: dict[int, dict[Key, None]] = defaultdict(dict)
    for event in log:
        kind, instance, time_s = int(event["kind"]), int(event["instance"]), float(event["time_s"])
        if kind == events.ENTER:
            selected[instance][_key(event)] = None
        elif kind == events.EXIT:
            selected[instance].pop(_key(event), None)
        elif kind == events.PREFILLED:
            times[_key(event)].append(time_s)
        elif kind == events.ITERATION_END and event["a"]:
            for key in selected[instance]:
                times[key].append(time_s)
    return dict(times)


_STAGE_AFTER = {
    events.ARRIVAL: "waiting",
    events.ROUTED: "waiting",
    events.PIECE: "prefill",
    events.PREFILLED: "resident",
    events.BECAME_RESIDENT: "resident",
    events.ENTER: "decode",
    events.EXIT: "resident",
    events.WAITS_HELD: "held",
    events.TRANSFER_START: "transfer",
    events.EVICTED: "waiting",
    events.LOST: "waiting",
    events.CHECKPOINTED: "on host",
    events.FINISHED: "",
    events.CANCELLED: "",
}


def read_stages(log: Log, request: Key) -> list[Stage]:
    """The life of one request, without gaps, from its arrival; of an offline one from its first piece, for the log does
    not say when it joined the backlog."""
    stages: list[Stage] = []
    name, where, since_s = "", -1, 0.0

    def change(to: str, instance: int, now_s: float) -> None:
        nonlocal name, where, since_s
        if name and now_s > since_s:
            stages.append(Stage(name, where, since_s, now_s))
        name, where, since_s = to, instance, now_s

    own = (log["offline"] == request[0]) & (log["request"] == request[1])
    for event, pieces in _pieces(log[own | np.isin(log["kind"], _ENDS_BATCH)]):
        kind, time_s = int(event["kind"]), float(event["time_s"])
        if pieces:
            cut_off = kind != events.ITERATION_END
            name = "thrown away" if cut_off else name
            change("waiting" if cut_off else "begun", int(event["instance"]), time_s)
        elif kind in _STAGE_AFTER and event["request"] == request[1]:
            change(_STAGE_AFTER[kind], int(event["instance"]), time_s)
    change("", -1, _end_of(log))
    return stages


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
            and (span.parts, span.hatch) == (before.parts, before.hatch)
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
        if span.hatch:
            hatched[span.hatch].append((left, right, middle - _HALF, middle + _HALF))
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
    end_s = _end_of(log) if end_s is None else end_s
    if names is None:
        names = {i: f"instance {i}" for i in range(1 + max((int(i) for i in log["instance"]), default=0))}
    factor = {"s": 1.0, "ms": 1e3}[unit]
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
    used = {part for span in spans for part in (*span.parts, span.kind, span.hatch)}
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
    factor = {"s": 1.0, "ms": 1e3}[unit]
    for name, colours in STAGE_COLOURS.items():
        boxes = [(s.start_s * factor, s.end_s * factor, row - 0.25, row + 0.25) for s in stages if s.name == name]
        _boxes(axis, boxes, facecolor=colours[offline], edgecolor="none")
        if name in _HATCHES:
            _boxes(axis, boxes, facecolor="none", edgecolor=COLOURS[name], hatch=_HATCHES[name], linewidth=0.6)


def draw_tokens(axis: Axes, times_s: Sequence[float], row: float, unit: str = "s") -> None:
    """A short stroke at every token of a request."""
    factor = {"s": 1.0, "ms": 1e3}[unit]
    points = [(t * factor, row + end) for t in times_s if math.isfinite(t) for end in (-0.25, 0.25)]
    if points:
        codes = [Path.MOVETO, Path.LINETO] * (len(points) // 2)
        axis.add_patch(PathPatch(Path(np.array(points), codes), edgecolor=_INK, linewidth=0.6))
