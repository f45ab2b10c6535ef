"""Replaying measured engines: the logic on made-up streams, and one measured source where the data are at hand."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import engine_validation
import numpy as np
import pytest
from engine_replay import closed_loop_arrivals, fit_host_s, fitting_runs, replay, times_of
from measured_loops import drawn_lengths, eight_bit_blocks, fp8
from measured_streams import Deployment, Run, Times, contradictory, pair, stream

from ooco_gym.errors import OocoError
from ooco_gym.roofline import build_cost, prefill_s, resolve_hardware, resolve_model
from ooco_gym.workload import Requests

ROOT = Path(__file__).resolve().parents[1]

A100 = resolve_hardware("a100")
UNIFIED = {"unified": 1, "max_seqs": 64, "chunk_tokens": 2048, "kv_blocks": 4000}
SPLIT = {"relaxed": 1, "strict": 1, "max_seqs": 64, "max_batch_tokens": 2048, "kv_blocks": 4000}
CLUSTERS = {"chunked": UNIFIED, "prefill-first": SPLIT, "disaggregated": SPLIT}
HOST_S = 0.002


def times(ttft_s, tpot_s, e2e_s=1.0):
    shape = np.ones(np.size(ttft_s))
    return Times(np.asarray(ttft_s) * shape, np.asarray(tpot_s) * shape, e2e_s * shape)


def run_of(requests, serving="chunked", measured=None, **changes):
    deployment = Deployment("llama-3.1-8b", A100, serving, CLUSTERS[serving])
    measured = measured or times(np.full(len(requests), 0.1), 0.02)
    return Run("made-up", "one", "engine", deployment, requests, measured, **changes)


def requests_of(*rows):
    arrival_s, prompt, output = np.array(rows, float).T
    return Requests(arrival_s, prompt.astype(np.int32), output.astype(np.int32))


@pytest.fixture(scope="module")
def busy():
    random = np.random.default_rng(1)
    arrival_s = np.cumsum(random.exponential(0.3, 60))
    return Requests(arrival_s, random.integers(50, 1500, 60).astype(np.int32), random.integers(2, 200, 60))


def test_a_stream_is_put_in_order_and_starts_at_zero():
    rows = [{"prompt_tokens": str(10 * k), "output_tokens": str(k)} for k in (1, 2, 3)]
    requests, measured, order = stream(np.array([5.0, 3.0, 4.0]), rows, times([0.1, 0.2, 0.3], 0.01))
    assert requests.arrival_s.tolist() == [0.0, 1.0, 2.0]
    assert requests.output_tokens.tolist() == [2, 3, 1] and order.tolist() == [1, 2, 0]
    assert measured.ttft_s.tolist() == [0.2, 0.3, 0.1]


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "queue_s", "below"),
    [
        (np.full(10, 0.9), 0.02, None, True),
        (np.repeat([0.1, 5.0], [8, 2]), 0.02, None, False),  # a fifth waited for a first token
        (np.full(10, 5.0), 0.02, np.zeros(10), True),  # long prompts, but nobody queued
        (np.full(10, 0.1), 0.02, np.full(10, 0.5), False),
        (np.full(10, 0.1), np.repeat([0.02, 0.2], [8, 2]), None, False),  # waited before decoding
    ],
)
def test_saturation_is_read_from_the_record_alone(ttft_s, tpot_s, queue_s, below):
    run = run_of(requests_of(*[(0, 8, 2)] * 10), measured=times(ttft_s, tpot_s), queue_s=queue_s)
    assert run.below_saturation is below


@pytest.mark.parametrize("serving", CLUSTERS)
def test_a_request_alone_takes_what_the_cost_model_says(serving):
    requests, simulated = replay(run_of(requests_of((0.0, 1000, 1), (9.0, 700, 20)), serving), HOST_S)
    cost = build_cost(resolve_model("llama-3.1-8b"), A100, host_s=HOST_S)[0]
    assert simulated.ttft_s == pytest.approx([prefill_s(cost, 1000.0), prefill_s(cost, 700.0)])
    assert np.isnan(simulated.tpot_s[0]) and simulated.tpot_s[1] > HOST_S
    assert requests.arrival_s.tolist() == [0.0, 9.0]


def test_prompts_stop_decodes_in_an_old_engine_and_ride_along_in_a_new_one():
    requests = requests_of((0.0, 100, 100), *[(0.5, 2000, 2)] * 4)
    gaps_s = {serving: replay(run_of(requests, serving), HOST_S)[1] for serving in CLUSTERS}
    assert gaps_s["disaggregated"].tpot_s[0] < min(gaps_s[name].tpot_s[0] for name in ("chunked", "prefill-first"))
    assert gaps_s["prefill-first"].ttft_s[-1] < gaps_s["chunked"].ttft_s[-1]


def test_a_closed_loop_keeps_as_many_requests_as_clients():
    clients = 8
    run = run_of(drawn_lengths(80, 500, 60, (0.8, 1.0)), concurrency=clients, measured=times([0.1], 0.01))
    requests, simulated = replay(run, HOST_S)
    finish_s = requests.arrival_s + simulated.e2e_s
    assert (simulated.ttft_s > 0).all() and (np.diff(requests.arrival_s) >= 0).all()
    assert requests.arrival_s[clients:] == pytest.approx(np.sort(finish_s)[: len(requests) - clients])
    instants_s = (requests.arrival_s[clients:-1] + requests.arrival_s[clients + 1 :]) / 2
    in_flight = [((requests.arrival_s <= at_s) & (finish_s > at_s)).sum() for at_s in instants_s]
    assert max(in_flight) == clients


def test_arrivals_of_a_closed_loop():
    assert closed_loop_arrivals(np.array([3.0, 1.0, 2.0, 9.0]), 2).tolist() == [0.0, 0.0, 1.0, 2.0]


@pytest.mark.parametrize("serving", CLUSTERS)
def test_the_fit_finds_the_host_time_that_made_the_stream(busy, serving):
    measured = replay(run_of(busy, serving), 0.0037)[1]
    found_s = fit_host_s(run_of(busy, serving, measured))
    assert found_s == pytest.approx(0.0037, rel=0.05)  # not exactly: who shares a batch jumps with it
    again = replay(run_of(busy, serving), found_s)[1]
    assert np.nanmean(again.tpot_s) == pytest.approx(np.nanmean(measured.tpot_s), rel=2e-3)


def test_a_replay_repeats_exactly(busy):
    first, second = (replay(run_of(busy), HOST_S)[1] for _ in range(2))
    assert (first.e2e_s == second.e2e_s).all()


def test_what_cannot_be_served_is_said():
    with pytest.raises(OocoError, match="1 of 2 requests were never served: 4000 KV blocks"):
        replay(run_of(requests_of((0, 70_000, 5), (1, 10, 5))), HOST_S)


def test_each_engine_is_fitted_on_exactly_one_run(busy):
    fitted, other = run_of(busy, fits=True), run_of(busy)
    assert fitting_runs([other, fitted]) == {"engine": fitted}
    with pytest.raises(OocoError, match="engine: 2 runs are marked"):
        fitting_runs([fitted, fitted])


def test_only_held_out_runs_below_saturation_are_judged(busy):
    simulated = replay(run_of(busy), HOST_S)[1]
    slower = Times(simulated.ttft_s, simulated.tpot_s * 1.1, simulated.e2e_s)
    runs = [run_of(busy, measured=simulated, fits=True), run_of(busy, measured=slower)]
    runs.append(replace(runs[1], source=engine_validation.UNJUDGED[0]))
    runs.append(replace(runs[1], queue_s=np.full(len(busy), 5.0)))
    rows = [engine_validation.Compared(run, HOST_S, busy, simulated, False) for run in runs]
    verdict = engine_validation.judge(rows)
    assert {name: entry["runs"] for name, entry in verdict.items()} == {"engine, below": 1, "engine, above": 1}
    below = verdict["engine, below"]
    assert below["tpot"]["bias"] == pytest.approx(1 / 1.1 - 1) and below["tpot"]["met"] is False
    assert below["ttft"]["mape"] == 0 and below["ttft"]["met"] and below["throughput"]["met"]
    assert verdict["engine, above"]["tpot"]["met"] is None


def test_a_record_that_no_device_can_reach_discredits_its_group():
    requests = drawn_lengths(640, 2000, 100, (1.0, 1.0))
    loop = replace(run_of(requests, concurrency=64, measured=times([0.1], 0.01, 1.1)), name="h200 model fp8 tp1 a")
    loop = replace(loop, deployment=replace(loop.deployment, cluster={**UNIFIED, "tensor_parallel": 1}))
    gentle = replace(loop, name="h200 model fp8 tp8 b", measured=times([0.1], 0.01, 100.0))
    assert loop.peak_share > 1 > 0.1 > gentle.peak_share
    assert contradictory([loop, gentle]) == {"h200 model fp8"} and not contradictory([gentle])


def test_two_devices_as_one_cost_what_two_ranks_do():
    model = resolve_model("opt-13b")
    as_one, ranks = build_cost(model, pair(A100, "opt-13b"))[0], build_cost(model, A100, tp=2)[0]
    for name in ("token_s", "layer_fixed_s", "pair_s", "kv_s"):
        assert as_one[name] == pytest.approx(ranks[name]), name
    assert as_one["gemm_weight_s"] == pytest.approx(ranks["gemm_weight_s"])
    assert model.params == pytest.approx(12.85e9, rel=0.01)


def test_eight_bits_halve_what_they_should():
    device, model = resolve_hardware("b200"), resolve_model("llama-3.1-70b")
    wide, narrow = build_cost(model, device)[0], build_cost(replace(model, bytes_per_param=1.0), fp8(device, True))[0]
    assert narrow["gemm_weight_s"] == pytest.approx(wide["gemm_weight_s"] / 2)
    assert narrow["gemm_row_compute_s"] == pytest.approx(wide["gemm_row_compute_s"] / 2)
    assert narrow["kv_s"] == pytest.approx(wide["kv_s"] / 2) and narrow["pair_s"] == pytest.approx(wide["pair_s"])
    assert eight_bit_blocks(model, device, 1) * 16 * model.kv_bytes_per_token / 2 == pytest.approx(91.4e9, rel=0.01)


def test_times_of_a_request_with_one_token():
    found = times_of(requests_of((1.0, 5, 1), (2.0, 5, 3)), np.array([1.5, 3.0]), np.array([1.5, 4.0]))
    assert found.ttft_s.tolist() == [0.5, 1.0] and np.isnan(found.tpot_s[0]) and found.tpot_s[1] == 0.5


def test_tokens_held_grow_from_the_prompt_to_the_whole_request():
    requests = requests_of((0.0, 100, 10), (50.0, 7, 3))
    run = run_of(requests, measured=times([1.0, 1.0], 0.1, 2.0))
    assert [engine_validation.tokens_held(run, at_s) for at_s in (0.5, 1.0, 1.5, 3.0)] == [0.0, 100.0, 105.0, 0.0]


BENCH = ROOT.parent / "shared" / "data" / "measured" / "llmservingsim_bench_vllm_requests.csv.gz"


@pytest.mark.skipif(not BENCH.is_file(), reason="the measured streams are not beside this checkout (../shared/data)")
def test_the_command_on_a_measured_source(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["engine_validation.py", "--sources", "bench", "--out", str(tmp_path)])
    engine_validation.main()
    printed = capsys.readouterr().out
    assert "host time of vLLM 0.19" in printed and "RTX4090 Llama-3.1-8B" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    rtx4090 = next(row for row in results["runs"] if row["run"].startswith("RTX4090"))
    assert rtx4090["judged"] and rtx4090["scenario"]["kv_blocks"] == [2588]
    assert abs(rtx4090["errors"]["tpot"]) < 0.1 and abs(rtx4090["errors"]["throughput"]) < 0.1
    assert (tmp_path / "cdf.png").stat().st_size > 10_000


def test_absent_data_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["engine_validation.py", "--data-dir", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="llmservingsim_bench"):
        engine_validation.main()
