"""What the gateway costs over a fake vLLM: part ``overhead`` of bridge_bench.py.

Fake vLLM, gateway and load generator are a process each, together on ``cores`` cores. A round measures each of three
kinds of load once directly and once through the gateway, in an order that alternates; what is reported is the median
over rounds, for the first token that of the rounds' differences, with a 95 % bootstrap interval over rounds. So a slow
change of the machine's other work meets both sides, and a burst of it spoils single rounds.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bridge_bars import Bar, number
from bridge_load import Seen, Slot, ask, generator
from bridge_upstream import WORD, fake_vllm
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from examples.live_cpu import servers

DEFAULTS: dict[str, Any] = {
    "cores": 2,  # that the three processes share
    "rounds": 20,
    "streams": 50,  # at once, for the first token
    "seconds": 1.5,  # of a measurement of the first token, ramps left out
    "tokens": 32,  # output of a stream
    "prefill_ms": 40.0,
    "token_ms": 20.0,
    "concurrency": 64,  # requests at once, for requests per second
    "rate_seconds": 1.0,  # of a measurement of requests per second
}
FIRST_TOKEN_BAR_MS, RATE_BAR = 3.0, 500.0
ARMS = ("direct", "gateway")
SHORT = 8  # tokens of an answer where requests per second are measured
RAMP_S = 0.25  # connections are made and the gateway's own to its upstream are there
FIRST, STREAMED, WHOLE = "first token", f"streams of {SHORT} tokens", "not streamed"


@dataclass(frozen=True)
class Kind:
    """A kind of load, without the address that it goes to."""

    body: Mapping[str, Any]
    clients: int
    ramp_s: float
    seconds: float
    tokens: int

    def slot(self, url: str, pids: Mapping[str, int]) -> Slot:
        return Slot(
            f"{url}/v1/completions", self.body, self.clients, self.ramp_s, self.seconds, WORD, self.tokens, pids
        )


def kinds(settings: Mapping[str, Any]) -> dict[str, Kind]:
    """The three kinds of load by name."""

    def body(tokens: int, prefill_ms: float, token_ms: float, stream: bool) -> dict[str, Any]:
        return {"model": "fake", "prompt": "x" * 400, "max_tokens": tokens, "stream": stream,
                "prefill_ms": prefill_ms, "token_ms": token_ms}  # fmt: skip

    tokens, many, rate_s = settings["tokens"], settings["concurrency"], settings["rate_seconds"]
    paced = body(tokens, settings["prefill_ms"], settings["token_ms"], True)
    # Streams start over the time that one takes, so that from then on their first tokens are spread evenly.
    ramp_s = (settings["prefill_ms"] + (tokens - 1) * settings["token_ms"]) / 1e3
    return {
        FIRST: Kind(paced, settings["streams"], ramp_s, settings["seconds"], tokens),
        STREAMED: Kind(body(SHORT, 0.0, 0.0, True), many, RAMP_S, rate_s, SHORT),
        WHOLE: Kind(body(SHORT, 0.0, 0.0, False), many, RAMP_S, rate_s, SHORT),
    }


def run(settings: Mapping[str, Any], console: Console) -> tuple[dict[str, Any], list[Bar]]:
    """Measure, print the tables; see the module's docstring."""
    seen = measure(settings, console)
    results = summary(seen)
    console.print(cost_table(results, settings))
    console.print(cpu_table(results))
    busy = max(results[kind]["cores"]["gateway"].get("load", 0.0) for kind in results)
    if busy > 0.9:
        console.print(f"[yellow]the load generator used {busy:.0%} of a core[/yellow]: the gateway may do better")
    added, rates = results[FIRST]["added_ms"], {kind: results[kind]["per_s"]["gateway"] for kind in (STREAMED, WHOLE)}
    bars = [Bar(f"added to the first token at {settings['streams']} streams, median", added["median"],
                FIRST_TOKEN_BAR_MS, "ms", interval=added["interval95"])]  # fmt: skip
    bars += [Bar(f"requests/s on {settings['cores']} cores, {kind}", rate["median"], RATE_BAR, "/s", True,
                 rate["interval95"]) for kind, rate in rates.items()]  # fmt: skip
    return results, bars


Rounds = dict[str, dict[str, list[Seen]]]  # kind -> arm -> what every round saw


def measure(settings: Mapping[str, Any], console: Console) -> Rounds:
    """Every kind and arm in every round."""
    folder = (Path(settings["out"]) / "overhead").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    loads = kinds(settings)
    seen: Rounds = {kind: {arm: [] for arm in ARMS} for kind in loads}
    with ExitStack() as stack:
        stack.enter_context(on_cores(settings["cores"]))
        upstream = stack.enter_context(fake_vllm("upstream", folder))
        config = servers.write_cluster(folder / "cluster.yaml", [(upstream, "relaxed")], {})
        front = stack.enter_context(servers.gateway(config, "ooco", folder / "gateway.log"))
        load = stack.enter_context(generator())
        urls = {"direct": upstream.url, "gateway": front.url}
        pids = {"gateway": front.process.pid, "upstream": upstream.process.pid}
        status = stack.enter_context(console.status("warming up", refresh_per_second=2))
        for kind in (STREAMED, WHOLE):
            for arm in ARMS:
                ask(load, loads[kind].slot(urls[arm], {}))
        for number_ in range(settings["rounds"]):
            for kind, kind_of_load in loads.items():
                for arm in ARMS[:: 1 if number_ % 2 == 0 else -1]:
                    status.update(f"round {number_ + 1} of {settings['rounds']}: {kind}, {arm}")
                    seen[kind][arm].append(ask(load, kind_of_load.slot(urls[arm], pids)))
            console.print(f"round {number_ + 1:2d} of {settings['rounds']}: {in_words(seen)}")
    return seen


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """What is started in the block shares that many cores, where the system can say so."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def in_words(seen: Rounds) -> str:
    """The last round."""
    added = first_ms(seen, "gateway")[-1] - first_ms(seen, "direct")[-1]
    rates = [f"{seen[kind]['gateway'][-1].answers / seen[kind]['gateway'][-1].seconds:,.0f}/s {kind}"
             for kind in (STREAMED, WHOLE)]  # fmt: skip
    return f"{added:+.2f} ms to the first token, {', '.join(rates)}"


def first_ms(seen: Rounds, arm: str) -> list[float]:
    """Median time to the first token of every round, milliseconds."""
    return [statistics.median(each.first_s) * 1e3 for each in seen[FIRST][arm]]


def median_interval(values: Sequence[float]) -> dict[str, Any]:
    """Median over rounds, its 95 % percentile bootstrap interval, and the rounds."""
    rounds = np.asarray(values, dtype=float)
    draws = np.median(np.random.default_rng(0).choice(rounds, (10_000, len(rounds))), axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"median": float(np.median(rounds)), "interval95": (float(low), float(high)), "rounds": rounds.tolist()}


def summary(seen: Rounds) -> dict[str, Any]:
    """What results.json holds: per kind what was measured, cores in use by process, and CPU time of the gateway."""
    results: dict[str, Any] = {}
    for kind, arms in seen.items():
        cores = {arm: _cores(rounds) for arm, rounds in arms.items()}
        through = [each for each in arms["gateway"] if "gateway" in each.cpu_s]
        results[kind] = {"cores": cores, "gateway_cpu_ms": _cpu_ms(through, per_token=kind == FIRST)}
        if kind != FIRST:
            results[kind]["per_s"] = {
                arm: median_interval([each.answers / each.seconds for each in rounds]) for arm, rounds in arms.items()
            }
    direct, gateway = (first_ms(seen, arm) for arm in ARMS)
    pooled = {arm: [value * 1e3 for each in seen[FIRST][arm] for value in each.first_s] for arm in ARMS}
    results[FIRST] |= {
        "ms": {"direct": median_interval(direct), "gateway": median_interval(gateway)},
        "added_ms": median_interval([through - alone for alone, through in zip(direct, gateway, strict=True)]),
        "p99_ms": {arm: float(np.percentile(values, 99)) for arm, values in pooled.items()},
        "samples": {arm: len(values) for arm, values in pooled.items()},
    }
    return results


def _cores(rounds: Sequence[Seen]) -> dict[str, float]:
    """Cores that each process kept busy."""
    seconds = sum(each.seconds for each in rounds)
    return {name: sum(each.cpu_s[name] for each in rounds) / seconds for name in rounds[0].cpu_s}


def _cpu_ms(rounds: Sequence[Seen], per_token: bool) -> float | None:
    """CPU time of the gateway per token, or per answer; None where there is no /proc."""
    count = sum(each.texts if per_token else each.answers for each in rounds)
    return 1e3 * sum(each.cpu_s["gateway"] for each in rounds) / count if count else None


def cost_table(results: Mapping[str, Any], settings: Mapping[str, Any]) -> Table:
    """First token and requests per second, direct and through the gateway."""
    title = f"gateway over a fake vLLM, {settings['cores']} cores: medians of {settings['rounds']} rounds"
    shown = _table(title, "direct", "gateway", "95 %")
    first = results[FIRST]
    shown.add_row(f"first token at {settings['streams']} streams, ms", *(_median(first["ms"][arm]) for arm in ARMS), "")
    shown.add_row("  added", "", _median(first["added_ms"]), _interval(first["added_ms"]))
    shown.add_row(
        f"  99th percentile of {first['samples']['gateway']:,}", *(number(first["p99_ms"][arm]) for arm in ARMS), ""
    )
    for kind in (STREAMED, WHOLE):
        rates = results[kind]["per_s"]
        what = f"requests/s, {kind}, {settings['concurrency']} at once"
        shown.add_row(what, *(_median(rates[arm]) for arm in ARMS), _interval(rates["gateway"]))
    return shown


def cpu_table(results: Mapping[str, Any]) -> Table:
    """Who used the cores, and what a token or a request costs the gateway."""
    shown = _table("cores in use, and CPU time of the gateway", "generator", "fake vLLM", "gateway", "CPU ms", "per")
    for kind, result in results.items():
        for arm in ARMS:
            cores = result["cores"][arm]
            cells = [f"{cores[name]:.2f}" if name in cores else "-" for name in ("load", "upstream", "gateway")]
            cost = result["gateway_cpu_ms"] if arm == "gateway" else None
            unit = "" if cost is None else "token" if kind == FIRST else "request"
            shown.add_row(f"{kind}, {arm}", *cells, "" if cost is None else f"{cost:.3f}", unit)
    return shown


def _table(title: str, *columns: str) -> Table:
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    shown.add_column("")
    for column in columns:
        shown.add_column(column, justify="left" if column == "per" else "right")
    return shown


def _median(entry: Mapping[str, Any]) -> str:
    return number(entry["median"])


def _interval(entry: Mapping[str, Any]) -> str:
    return " .. ".join(map(number, entry["interval95"]))
