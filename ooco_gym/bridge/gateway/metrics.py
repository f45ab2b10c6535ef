"""The gateway's own Prometheus metrics, read from the ledger when they are asked for: the hot path pays nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ooco_gym.bridge.gateway.control import Control
from ooco_gym.bridge.gateway.scheduler import Scheduler

_OUTCOMES = ("finished", "failed", "cancelled", "refused")


class _Collector:
    def __init__(self, scheduler: Scheduler, control: Control, stored: Callable[[], int]) -> None:
        self.scheduler, self.control, self.stored = scheduler, control, stored

    def collect(self) -> Iterator[Metric]:
        yield from self._counters()
        yield from self._instances()
        yield from self._control()

    def _counters(self) -> Iterator[Metric]:
        ledger = self.scheduler.ledger
        ledger.window(1)  # books the violations that became certain meanwhile
        totals = ledger.totals
        requests = CounterMetricFamily(
            "ooco_requests", "Requests by class and how they ended", labels=["class", "outcome"]
        )
        arrived = CounterMetricFamily("ooco_arrivals", "Requests accepted, by class", labels=["class"])
        for kind in ("online", "offline"):
            arrived.add_metric([kind], getattr(totals, f"{kind}_requests"))
            for outcome in _OUTCOMES:
                requests.add_metric([kind, outcome], getattr(totals, f"{kind}_{outcome}"))
        yield arrived
        yield requests
        violations = CounterMetricFamily(
            "ooco_slo_violations", "Online requests that violated, by objective", labels=["objective"]
        )
        for objective in ("ttft", "tpot", "deadline"):
            violations.add_metric([objective], getattr(totals, f"{objective}_violations"))
        yield violations
        yield CounterMetricFamily("ooco_judged", "Online requests known to violate or not", value=totals.judged)
        for side in ("prompt", "output"):
            words = f"{side.capitalize()} tokens of finished requests"
            tokens = CounterMetricFamily(f"ooco_{side}_tokens", words, labels=["class"])
            for kind in ("online", "offline"):
                tokens.add_metric([kind], getattr(totals, f"{kind}_{side}_tokens"))
            yield tokens
        wasted = CounterMetricFamily(
            "ooco_wasted_tokens", "Tokens computed and thrown away by restarts", labels=["kind"]
        )
        wasted.add_metric(["prompt"], totals.wasted_prompt_tokens)
        wasted.add_metric(["output"], totals.wasted_output_tokens)
        yield wasted
        for name, help_ in (
            ("preemptions", "Offline requests aborted for an online arrival"),
            ("retries", "Attempts repeated after an instance failed or refused"),
            ("handovers", "Prompts handed over to a strict instance"),
            ("recomputed_handovers", "Hand-overs that failed and were computed again"),
            ("pulls", "Offline requests taken by a strict instance"),
        ):
            yield CounterMetricFamily(f"ooco_{name}", help_, value=getattr(totals, name))

    def _instances(self) -> Iterator[Metric]:
        labels = ["engine", "role", "url"]  # not "instance": Prometheus itself puts that on every series
        up = GaugeMetricFamily("ooco_instance_up", "1 where the instance is healthy", labels=labels)
        running = GaugeMetricFamily("ooco_instance_requests", "Requests sent and not ended", labels=[*labels, "class"])
        usage = GaugeMetricFamily("ooco_instance_kv_usage", "Share of KV in use as last scraped", labels=labels)
        slower = GaugeMetricFamily(
            "ooco_instance_correction", "Factor on predicted iterations, of the whole and per sequence",
            labels=[*labels, "of"],
        )  # fmt: skip
        for instance in self.scheduler.instances:
            key = [str(instance.index), instance.role, instance.config.url]
            correction = self.scheduler.prediction.corrections[instance.index]
            slower.add_metric([*key, "iteration"], correction.a)
            slower.add_metric([*key, "sequence"], correction.b)
            up.add_metric(key, float(instance.up))
            running.add_metric([*key, "online"], instance.load.online)
            running.add_metric([*key, "offline"], instance.load.offline)
            if instance.scrape is not None:
                usage.add_metric(key, instance.scrape.kv_usage)
        yield from (up, running, usage, slower)
        backlog = GaugeMetricFamily("ooco_offline_backlog", "Offline requests waiting", labels=["where"])
        backlog.add_metric(["gateway"], len(self.scheduler.backlog))
        backlog.add_metric(["store"], self.stored())
        yield backlog

    def _control(self) -> Iterator[Metric]:
        yield CounterMetricFamily("ooco_decisions", "Control intervals", value=self.control.decisions)
        yield CounterMetricFamily(
            "ooco_fallbacks", "Control intervals that ooco decided for the policy", value=self.control.fallbacks
        )
        knobs = GaugeMetricFamily("ooco_knob", "Knobs as last decided", labels=["knob"])
        if self.control.last is not None:
            for name, value in self.control.last.knobs.items():
                knobs.add_metric([name], value)
        yield knobs


def exporter(scheduler: Scheduler, control: Control, stored: Callable[[], int]) -> Callable[[], bytes]:
    """A function that renders the page."""
    registry = CollectorRegistry()
    registry.register(_Collector(scheduler, control, stored))
    return lambda: generate_latest(registry)
