"""The timeline: a life worked by hand, its totals against the simulator's own counters, and the figures of the docs."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from experiments import mechanism, mechanism_episode
from ooco_gym.cluster.control import KNOB_NAMES, RULES, knobs_from_mapping
from ooco_gym.cluster.simulator import Simulator
from ooco_gym.evaluation.history import read_spans, read_stages, read_transfers, token_times
from ooco_gym.evaluation.timeline import draw_timeline
from ooco_gym.roofline import decode_s, prefill_s
from ooco_gym.specs import FaultSpec, Outage
from tests.reference.cases import Case

DOCS = Path(__file__).parents[2] / "docs"


def test_the_life_of_one_online_request():
    episode = mechanism_episode.simulate(1.0, [(0.1, 1000, 3)])
    cost = mechanism_episode.world((), (), False, 1.0).true_cost[0]
    prefilled_s = 0.1 + float(prefill_s(cost, 1000.0))
    there_s = prefilled_s + 0.002 + 1000 * 57344 / 25e9
    second_s = there_s + float(decode_s(cost, 1.0, 1001.0))
    third_s = second_s + float(decode_s(cost, 1.0, 1002.0))
    assert token_times(episode.log)[False, 0] == pytest.approx([prefilled_s, second_s, third_s], rel=1e-12)
    stages = read_stages(episode.log, (False, 0))
    assert [(stage.name, stage.instance) for stage in stages] == [("prefill", 0), ("transfer", 0), ("decode", 1)]
    assert [stage.start_s for stage in stages] == pytest.approx([0.1, prefilled_s, there_s], rel=1e-12)
    spans = read_spans(episode.log)
    assert [(span.instance, span.parts) for span in spans] == [
        (0, ("online prefill",)), (1, ("online decode",)), (1, ("online decode",)),
    ]  # fmt: skip
    (transfer,) = read_transfers(episode.log)
    assert (transfer.source, transfer.target, transfer.tokens, transfer.why) == (0, 1, 1001, "hand-over")


def _episode(changed: dict[str, str], seed: int) -> Simulator:
    """A tight cluster that interrupts, evicts, pulls, pushes back, mixes and fails."""
    case = Case(relaxed=2, strict=2, online=60, online_per_s=25.0, offline_kind="endless", offline=40, tpot_s=0.05)
    scenario = replace(case.scenario(), faults=FaultSpec(outages=(Outage(2, 1.0, 0.5), Outage(0, 1.6, 0.3))))
    scenario = replace(scenario, cluster=replace(scenario.cluster, kv_blocks=90))
    simulator = Simulator(scenario, changed, seed, log=True)
    simulator.cluster.instances["saturation_batch"] = 4.0
    simulator.set_knobs(knobs_from_mapping({"pushback": 0.6, "strict_prefill": 256.0, "prefill_chunk": 128.0}))
    simulator.run(scenario.horizon_s)
    return simulator


@pytest.mark.parametrize("name,choice", [(name, choice) for name, choices in RULES.items() for choice in choices])
def test_the_log_adds_up_to_the_counters(name, choice):
    simulator = _episode({name: choice}, seed=RULES[name].index(choice))
    log, world, online = simulator.log(), simulator.cluster.world[0], simulator.cluster.online
    times = token_times(log)
    for request, record in enumerate(online):
        emitted = times.get((False, request), [])
        assert (emitted[0] if emitted else np.inf) == record["first_s"]
        if np.isfinite(record["finish_s"]):
            assert emitted[-1] == record["finish_s"] and len(emitted) == record["output"]
        stages = read_stages(log, (False, request))
        assert all(before.end_s == after.start_s for before, after in pairwise(stages))
    emitted_offline = sum(len(emitted) for key, emitted in times.items() if key[0])
    assert emitted_offline == world["credited_output_tokens"]
    spans = read_spans(log)
    done = [span for span in spans if span.kind == "iteration"]
    assert sum(sum(span.prompt_tokens) for span in done) == world["prefilled_tokens"]
    assert sum(span.recomputed for span in done) == world["recomputed_tokens"]
    assert len(done) == world["iterations"]
    for instance in range(4):
        mine = sorted(
            (span.start_s, span.end_s) for span in spans if span.instance == instance and span.kind != "draining"
        )
        assert all(before[1] <= after[0] + 1e-9 for before, after in pairwise(mine))
    why = [transfer.why for transfer in read_transfers(log)]
    assert (why.count("pull"), why.count("push")) == (world["migrations"], world["pushbacks"])
    thrown_away_s = sum(span.seconds for span in spans if span.kind == "thrown away" and span.prompt_tokens[1])
    assert thrown_away_s >= world["interrupted_s"] - 1e-9


def test_draw_timeline_draws_what_happened_in_its_window(tmp_path):
    log = _episode({}, seed=0).log()
    axis = draw_timeline(log, start_s=0.8, end_s=2.0, unit="ms", names={0: "first", 2: "third"})
    assert axis.get_xlim() == (800.0, 2000.0) and axis.get_xlabel() == "simulated time [ms]"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["first", "third"]
    assert "down" in [text.get_text() for text in axis.get_legend().get_texts()]
    axis.figure.savefig(tmp_path / "episode.svg")
    assert (tmp_path / "episode.svg").stat().st_size > 1000


def test_the_figures_are_small_and_the_same_every_time(tmp_path):
    name = "3-preemption"
    first, second = (mechanism.draw(name, tmp_path / folder) for folder in "ab")
    assert first.read_bytes() == second.read_bytes()
    for each in mechanism.FIGURES:
        assert (DOCS / f"images/mechanism/{each}.svg").stat().st_size < 60_000


def test_the_page_shows_every_figure_knob_and_rule():
    page = (DOCS / "mechanism.md").read_text()
    assert re.findall(r"images/mechanism/([\w-]+)\.svg", page) == list(mechanism.FIGURES)
    for name, choices in RULES.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", page, re.M)
        assert all(f"`{choice}`" in row for choice in choices)
    for knob in KNOB_NAMES:
        assert f"| `{knob}` |" in page
