"""Draw the figures of docs/mechanism.md, each from an episode simulated here: ``python experiments/mechanism.py``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mechanism_episode import Episode, Row, simulate
from mechanism_panels import GREY, INK, STYLE, figure_of, key_to, lanes, measure, note, title, write

from ooco_gym.cluster import log as events
from ooco_gym.evaluation.history import key_of, read_spans, read_stages, read_transfers, token_times
from ooco_gym.evaluation.timeline import COLOURS, draw_timeline

PAIR = {0: "relaxed 0", 1: "strict 1"}  # instances of the cluster of one and one


def online_life() -> Figure:
    rows = [(0.010, 2000, 14), (0.020, 1000, 12), (0.040, 1000, 14)]
    log = (episode := simulate(0.4, rows, cluster={"relaxed": 2, "strict": 1})).log
    figure, axes = figure_of(4.0, 2, sharex=True, height_ratios=[3, 3.4])
    draw_timeline(log, axes[0], 0.0, 0.33, "ms", {0: "relaxed 0", 1: "relaxed 1", 2: "strict 2"}, legend=False)
    axes[0].set_xlabel("")
    lanes(axes[1], log, {(False, 0): "request A", (False, 1): "request B", (False, 2): "request C"}, "ms")
    for letter, (arrival_s, _, _), row in zip("ABC", rows, (0, 1, 1), strict=True):
        note(axes[0], arrival_s * 1e3 + 3, -row + 0.48, letter)
    for stage in (stages := read_stages(log, (False, 2))):
        middle_ms, text = (stage.start_s + stage.end_s) * 500, f"{(stage.end_s - stage.start_s) * 1e3:.0f} ms"
        if stage.name in ("waiting", "prefill"):
            note(axes[1], middle_ms, -2, text, ha="center", color="white" if stage.name == "prefill" else INK)
    transfer = next(stage for stage in stages if stage.name == "transfer")
    text = f"KV transfer {(transfer.end_s - transfer.start_s) * 1e3:.1f} ms"
    note(axes[1], transfer.start_s * 1e3, -1.67, text, ha="center", va="bottom")
    axes[1].set_ylim(-3.3, 0.6)
    times_s = token_times(log)[False, 2]
    measure(axes[1], 40, times_s[0] * 1e3, -2.75, f"TTFT of C: {episode.ttft_s(2) * 1e3:.0f} ms")
    text = f"{len(times_s) - 1} more tokens, TPOT of C: {episode.tpot_s(2) * 1e3:.1f} ms"
    measure(axes[1], times_s[0] * 1e3, times_s[-1] * 1e3, -2.75, text)
    key_to(figure, read_spans(log), ("waiting", "transfer", "resident"))
    return figure


def offline_life() -> Figure:
    log = simulate(1.6, [(0.75, 1500, 50)], [(0.0, 250, 70)] * 20, knobs={0.0: {"gate_batch": 0.1}}).log
    figure, axes = figure_of(4.4, 2, sharex=True, height_ratios=[2, 3])
    draw_timeline(log, axes[0], 0.0, 1.6, "s", PAIR, legend=False)
    axes[0].set_xlabel("")
    pulled = [transfer.request for transfer in read_transfers(log) if transfer.why == "pull"]
    offline = [pulled[4], (True, 15), (True, 17)]
    followed = {key: f"offline {key[1]}" for key in offline} | {(False, 0): "online"}
    lanes(axes[1], log, followed, "s", dict.fromkeys(offline, 0.0))
    pull_s = next(transfer.start_s for transfer in read_transfers(log) if transfer.request == offline[0])
    note(axes[1], pull_s, 0.4, "pulled to the strict instance")
    note(axes[1], 0.01, -2, "waits at the gate")
    key_to(figure, read_spans(log), ("waiting", "transfer", "resident"))
    return figure


def preemption() -> Figure:
    chunk = {"prefill_chunk": 2048.0}
    cases: list[tuple[str, str, dict[str, float]]] = [
        ("layer (OOCO)", "layer", {}),
        ("layer, preempt_slack 0.8", "layer", {"preempt_slack": 0.8}),
        ("iteration", "iteration", {}),
        ("layer, prefill_chunk 2048", "layer", chunk),
        ("chunk, prefill_chunk 2048", "chunk", chunk),
        ("iteration, prefill_chunk 2048", "iteration", chunk),
    ]
    arrivals_s = (0.25, 0.72)
    figure, axes = figure_of(4.8, len(cases), sharex=True)
    shown = []
    for axis, (name, rule, knobs) in zip(axes, cases, strict=True):
        online = [(at_s, 1000, 2) for at_s in arrivals_s]
        episode = simulate(2.5, online, [(0.0, 4000, 50)], True, {"preemption": rule}, {0.0: knobs})
        spans = [span for span in read_spans(episode.log) if span.instance == 0 and span.start_s < 1.4]
        shown += spans
        draw_timeline(episode.log, axis, 0.0, 1.4, "s", {0: name}, legend=False)
        axis.set_xlabel("")
        lost = sum(span.seconds for span in spans if span.kind == "thrown away")
        again = sum(span.seconds * span.recomputed / sum(span.prompt_tokens) for span in spans if span.recomputed)
        ttft = " and ".join(f"{episode.ttft_s(request) * 1e3:.0f}" for request in (0, 1))
        text = f"TTFT {ttft} ms\nthrown away {lost * 1e3:.0f} ms\nrecomputed {again * 1e3:.0f} ms"
        note(axis, 1.01, 0.5, text, transform=axis.transAxes)
        for at_s in arrivals_s:
            axis.axvline(at_s, color=INK, linewidth=0.8, linestyle=":")
    axes[-1].set_xlabel("simulated time [s]; online requests arrive at 0.25 and 0.72 s, TTFT SLO 500 ms")
    key_to(figure, shown)
    return figure


def mix_selection() -> Figure:
    slo_ms, until_s = 16.0, 8.0
    bounds = {0.0: 0.98, 6.0: 0.85, 7.0: 1.1}
    steady = [(0.2 + 0.8 * k, 800, 130) for k in range(10)]
    burst = [(4.0 + 0.02 * k, 1000, 150) for k in range(16)]
    episode = simulate(
        until_s, sorted(steady + burst), [(0.0, 4000, 450)] * 44, False, {"offline_decode": "strict"},
        {at_s: {"tpot_bound": bound} for at_s, bound in bounds.items()}, 0.05,
        cluster={"relaxed": 2, "strict": 1}, slo={"ttft_s": 0.5, "tpot_s": slo_ms / 1e3},
    )  # fmt: skip
    spans = [span for span in read_spans(episode.log) if span.instance == 2 and span.decodes != (0, 0)]
    figure, axes = figure_of(4.2, 2, sharex=True)
    ends_s = np.array([span.end_s for span in spans])
    axes[0].plot(
        ends_s[::2], [span.seconds * 1e3 for span in spans[::2]], color=COLOURS["online prefill"], linewidth=0.9
    )
    for (from_s, bound), to_s in zip(bounds.items(), [*list(bounds)[1:], until_s], strict=True):
        axes[0].plot([from_s, to_s], [slo_ms * bound] * 2, color=COLOURS["thrown away"], linewidth=1.4)
        note(axes[0], (from_s + to_s) / 2, slo_ms * bound - 0.4, f"tpot_bound {bound:g}", ha="center", va="top")
    axes[0].axhline(slo_ms, color=GREY, linestyle="--", linewidth=0.8)
    note(axes[0], 0.05, slo_ms + 0.12, f"TPOT SLO {slo_ms:g} ms", va="bottom")
    axes[0].set(ylabel="strict iteration [ms]", ylim=(11, 18.5))
    at = np.clip(np.searchsorted(ends_s, episode.times_s) - 1, 0, None)
    online = np.array([spans[k].decodes[0] for k in at])
    decoding = np.array([watched["strict_decodes_mean"] for watched in episode.watched])
    paused = np.array([watched["strict_paused_mean"] for watched in episode.watched])
    online = np.minimum(online, decoding)
    edges = (np.zeros(len(at)), online, decoding, decoding + paused)
    for low, high, name in zip(edges, edges[1:], ("online decode", "offline decode", "paused"), strict=False):
        colour = COLOURS.get(name, "#9A9A9A")
        axes[1].fill_between(episode.times_s, low, high, step="post", color=colour, linewidth=0, label=name)
    axes[1].set(ylabel="resident sequences", xlabel="simulated time [s]", xlim=(0, until_s), ylim=(0, None))
    axes[1].legend(loc="upper left", frameon=False)
    return figure


def strict_prefill() -> Figure:
    online = [(0.05 * k, 700, 400) for k in range(8)]
    figure, axes = figure_of(3.7, 2, sharex=True)
    shown = []
    for axis, budget in zip(axes, (0.0, 1024.0), strict=True):
        episode = simulate(3.0, online, [(0.0, 3000, 80)], True, knobs={0.0: {"strict_prefill": budget}})
        spans = [span for span in read_spans(episode.log) if 1.0 < span.end_s <= 2.0]
        shown += spans
        draw_timeline(episode.log, axis, 1.0, 2.0, "s", PAIR, legend=False)
        tokens = [sum(span.prompt_tokens[1] for span in spans if span.instance == i) for i in (0, 1)]
        steps = [span.seconds for span in spans if span.instance == 1]
        text = (
            f"strict_prefill {budget:.0f}: {tokens[0]:,} offline prompt tokens on the relaxed instance, {tokens[1]:,} "
        )
        text += f"on the strict one; iterations there {np.mean(steps) * 1e3:.1f} ms, longest {max(steps) * 1e3:.1f} ms"
        title(axis, text)
    axes[0].set_xlabel("")
    key_to(figure, shown)
    return figure


def _utilisation(axis: Axes, episode: Episode, pool: str, name: str, colour: str) -> None:
    """KV utilisation over time, with a cross at every eviction and a triangle at every pushback."""
    shares = np.array([100 * watched[f"{pool}_kv_max"] for watched in episode.watched])
    axis.plot(episode.times_s, shares, color=colour, linewidth=1.1, label=name)
    for kind, marker in ((events.EVICTED, "x"), (events.PUSHED, "v")):
        at_s = episode.log["time_s"][episode.log["kind"] == kind]
        axis.plot(at_s, np.interp(at_s, episode.times_s, shares), marker, color=colour, markersize=4, linestyle="none")


def kv_pressure() -> Figure:
    figure, axes = figure_of(6.6, 4, sharex=True, height_ratios=[3, 3, 1.2, 1.2])
    blue, orange, green = "#0072B2", "#D55E00", "#009E73"
    strict: dict[str, tuple[str, dict[str, float]]] = {
        "OOCO: pull_kv 0.9": (blue, {}),
        "pull_kv 1": ("#CC79A7", {"pull_kv": 1.0}),
        "pull_kv 0.5": (green, {"pull_kv": 0.5}),
        "pushback 0.85": (orange, {"pushback": 0.85}),
    }
    for name, (colour, knobs) in strict.items():
        episode = simulate(
            4.0, [(0.1, 500, 300)], [(0.0, 800, 500)], True, knobs={0.0: {"gate_batch": 0.15} | knobs}, watch_s=0.02,
            cluster={"relaxed": 1, "strict": 1, "kv_blocks": [4000, 1200]},
        )  # fmt: skip
        counts = f"evictions {episode.count(events.EVICTED)}, pushbacks {episode.count(events.PUSHED)}"
        _utilisation(axes[0], episode, "strict", f"{name}: {counts}", colour)
    title(axes[0], "strict instance of 1,200 KV blocks (19,200 tokens)")
    burst = [(1.5 + 0.02 * k, 2000, 100) for k in range(5)]
    for colour, reserve in ((blue, 0.0), (green, 0.4)):
        episode = _burst_episode(burst, {"kv_reserve": reserve}, "recompute", watch_s=0.02)
        name = f"kv_reserve {reserve:g}: evictions {episode.count(events.EVICTED)}"
        _utilisation(axes[1], episode, "relaxed", name, colour)
    title(
        axes[1],
        "relaxed instance of 1,500 KV blocks (24,000 tokens); five online prompts of 2,000 tokens from 1.5 s on",
    )
    shown = []
    for axis, rule in zip(axes[2:], ("recompute", "host"), strict=True):
        log = _burst_episode(burst, {}, rule).log
        shown += [span for span in read_spans(log) if span.instance == 0]
        draw_timeline(log, axis, 0.0, 4.0, "s", {0: "relaxed 0"}, legend=False)
        title(axis, f"the same burst, kv_reserve 0, evicted_kv = {rule}")
        axis.set_xlabel("")
    for axis in axes[:2]:
        axis.set(ylabel="KV in use [%]", ylim=(0, 105))
        axis.legend(loc="lower right", frameon=False, fontsize=7)
    axes[-1].set_xlabel("simulated time [s]")
    key_to(figure, shown)
    return figure


def _burst_episode(burst: Sequence[Row], knobs: Mapping[str, float], rule: str, watch_s: float = 0.0) -> Episode:
    return simulate(
        4.0, burst, [(0.0, 800, 300)], True, {"migration": "none", "evicted_kv": rule},
        {0.0: {"gate_batch": 0.2} | dict(knobs)}, watch_s,
        cluster={"relaxed": 1, "strict": 1, "kv_blocks": [1500, 4000]},
    )  # fmt: skip


def role_change() -> Figure:
    online = [(0.1 + 0.4 * k, 900, 150) for k in range(40)]
    log = simulate(
        17.0, online, [(0.0, 1500, 150)], True, {"routing": "round_robin"},
        {2.0: {"strict_share": -0.25}, 6.0: {"strict_share": 0.0}}, cluster={"relaxed": 2, "strict": 2},
    ).log  # fmt: skip
    figure, axes = figure_of(3.4)
    names = {0: "relaxed 0", 1: "relaxed 1", 2: "instance 2", 3: "strict 3"}
    draw_timeline(log, axes[0], 0.0, 16.0, "s", names, arrivals=False, transfers=False, legend=False)
    for at_s, text in ((2.0, "strict_share -0.25"), (6.0, "strict_share 0")):
        axes[0].axvline(at_s, color=INK, linewidth=0.8, linestyle=":")
        note(axes[0], at_s + 0.05, 0.5, text)
    for span in read_spans(log):
        if span.kind == "draining":
            note(axes[0], span.end_s + 0.05, -1.5, f"drained after {span.seconds:.2f} s")
    axes[0].set_ylim(-3.5, 0.65)
    key_to(figure, read_spans(log))
    return figure


def failure() -> Figure:
    online = [(0.2 * k, 900, 120) for k in range(12)]
    log = simulate(
        3.0, online, [(0.0, 800, 120)], True, knobs={0.0: {"gate_batch": 0.1}}, cluster={"relaxed": 2, "strict": 2},
        faults={"outages": [{"instance": 2, "at_s": 1.0, "for_s": 1.2}]},
    ).log  # fmt: skip
    figure, axes = figure_of(5.0, 2, sharex=True, height_ratios=[4, 3])
    draw_timeline(
        log, axes[0], 0.8, 2.3, "s", {0: "relaxed 0", 1: "relaxed 1", 2: "strict 2", 3: "strict 3"}, legend=False
    )
    axes[0].set_xlabel("")
    lost = [key_of(event) for event in log[log["kind"] == events.LOST]]
    followed = [next(key for key in lost if not key[0]), next(key for key in lost if key[0])]
    lanes(axes[1], log, {key: f"{'offline' if key[0] else 'online'} {key[1]}" for key in followed}, "s")
    key_to(figure, read_spans(log), ("waiting", "transfer", "resident"))
    return figure


def unified() -> Figure:
    online = [(0.3 + 0.13 * k, 1500, 60) for k in range(9)]
    cases: list[tuple[str, dict[str, Any], dict[int, str]]] = [
        ("one relaxed and one strict instance", {"relaxed": 1, "strict": 1}, PAIR),
        ("two unified, chunk_tokens 2048", {"relaxed": 0, "strict": 0, "unified": 2}, {0: "unified 0", 1: "unified 1"}),
        (
            "two unified, chunk_tokens 512",
            {"relaxed": 0, "strict": 0, "unified": 2, "chunk_tokens": 512},
            {0: "unified 0", 1: "unified 1"},
        ),
    ]
    figure, axes = figure_of(5.2, len(cases), sharex=True)
    shown = []
    for axis, (name, cluster, names) in zip(axes, cases, strict=True):
        episode = simulate(4.0, online, [(0.0, 1500, 100)], True, cluster=cluster)
        shown += read_spans(episode.log)
        draw_timeline(episode.log, axis, 0.2, 1.6, "s", names, legend=False)
        axis.set_xlabel("")
        times = [times_s for key, times_s in token_times(episode.log).items() if not key[0]]
        gaps = np.concatenate([np.diff(times_s) for times_s in times])
        ttft = np.mean([episode.ttft_s(request) for request in range(len(online))])
        tpot = np.mean([episode.tpot_s(request) for request in range(len(online))])
        done = [span for span in read_spans(episode.log) if 0.2 < span.end_s <= 1.6 and span.kind == "iteration"]
        offline = sum(span.decodes[1] + span.prompt_tokens[1] for span in done)
        text = f"{name}: means TTFT {ttft * 1e3:.0f} ms, TPOT {tpot * 1e3:.1f} ms, longest gap "
        text += f"{gaps.max() * 1e3:.0f} ms; {offline:,} offline tokens"
        title(axis, text)
    axes[-1].set_xlabel("simulated time [s]")
    key_to(figure, shown)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "1-online-request": online_life,
    "2-offline-request": offline_life,
    "3-preemption": preemption,
    "4-mix-selection": mix_selection,
    "5-strict-prefill": strict_prefill,
    "6-kv-pressure": kv_pressure,
    "7-role-change": role_change,
    "8-failure": failure,
    "9-unified": unified,
}


def draw(name: str, folder: Path, suffix: str = "svg") -> Path:
    """Simulate and write one figure."""
    path = folder / f"{name}.{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        write(FIGURES[name](), path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draw the figures of docs/mechanism.md. Each one simulates a small episode with a given workload, "
        "keeps its event log and draws it; the functions above main() are short examples of how to do that for an "
        "episode of your own.",
        epilog="Rerunning writes the same bytes. To look at one figure while changing it: "
        "python experiments/mechanism.py --only 3-preemption --format png --out /tmp/figures",
    )
    parser.add_argument("--out", type=Path, default=Path("docs/images/mechanism"), help="folder (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(FIGURES), default=list(FIGURES), metavar="NAME",
                        help=f"figures to draw (default: all): {', '.join(FIGURES)}")  # fmt: skip
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="file format (default: %(default)s)")
    arguments = parser.parse_args()
    for name in arguments.only:
        path = draw(name, arguments.out, arguments.format)
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
