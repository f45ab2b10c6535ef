"""Measured engines against the simulator: replay their request streams and compare TTFT, TPOT, latency, throughput.

    python experiments/engine_validation.py                       every source that is at hand; half a minute
    python experiments/engine_validation.py --sources bench aic   some of them
    python experiments/engine_validation.py --rows                every closed loop, not only a line per deployment

Nothing is tuned but `host time`, the engine's own seconds per iteration: one constant per engine version, fitted to
the mean TPOT of one run, which is marked `fit` and not counted. There is no cost noise: figures repeat exactly.

A run is *below saturation* by its own record, never by the model: 9 of 10 requests queued for at most 0.1 s where
queueing was recorded, or had their first token within 1 s; and their p90 of TPOT is within twice the median. Where only
means were recorded, the mean TTFT is within 2 s.

Errors are simulated over measured - 1. The bars hold for runs below saturation that were not fitted on, MAPE over
runs: mean TPOT 6 %, output tokens per second 5 % (from the first arrival to the last token), median TTFT 10 % (mean
TTFT where only that was recorded). `per request` is the mean over requests of |TPOT error|.

Writes results.json, with every run's resolved scenario, and cdf.png to `--out`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from engine_replay import SERVING, fit_host_s, fitting_runs, replay, scenario_of
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measured_loops import closed_loops
from measured_streams import STREAMS, Floats, Run, Times, contradictory, read_rows
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ooco_gym.errors import OocoError
from ooco_gym.roofline import build_cost, decode_s, prefill_s, resolve_hardware, resolve_model
from ooco_gym.workload import Requests

SOURCES = {**STREAMS, "aic": closed_loops}
BARS = {"tpot": 0.06, "throughput": 0.05, "ttft": 0.10}
UNJUDGED = ("opt-vllm-mixed",)  # the same runs under other rules, for comparison


@dataclass(frozen=True, eq=False)
class Compared:
    """One run as measured and as simulated."""

    run: Run
    host_s: float
    requests: Requests
    simulated: Times
    contradictory: bool

    @property
    def judged(self) -> bool:
        """Whether its errors count: held out, of the engine's own rules, and its record does not contradict itself."""
        return not (self.run.fits or self.contradictory or self.run.source in UNJUDGED)

    def statistics(self) -> dict[str, tuple[float, float]]:
        """(measured, simulated): seconds, and output tokens per second."""
        means_only = self.run.concurrency is not None
        middle: Callable[[Floats], Any] = np.mean if means_only else np.median
        pairs: dict[str, tuple[float, float]] = {}
        for name, of in (("ttft", middle), ("tpot", np.nanmean), ("e2e", np.mean)):
            pairs[name] = _both(self.run.measured, self.simulated, f"{name}_s", of)
        if not means_only:  # a closed loop's follows from its latency: Little's law
            pairs["tpot_p50"] = _both(self.run.measured, self.simulated, "tpot_s", np.nanmedian)
            tokens = float(self.requests.output_tokens.sum())
            spans_s = [(self.requests.arrival_s + times.e2e_s).max() for times in (self.run.measured, self.simulated)]
            pairs["throughput"] = (tokens / spans_s[0], tokens / spans_s[1])
        return pairs

    def errors(self) -> dict[str, float]:
        """Signed, simulated over measured - 1; ``tpot_per_request`` is a mean of absolute ones."""
        found = {name: simulated / measured - 1.0 for name, (measured, simulated) in self.statistics().items()}
        if self.run.concurrency is None:
            ratio = self.simulated.tpot_s / self.run.measured.tpot_s
            found["tpot_per_request"] = float(np.nanmean(np.abs(ratio - 1.0)))
        return found

    def record(self) -> dict[str, Any]:
        scenario = scenario_of(self.run, self.host_s)
        return {
            "source": self.run.source,
            "run": self.run.name,
            "engine": self.run.engine,
            "requests": len(self.requests),
            "clients": self.run.concurrency,
            "fitted_on": self.run.fits,
            "below_saturation": self.run.below_saturation,
            "contradictory": self.contradictory,
            "judged": self.judged,
            "measured_and_simulated": self.statistics(),
            "errors": self.errors(),
            "scenario": {
                "model": asdict(scenario.model),
                "hardware": [asdict(device) for device in scenario.instance_hardware],
                "cluster": {name: value for name, value in asdict(scenario.cluster).items() if "hardware" not in name},
                "kv_blocks": scenario.instance_kv_blocks,
                "cost": asdict(scenario.cost),
                "rules": SERVING[self.run.deployment.serving],
                "assumed": self.run.deployment.assumed,
            },
        }


def _both(measured: Times, simulated: Times, name: str, of: Callable[[Floats], Any]) -> tuple[float, float]:
    return float(of(getattr(measured, name))), float(of(getattr(simulated, name)))


def compare(runs: Sequence[Run], console: Console) -> tuple[list[Compared], dict[str, dict[str, Any]]]:
    """Fit the host time of every engine on its one run, and replay all runs with it."""
    hosts: dict[str, dict[str, Any]] = {}
    for engine, run in fitting_runs(runs).items():
        hosts[engine] = {"host_s": fit_host_s(run), "fitted_on": run.name}
        console.print(f"host time of {engine}: {hosts[engine]['host_s'] * 1e3:.2f} ms an iteration, on {run.name}")
    wrong = contradictory(list(runs))
    found = []
    for run in runs:
        host_s = hosts[run.engine]["host_s"]
        found.append(Compared(run, host_s, *replay(run, host_s), contradictory=run.group in wrong))
    return found, hosts


def percent(value: float, signed: bool = True) -> str:
    return "-" if np.isnan(value) else f"{100 * value:{'+' if signed else ''}.1f}"


def mape(errors: Sequence[float]) -> float:
    return float(np.mean(np.abs(errors))) if errors else float("nan")


def _note(row: Compared) -> str:
    marks = [word for word, on in (("fit", row.run.fits), ("contradictory", row.contradictory)) if on]
    return " ".join([*marks, "below" if row.run.below_saturation else "above"])


def print_streams(source: str, rows: Sequence[Compared], console: Console) -> None:
    table = Table(title=f"{source}: {rows[0].run.deployment.serving}", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("run", "n", "saturation", "TTFT p50 s", "sim", "%", "TPOT ms", "sim", "%", "p50 %", "per request %",
                    "E2E s", "sim", "%", "tokens/s", "sim", "%"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in ("run", "saturation") else "right")
    for row in rows:
        pairs, errors = row.statistics(), row.errors()
        cells = [row.run.name, str(len(row.requests)), _note(row)]
        for name, scale, digits in (("ttft", 1, 3), ("tpot", 1e3, 1), ("e2e", 1, 2), ("throughput", 1, 0)):
            cells += [f"{value * scale:.{digits}f}" for value in pairs[name]] + [percent(errors[name])]
            if name == "tpot":
                cells += [percent(errors["tpot_p50"]), percent(errors["tpot_per_request"], signed=False)]
        table.add_row(*cells)
    console.print(table)


def print_closed_loops(rows: Sequence[Compared], every: bool, console: Console) -> None:
    table = Table(title="aic: closed loops, means; MAPE (bias) in %", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("deployment", "runs", "saturation", "TTFT", "TPOT", "E2E", "largest share of peak FLOP/s"):
        table.add_column(heading, justify="left" if heading in ("deployment", "saturation") else "right")
    groups: dict[tuple[str, str], list[Compared]] = {}
    for row in rows:
        name = row.run.name if every else " ".join(row.run.name.split()[:4])
        groups.setdefault((name, _note(row)), []).append(row)
    for (name, note), members in sorted(groups.items()):
        cells = [name, str(len(members)), note]
        for statistic in ("ttft", "tpot", "e2e"):
            errors = [member.errors()[statistic] for member in members]
            cells.append(f"{percent(mape(errors), signed=False)} ({percent(float(np.mean(errors)))})")
        table.add_row(*cells, f"{max(member.run.peak_share for member in members):.2f}")
    console.print(table)


def print_engine_lines(data_dir: str | None, hosts: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Iterations of OPT-13B on one A100: lines that DistServe's authors fitted to each engine, and the cost model's."""
    model, device = resolve_model("opt-13b"), resolve_hardware("a100")
    for row in read_rows("distserve_fitted_latency_params", data_dir):
        label = {"vllm": "vLLM 2023", "distserve": "DistServe 2023"}[row["engine"]]
        if (row["model"], row["tensor_parallel"]) != ("facebook/opt-13b", "1") or label not in hosts:
            continue
        constant, linear, square = json.loads(row["prefill"])
        fixed, per_context, per_sequence = json.loads(row["decoding_smallbs"])
        cost = build_cost(model, device, host_s=hosts[label]["host_s"])[0]
        console.print(
            f"{label}, ms, their line and the cost model: prefill of 1,000 tokens "
            f"{constant + 1e3 * linear + 1e6 * square:.0f} and {1e3 * prefill_s(cost, 1000.0):.0f}; decode of 1 with "
            f"1,000 tokens {fixed + 1e3 * per_context + per_sequence:.1f} and {1e3 * decode_s(cost, 1.0, 1e3):.1f}, "
            f"of 40 with 40,000 {fixed + 4e4 * per_context + 40 * per_sequence:.1f} and "
            f"{1e3 * decode_s(cost, 40.0, 4e4):.1f}"
        )


def tokens_held(run: Run, at_s: float) -> float:
    """KV tokens of the requests that were between first and last token then, by their recorded times, none shared."""
    first_s = run.requests.arrival_s + run.measured.ttft_s
    finish_s = run.requests.arrival_s + run.measured.e2e_s
    done = (at_s - first_s) / (finish_s - first_s)
    tokens = run.requests.prompt_tokens + done * run.requests.output_tokens
    return float(tokens[(first_s <= at_s) & (at_s < finish_s)].sum())


def print_sharing(rows: Sequence[Compared], data_dir: str | None, console: Console) -> None:
    """Whether prompts shared KV: the engine's own count of it against the tokens of its requests, while none waits."""
    run = next(row.run for row in rows if row.run.name.startswith("RTX4090"))
    capacity = run.deployment.cluster["kv_blocks"] * run.deployment.cluster["block_tokens"]
    ratios = [
        float(row["kv_cache_pct"]) / 100 * capacity / held
        for row in read_rows("llmservingsim_bench_vllm_timeseries", data_dir)
        if row["hardware"] == "RTX4090" and row["waiting"] == "0" and (held := tokens_held(run, float(row["t"]))) > 0
    ]
    console.print(
        f"RTX4090: KV in use over the tokens of the requests in it, {len(ratios)} seconds without a queue: median "
        f"{np.median(ratios):.2f}; prefix caching was on, and had next to nothing to share if that is near 1"
    )


def _label(row: Compared) -> str:
    return f"{row.run.engine} {row.run.workload}".strip()


def judge(rows: Sequence[Compared]) -> dict[str, dict[str, Any]]:
    """Errors against the bars: for every engine and workload, below and above saturation, over the runs that count."""
    found: dict[str, dict[str, Any]] = {}
    counted = [row for row in rows if row.judged]
    for label in dict.fromkeys(_label(row) for row in counted):
        for below in (True, False):
            part = [row.errors() for row in counted if (_label(row), row.run.below_saturation) == (label, below)]
            if not part:
                continue
            entry: dict[str, Any] = {"runs": len(part), "below_saturation": below}
            for name in (*BARS, "tpot_per_request"):
                errors = [errors[name] for errors in part if name in errors]
                entry[name] = {"mape": mape(errors), "bias": float(np.mean(errors)) if errors else float("nan")}
                if name in BARS:
                    entry[name]["met"] = bool(entry[name]["mape"] <= BARS[name]) if below and errors else None
            found[f"{label}, {'below' if below else 'above'}"] = entry
    return found


def print_bars(verdict: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(title="held-out runs, MAPE (bias) in %", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("engine, saturation")
    bars = [f"{name} <= {100 * bar:.0f}" for name, bar in BARS.items()]
    for heading in ("runs", *bars, "TPOT per request"):
        table.add_column(heading, justify="right")
    for name, entry in verdict.items():
        cells = [name, str(entry["runs"])]
        for bar in BARS:
            word = {True: " met", False: " MISSED", None: ""}[entry[bar]["met"]]
            cells.append(f"{percent(entry[bar]['mape'], signed=False)} ({percent(entry[bar]['bias'])}){word}")
        table.add_row(*cells, percent(entry["tpot_per_request"]["mape"], signed=False))
    console.print(table)


def plot_cdfs(rows: Sequence[Compared], path: Path) -> None:
    """Measured and simulated distributions of TTFT and TPOT, a column for each run."""
    figure = Figure(figsize=(3.6 * len(rows), 5.2), layout="constrained")
    axes = figure.subplots(2, len(rows), squeeze=False)
    for column, row in enumerate(rows):
        for line, (name, unit) in enumerate((("ttft_s", 1.0), ("tpot_s", 1e3))):
            axis = axes[line, column]
            for label, times, style in (("measured", row.run.measured, "-"), ("simulated", row.simulated, "--")):
                values = np.sort(getattr(times, name)[np.isfinite(getattr(times, name))]) * unit
                axis.plot(values, np.arange(1, len(values) + 1) / len(values), style, label=label)
            axis.set_xlabel("TTFT, s" if line == 0 else "TPOT, ms")
            axis.set_ylabel("share of requests")
            axis.grid(alpha=0.3)
        axes[0, column].set_title(row.run.name + (" (fitted)" if row.run.fits else ""), fontsize=9)
    axes[0, 0].legend()
    FigureCanvasAgg(figure)  # a canvas that needs no display
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES), metavar="SOURCE",
                        help="; ".join(f"{name}: {' '.join((read.__doc__ or '').split())}"
                                       for name, read in SOURCES.items()))  # fmt: skip
    parser.add_argument("--rows", action="store_true", help="print every closed loop")
    parser.add_argument("--data-dir", help="folder of the data; otherwise OOCO_DATA, otherwise ../shared/data")
    parser.add_argument("--out", type=Path, default=Path("runs/engine_validation"), help="(runs/engine_validation)")
    arguments = parser.parse_args()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--out {arguments.out}: {error.strerror}; a folder that can be written to is needed")
    console = Console() if sys.stdout.isatty() else Console(width=190)
    try:
        runs = [run for source in arguments.sources for run in SOURCES[source](arguments.data_dir)]
        rows, hosts = compare(runs, console)
    except OocoError as error:
        sys.exit(str(error))
    for source in arguments.sources:
        part = [row for row in rows if row.run.source == source]
        if source == "aic":
            print_closed_loops(part, arguments.rows, console)
        else:
            print_streams(source, part, console)
    if "bench" in arguments.sources:
        print_sharing([row for row in rows if row.run.source == "bench"], arguments.data_dir, console)
    if any(source.startswith("opt") for source in arguments.sources):
        print_engine_lines(arguments.data_dir, hosts, console)
    verdict = judge(rows)
    print_bars(verdict, console)
    arguments.out.mkdir(parents=True, exist_ok=True)
    output = {"bars": BARS, "host_times": hosts, "verdict": verdict, "runs": [row.record() for row in rows]}
    (arguments.out / "results.json").write_text(json.dumps(output, indent=1), encoding="utf-8")
    drawn = [row for row in rows if row.run.source == "bench"]
    if drawn:
        plot_cdfs(drawn, arguments.out / "cdf.png")
    console.print(f"results.json{' and cdf.png' if drawn else ''}: {arguments.out}")


if __name__ == "__main__":
    main()
