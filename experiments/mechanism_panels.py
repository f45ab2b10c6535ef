"""What the figures of the mechanism share: their style, panels, lives of requests, notes, and how they are written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ooco_gym.evaluation.history import Key, Log, Span, Stage, read_stages, token_times
from ooco_gym.evaluation.timeline import STAGE_COLOURS, draw_stages, draw_tokens, legend_handles, parts_of

STYLE: dict[Any, Any] = {"font.size": 8.0, "svg.fonttype": "none", "svg.hashsalt": "ooco-gym", "hatch.linewidth": 0.6}
INK, GREY = "#333333", "#888888"


def figure_of(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.0, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(np.atleast_1d(figure.subplots(rows, columns, **options)).flat)


def title(axis: Axes, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=8)


def key_to(figure: Figure, spans: Sequence[Span], stages: Sequence[str] = ()) -> None:
    """One legend above all panels: the colours of the bars and the greys of the lives."""
    handles = legend_handles(parts_of(spans))
    handles += [Rectangle((0, 0), 1, 1, facecolor=STAGE_COLOURS[name][1], label=name) for name in stages]
    figure.legend(
        handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=7, handlelength=1.2,
        columnspacing=1.0,
    )  # fmt: skip


def lanes(
    axis: Axes, log: Log, requests: Mapping[Key, str], unit: str, since: Mapping[Key, float] | None = None
) -> None:
    """Lives of single requests, one row each, with a stroke for every token."""
    for index, key in enumerate(requests):
        stages = read_stages(log, key)
        if since and key in since:  # the log does not say when an offline request joined the backlog
            stages = [Stage("waiting", -1, since[key], stages[0].start_s), *stages]
        draw_stages(axis, stages, key[0], -index, unit)
        draw_tokens(axis, token_times(log).get(key, []), -index, unit)
    axis.set_yticks([-index for index in range(len(requests))], list(requests.values()))
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(-len(requests) + 0.45, 0.6)
    axis.set_xlabel(f"simulated time [{unit}]")


def measure(axis: Axes, left: float, right: float, y: float, text: str) -> None:
    """A dimension line."""
    axis.annotate("", (left, y), (right, y), arrowprops={"arrowstyle": "<->", "color": INK, "shrinkA": 0, "shrinkB": 0})
    axis.text((left + right) / 2, y + 0.06, text, ha="center", va="bottom", fontsize=7)


def note(axis: Axes, x: float, y: float, text: str, **options: Any) -> None:
    look: dict[str, Any] = {"fontsize": 7, "color": INK, "ha": "left", "va": "center"}
    axis.text(x, y, text, **(look | options))


def _shorter(attribute: re.Match[str]) -> str:
    """An SVG attribute in tenths of a point, paths on one line: half the bytes, and no difference to the eye."""
    text = re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number[0]):.1f}", attribute[0])
    return re.sub(r" ?\n([Lz]) ?", r"\1", text)


def write(figure: Figure, path: Path) -> None:
    """The same bytes every time, without a date, a version or a random name."""
    if path.suffix == ".svg":
        figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        path.write_text(re.sub(r'"[^"]*"', _shorter, path.read_text()))
    else:
        figure.savefig(path)
