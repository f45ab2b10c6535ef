"""The benchmark of the bridge: bars, intervals, the load generator's own checks, and the command around them."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import bridge_bench
import bridge_export
import bridge_load
import numpy as np
import pytest
from bridge_bars import Bar, number, table
from bridge_decisions import record
from bridge_load import Slot
from bridge_overhead import FIRST, STREAMED, WHOLE, median_interval, summary
from rich.console import Console

from ooco_gym.bridge.exports.manifest import read_object
from ooco_gym.cluster.observation import ENTRIES, observation_bounds, observe
from ooco_gym.errors import OocoError
from ooco_gym.policy import save_policy
from tests.bridge.exports import CONSTANT, network

ROOT = Path(__file__).parents[2]


# Bars and intervals.


def test_a_bar_is_met_at_its_limit_and_never_by_nothing():
    assert Bar("a", 3.0, 3.0).met and not Bar("a", 3.01, 3.0).met
    assert Bar("a", 500.0, 500.0, at_least=True).met and not Bar("a", 499.0, 500.0, at_least=True).met
    assert not Bar("a", math.nan, 3.0).met and not Bar("a", math.nan, 3.0, at_least=True).met


def test_a_bar_says_what_was_asked_and_measured():
    rate = Bar("rate", 1057.3, 500.0, "/s", True, (1001.0, 1100.0))
    assert (rate.asked(), rate.measured()) == (">= 500 /s", "1,057 /s (1,001 .. 1,100)")
    assert (Bar("lost", 0, 0).asked(), Bar("lost", 2, 0).measured()) == ("0", "2")
    assert rate.to_dict()["at_least"] == 500.0 and rate.to_dict()["met"] is True
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table([("overhead", rate), ("kills", Bar("lost", 2, 0))], "bars"))
    rows = [line.split() for line in console.export_text().splitlines()]
    assert any(row[:1] == ["overhead"] and row[-1] == "met" for row in rows)
    assert any(row[:1] == ["kills"] and row[-1] == "missed" for row in rows)


@pytest.mark.parametrize(("value", "text"), [(0.0000001234, "1.23e-07"), (1.234, "1.23"), (999.6, "1,000"), (0, "0")])
def test_numbers(value, text):
    assert number(value) == text


def test_the_interval_is_that_of_the_median():
    rounds = np.random.default_rng(3).normal(2.0, 1.0, 40)
    found = median_interval(rounds)
    low, high = found["interval95"]
    assert low < found["median"] == np.median(rounds) < high
    assert high - low == pytest.approx(2 * 1.96 * 1.253 / math.sqrt(40), rel=0.5)  # of a normal median
    assert median_interval([1.0, 1.0, 90.0])["median"] == 1.0, "one spoilt round changes nothing"
    assert median_interval([5.0])["interval95"] == (5.0, 5.0)


def test_the_added_time_is_the_median_of_the_rounds_differences():
    """Both sides drift together: pooled medians would see the drift."""

    def seen(first_ms, answers=0, cpu=None):
        return bridge_load.Seen([value / 1e3 for value in first_ms], answers, 100, 1.0, cpu or {})

    direct = [[40.0], [80.0], [120.0]]
    gateway = [[41.0], [81.0], [121.0]]
    cpu = {"gateway": 0.5, "upstream": 0.1, "load": 0.2}
    rates = {arm: [seen([1.0], 300, cpu), seen([1.0], 500, cpu)] for arm in ("direct", "gateway")}
    found = summary({
        FIRST: {"direct": [seen(ms, cpu=cpu) for ms in direct], "gateway": [seen(ms, cpu=cpu) for ms in gateway]},
        STREAMED: rates,
        WHOLE: rates,
    })  # fmt: skip
    assert found[FIRST]["added_ms"]["median"] == pytest.approx(1.0)
    assert found[FIRST]["added_ms"]["interval95"] == pytest.approx((1.0, 1.0))
    assert found[FIRST]["gateway_cpu_ms"] == pytest.approx(5.0)  # half a second for 100 tokens
    assert found[STREAMED]["per_s"]["gateway"]["median"] == 400
    assert found[STREAMED]["gateway_cpu_ms"] == pytest.approx(1.25)  # a second for 800 answers
    assert found[WHOLE]["cores"]["gateway"] == pytest.approx(cpu)


# The load generator.


@asynccontextmanager
async def serving(*pieces: bytes):
    """A server that gives these pieces to every request, as segments of their own."""

    async def answer(reader, writer):
        while await reader.readuntil(b"}"):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.002)

    def quietly(reader, writer):
        task = asyncio.ensure_future(answer(reader, writer))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())

    server = await asyncio.start_server(quietly, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/completions"
    finally:
        server.close()


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b'data: {"text":" word"}\n\n'
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)


def load(*pieces, times=2, seconds=0.1, pids=()):
    async def measure():
        async with serving(*pieces) as url:
            return await bridge_load.run(Slot(url, {"prompt": "x"}, 3, 0.01, seconds, " word", times, dict(pids)))

    return asyncio.run(measure())


def test_answers_and_first_tokens_are_counted():
    seen = load(HEAD, CHUNK, CHUNK, b"0\r\n\r\n", pids=[("me", os.getpid())])
    assert seen.answers > 3 and len(seen.first_s) > 3 and seen.texts >= 2 * seen.answers - 6
    assert 0.002 <= min(seen.first_s) < 0.1, "from the request to the first byte of the body, not of the head"
    assert seen.seconds == pytest.approx(0.1, abs=0.05)
    assert set(seen.cpu_s) == ({"me", "load"} if Path("/proc/self/stat").exists() else set())


def test_an_answer_may_come_in_any_pieces():
    content = HEAD + CHUNK + CHUNK + b"0\r\n\r\n"
    assert load(*(content[at : at + 7] for at in range(0, len(content), 7)), seconds=0.3).answers
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n word word"
    assert load(whole).answers and load(whole[:30], whole[30:45], whole[45:]).answers


@pytest.mark.parametrize(
    ("pieces", "named"),
    [
        ((HEAD, CHUNK, b"0\r\n\r\n"), "1 of 2 tokens"),
        ((HEAD, CHUNK, CHUNK, CHUNK, b"0\r\n\r\n"), "3 of 2 tokens"),
        ((b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\n{}",), "503 Busy"),
    ],
)
def test_an_answer_that_is_not_right_is_an_error(pieces, named):
    with pytest.raises(OocoError, match=named):
        load(*pieces)


def test_an_answer_without_an_end_is_an_error(monkeypatch):
    monkeypatch.setattr(bridge_load, "PATIENCE_S", 0.1)
    with pytest.raises(OocoError, match="without an end"):
        load(HEAD, CHUNK)


# The export.


def test_records_are_within_the_documented_bounds():
    low, high = observation_bounds()
    observations = np.stack([observe(record(seed)) for seed in range(100)])
    assert (observations >= low).all() and (observations <= high).all()
    assert ((observations[:, : len(ENTRIES)] > 0).mean(axis=0) > 0.9).all(), "every entry is filled"


@pytest.mark.slow
def test_an_export_is_compared_where_torch_cannot_be_imported(tmp_path):
    pytest.importorskip("stable_baselines3")
    run = save_policy(network(), tmp_path / "run")
    settings = {**bridge_export.DEFAULTS, "out": str(tmp_path), "run": str(run), "observations": 50, "decisions": 20}
    bridge_export.check(settings)
    found, bars = bridge_export.run(settings, Console(quiet=True))
    assert found["observations"] == 50 and found["decisions"] == 20 and "torch" in found["not_importable"]
    assert 0 < found["action_difference"] <= 1e-5 and found["action_spread"] > 0.1
    assert [bar.value for bar in bars[:2]] == [found["action_difference"], found["knob_difference"]]
    other = network(seed=1)
    save_policy(other, tmp_path / "other")
    differs = bridge_export.compare(
        tmp_path / "other", str(tmp_path / "export" / "policies" / "run"), settings, tmp_path / "other.npz"
    )
    assert differs["action_difference"] > 0.1 and differs["knob_difference"] > 0.01


def test_a_run_without_a_network_is_refused(tmp_path):
    save_policy(CONSTANT, tmp_path / "constant")
    with pytest.raises(OocoError, match="a trained network is needed"):
        bridge_export.check({"run": str(tmp_path / "constant"), "out": str(tmp_path / "out")})
    save_policy(network(), tmp_path / "out" / "export" / "trained")
    with pytest.raises(OocoError, match="begins anew"):
        bridge_export.check({"run": str(tmp_path / "out" / "export" / "trained"), "out": str(tmp_path / "out")})


# The command.


def part(*bars, defaults=None, fail=None):
    def run(settings, console):
        if fail is not None:
            raise fail
        return {"settings_seen": dict(settings)}, list(bars)

    return SimpleNamespace(DEFAULTS=defaults or {}, run=run)


@pytest.fixture(autouse=True)
def restored():
    """The command gives SIGTERM a meaning of its own."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The command with parts of the test's own; returns (status, results)."""

    def call(parts, *arguments, vllm=True):
        monkeypatch.setattr(bridge_bench, "PARTS", {name: f"fake_{name}" for name in parts})
        monkeypatch.setitem(bridge_bench.DEFAULTS, "parts", list(parts))
        monkeypatch.setattr(bridge_bench, "ready_python", lambda: Path("python") if vllm else None)
        for name, module in parts.items():
            monkeypatch.setitem(sys.modules, f"fake_{name}", module)
        status = bridge_bench.main([*arguments, f"out={tmp_path}"])
        path = tmp_path / "results.json"
        return status, read_object(path) if path.exists() else {}

    return call


MET, MISSED = Bar("met one", 1.0, 2.0), Bar("missed one", 3.0, 2.0)


def test_a_missed_bar_is_a_status_only_where_asked(bench, capsys):
    parts = {"a": part(MET, defaults={"n": 3}), "b": part(MISSED)}
    assert bench(parts)[0] == 0
    status, results = bench(parts, "check=true", "n=4")
    assert status == 1 and bench({"a": part(MET)}, "check=true")[0] == 0
    assert results["a"]["settings"]["n"] == results["a"]["results"]["settings_seen"]["n"] == 4
    assert "n" not in results["b"]["settings"]
    assert [bar["met"] for name in "ab" for bar in results[name]["bars"]] == [True, False]
    assert set(results["a"]) >= {"date", "load_average", "machine"} and len(results["a"]["load_average"]["end"]) == 3
    said = capsys.readouterr().out
    assert "missed one" in said and "missed" in said.split("missed one")[1]


def test_vllm_that_is_absent_leaves_live_out(bench, capsys):
    parts = {"a": part(MET), "live": part(MISSED)}
    status, results = bench(parts, "check=true", vllm=False)
    assert status == 0 and "setup_vllm.py" in results["live"]["left_out"] and "results" not in results["live"]
    assert "setup_vllm.py" in capsys.readouterr().out
    assert bench(parts, "parts=[live]", vllm=False)[0] == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "setup_vllm.py" in said
    assert "results" in bench(parts)[1]["live"]
    assert "results" in bench(parts, vllm=False)[1]["live"], "earlier figures are kept"


def test_what_is_finished_is_kept_when_the_rest_is_interrupted(bench, capsys):
    status, results = bench({"a": part(MET), "b": part(fail=KeyboardInterrupt())})
    assert status == 130 and list(results) == ["a"]
    said = capsys.readouterr().err
    assert said.startswith("interrupted") and said.count("\n") == 1 and "a in " in said


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("parts=[a,x]", "unknown part 'x'"),
        ("parts=[]", "parts is empty"),
        ("m=3", "unknown setting 'm'"),
        ("n=0", "n is 0"),
        ("n=x", "n is 'x', a whole number"),
        ("r=.inf", "r is inf, a number"),
        ("check=perhaps", "true or false"),
        ("n", "key=value"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(bench, capsys, argument, named):
    status, results = bench({"a": part(MET, defaults={"n": 3, "r": 1.0})}, argument)
    said = capsys.readouterr().err
    assert status == 2 and not results and said.startswith("error: ") and said.count("\n") == 1 and named in said


def test_every_part_has_what_the_command_needs(capsys):
    assert bridge_bench.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name}" in said for name in bridge_bench.PARTS) and "rounds=20" in said and "kills=20" in said


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="children are found in /proc")
def test_overhead_is_measured_and_a_signal_ends_every_process(tmp_path):
    command = [sys.executable, "experiments/bridge_bench.py", "parts=[overhead]", f"out={tmp_path}", "seconds=0.3"]
    short = ["rounds=2", "rate_seconds=0.3", "tokens=8", "streams=10"]
    done = subprocess.run([*command, *short], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    entry = json.loads((tmp_path / "results.json").read_text())["overhead"]
    found = entry["results"]
    assert found[FIRST]["ms"]["gateway"]["median"] > found[FIRST]["ms"]["direct"]["median"] >= 40.0
    assert len(found[FIRST]["added_ms"]["rounds"]) == 2 and len(entry["bars"]) == 3
    assert found[WHOLE]["per_s"]["direct"]["median"] > found[WHOLE]["per_s"]["gateway"]["median"] > 50
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    patience = time.monotonic() + 60
    while len(mine := children(process.pid)) < 3 and time.monotonic() < patience:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and said.startswith("interrupted") and said.count("\n") == 1
    assert len(mine) == 3 and not any(Path(f"/proc/{pid}").exists() for pid in mine)
    assert json.loads((tmp_path / "results.json").read_text())["overhead"] == entry


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
