"""Pictures of a running cluster, drawn from Telemetry alone, so that a live system can be drawn the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ooco_gym.cluster.control import KNOB_NAMES
from ooco_gym.cluster.telemetry import Telemetry


def _bar(share: float, width: int = 24) -> str:
    filled = int(round(min(max(share, 0.0), 1.0) * width))
    return "#" * filled + "." * (width - filled)


def render_text(telemetry: Telemetry) -> str:
    """A panel of ten lines: both pools, recent violations, the knobs in force."""
    t = telemetry
    relaxed_kv = t["relaxed_kv_online"] + t["relaxed_kv_offline"]
    strict_kv = t["strict_kv_online"] + t["strict_kv_offline"]
    lines = [
        f"t = {t['time_s']:8.1f} s   arrivals {t['arrivals_60s']:5.1f} /s"
        f"   violations {t['violation_rate_60s']:6.1%} (60 s)",
        f"relaxed x{t['relaxed_instances']:.0f}  KV      [{_bar(relaxed_kv)}] {relaxed_kv:5.0%}"
        f"  decodes {t['relaxed_decodes_mean']:.0f}",
        f"            queue   [{_bar(t['queued_prefill_max_s'] / t['ttft_slo_s'])}] "
        f"{t['queued_prefill_max_s'] * 1e3:.0f} ms of {t['ttft_slo_s'] * 1e3:.0f} ms TTFT",
        f"strict  x{t['strict_instances']:.0f}  KV      [{_bar(strict_kv)}] {strict_kv:5.0%}"
        f"  decodes {t['strict_decodes_mean']:.0f}, paused {t['strict_paused_mean']:.0f}",
        f"            step    [{_bar(t['strict_batch_s_max'] / t['tpot_slo_s'])}] "
        f"{t['strict_batch_s_max'] * 1e3:.1f} ms of {t['tpot_slo_s'] * 1e3:.0f} ms TPOT",
    ]
    knobs = [f"{name} {t[f'knob_{name}']:.5g}" for name in KNOB_NAMES]
    for first in range(0, len(knobs), 4):
        lines.append(("knobs       " if first == 0 else " " * 12) + "  ".join(knobs[first : first + 4]))
    return "\n".join(lines)


_CURVES = (
    ("KV taken [share]", (("relaxed_kv_max", "relaxed"), ("strict_kv_max", "strict")), None),
    ("predicted / SLO", (("queued_prefill_max_s", "queue"), ("strict_batch_s_max", "strict step")), "slo"),
    ("violations [share, 60 s]", (("violation_rate_60s", "violations"),), None),
)


def render_panel(history: Sequence[Telemetry]) -> npt.NDArray[np.uint8]:
    """The episode so far as an RGB picture, uint8 [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), dpi=80, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(_CURVES), 1, sharex=True)
    times = [record["time_s"] for record in history]
    slo = {"queued_prefill_max_s": "ttft_slo_s", "strict_batch_s_max": "tpot_slo_s"}
    for axis, (label, curves, scale) in zip(axes, _CURVES, strict=True):
        for name, title in curves:
            values = [record[name] / (record[slo[name]] if scale else 1.0) for record in history]
            axis.plot(times, values, label=title)
        axis.set_ylabel(label, fontsize=8)
        axis.set_ylim(bottom=0.0)
        axis.legend(loc="upper left", fontsize=7)
    axes[-1].set_xlabel("simulated time [s]")
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]
