"""Scenarios: deployments worked by hand, presets and mappings, and what is refused in one sentence."""

from dataclasses import replace

import numpy as np
import pytest
from omegaconf import OmegaConf

from ooco_gym import presets
from ooco_gym.cluster import Simulator
from ooco_gym.errors import OocoError
from ooco_gym.roofline import decode_s, saturation_batch
from ooco_gym.scenario import DEFAULT_PRESETS, build_scenario
from ooco_gym.workload import OfflineJobs, Requests

TINY_KV = {"relaxed": 1, "strict": 1, "memory_utilization": 0.2}  # an A100 with Qwen2.5-7B: 0.77 GB of KV


class Given:
    """A workload source that gives the same rows at every seed."""

    mean_prompt_tokens, mean_output_tokens = 200.0, 5.0

    def __init__(self, sample):
        self._sample = sample

    def sample(self, seed, duration_s):
        return self._sample


def refused(config, *named):
    with pytest.raises(OocoError) as caught:
        build_scenario(config)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in named), caught.value


# By hand.


def test_kv_blocks_by_hand():
    """80 GB * 0.9 - 15.2 GB of weights leave 56.8 GB; a block is 16 tokens of 57344 bytes."""
    scenario = build_scenario()
    assert scenario.kv_blocks == int((72e9 - 2 * scenario.model.params) // (16 * 57344)) == 61873
    assert (scenario.instances, scenario.horizon_s) == (4, 660.0)


def test_two_devices_share_the_weights_and_the_cache():
    scenario = build_scenario({"cluster": {"tensor_parallel": 2}})
    assert scenario.kv_blocks == int((144e9 - scenario.model.weight_bytes) // (16 * 57344))
    assert scenario.saturation_batch == saturation_batch(scenario.model, scenario.hardware, tp=2)


def test_more_ranks_than_kv_heads_copy_the_cache():
    """28 ranks for 4 KV heads: every head is held seven times."""
    scenario = build_scenario({"cluster": {"tensor_parallel": 28}})
    assert scenario.kv_blocks == int((28 * 72e9 - scenario.model.weight_bytes) // (7 * 16 * 57344))


def test_ideal_seconds_by_hand():
    """An output token is worth what one more mean sequence adds to a decode of B_sat of them."""
    offline = {"kind": "endless", "lengths": {"model": "fixed", "prompt_tokens": 1000, "output_tokens": 400}}
    scenario = build_scenario({"offline": offline})
    b, cost = scenario.saturation_batch, scenario.scheduler_cost[0]
    more = decode_s(cost, b + 1.0, (b + 1.0) * 1200.0) - decode_s(cost, float(b), b * 1200.0)
    assert scenario.ideal_output_token_s == pytest.approx(more)
    # a prompt token: 14 GFLOP on 228 TFLOP/s are 57 us, attention and the rest a little more
    assert 57e-6 < scenario.ideal_prompt_token_s < 80e-6


def test_objectives_in_multiples_of_what_the_deployment_needs():
    """The default: 6.5 mean prefills and 4 decode floors are 0.50 s and 46 ms with Qwen2.5-7B on an A100."""
    scenario = build_scenario()
    assert (scenario.slo.ttft_s, scenario.slo.tpot_s) == pytest.approx((0.50, 0.046), rel=0.01)
    faster = build_scenario({"hardware": "h100", "slo": {"ttft_prefills": 6.5, "tpot_s": 0.02}})
    assert faster.slo.ttft_s == 6.5 * faster.mean_prefill_s < scenario.slo.ttft_s
    assert faster.slo.tpot_s == 0.02
    both = build_scenario({"slo": {"ttft_s": 1.0, "ttft_prefills": 6.5, "tpot_s": None, "tpot_floors": 4}})
    assert (both.slo.ttft_s, both.slo.tpot_s) == (1.0, 4 * both.decode_floor_s)  # seconds win


# Presets and mappings.


@pytest.mark.parametrize("group", sorted(set(DEFAULT_PRESETS) - {"workload", "offline"}))
def test_every_preset_resolves(group):
    for name in presets.names(group):
        cluster = {"tensor_parallel": 4} if name == "qwen2.5-72b" else "2x2"
        scenario = build_scenario({"cluster": cluster} | {group: name})
        assert scenario.kv_blocks > 1000 and scenario.true_cost["layers"] > 0
        assert 0.005 < scenario.decode_floor_s < 0.05 and 1 < scenario.saturation_batch < 4096


def test_every_preset_without_data_files_simulates():
    for group in ("workload", "offline"):
        for name in presets.names(group):
            content = presets.load(group, name)
            if content.get("kind") == "trace" or (content.get("lengths") or {}).get("model") == "table":
                continue
            simulator = Simulator(build_scenario({group: name, "episode_s": 2, "warmup_s": 0}))
            simulator.run(2.0)
            assert simulator.cluster.world[0]["iterations"] > 0, name


def test_a_mapping_says_the_same_as_its_preset():
    mappings = {group: presets.load(group, name) for group, name in DEFAULT_PRESETS.items()}
    for given in (mappings, OmegaConf.create(mappings), None, {}):
        scenario = build_scenario(given)
        assert scenario.model == build_scenario().model and scenario.cost == build_scenario().cost
        outcome = []
        for each in (scenario, build_scenario()):
            simulator = Simulator(replace(each, episode_s=20.0, warmup_s=0.0), {}, 4)
            simulator.run(20.0)
            outcome.append(simulator.outcome())
        assert outcome[0] == outcome[1]


def test_the_faithful_clock_is_selected_by_name():
    scenario = build_scenario({"cost": "ooco-xllm", "hardware": "ascend-910b"})
    assert scenario.saturation_batch == 340
    assert scenario.true_cost["hard_max"] == scenario.scheduler_cost["hard_max"] == 1.0


def test_derived_scenarios():
    scenario = build_scenario({"episode_s": 60, "warmup_s": 0})
    twice = scenario.with_rate_scale(2.0)
    assert twice.online.mean_rate_per_s == pytest.approx(2 * scenario.online.mean_rate_per_s)
    assert twice.settings["rate_scale"] == 2.0
    simulator = Simulator(scenario.without_offline())
    simulator.run(60.0)
    assert simulator.cluster.world[0]["credited_output_tokens"] == 0 < simulator.outcome().online_requests


# Requests that fit no instance.


def test_requests_longer_than_the_cache_are_counted_apart():
    scenario = build_scenario({"cluster": TINY_KV, "episode_s": 40, "warmup_s": 0, "cost": {"bias_sigma": 0}})
    capacity = scenario.kv_blocks * 16
    assert 10_000 < capacity < 20_000
    outputs = np.full(6, 10, np.int32)
    prompts = np.array([100, capacity - 10, 100, capacity - 9, 100, capacity + 1])  # 10 output tokens each
    online = Requests(np.arange(6.0), prompts, outputs)
    jobs = OfflineJobs(False, np.zeros(4), np.array([200, capacity, 200, capacity - 10], np.int32), outputs[:4])
    simulator = Simulator(replace(scenario, online=Given(online), offline=Given(jobs)))
    simulator.run(40.0)
    outcome, cluster = simulator.outcome(), simulator.cluster
    assert (outcome.rejected_online, outcome.rejected_offline) == (2, 1)
    assert np.isnan(cluster.online_first_s).tolist() == [False, False, False, True, False, True]
    assert np.isfinite(cluster.online_finish_s).tolist() == [True, True, True, False, True, False]
    assert outcome.online_requests == 4
    assert outcome.offline_requests_per_s * 40 == 3  # the other jobs behind the rejected one are served


# What is refused.


def test_a_model_that_does_not_fit_says_how_much_is_missing():
    refused({"model": "qwen2.5-72b"}, "'qwen2.5-72b' does not fit 'a100'", "145 GB", "72 GB", "tensor_parallel")
    refused({"model": "qwen2.5-72b", "cluster": {"tensor_parallel": 2}}, "73 GB", "raise cluster.tensor_parallel")
    assert build_scenario({"model": "qwen2.5-72b", "cluster": {"tensor_parallel": 4}}).kv_blocks > 0


@pytest.mark.parametrize("group", sorted(DEFAULT_PRESETS))
def test_an_unknown_preset_lists_the_known(group):
    refused({group: "abacus"}, f"unknown {group} 'abacus'", *presets.names(group))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"modle": "x"}, ["unknown scenario key 'modle'", "model", "episode_s"]),
        ({"cluster": {"relaxd": 2}}, ["cluster: unknown key 'relaxd'", "relaxed"]),
        ({"slo": {"ttft": 2}}, ["slo: unknown key 'ttft'", "ttft_s, tpot_s, ttft_prefills, tpot_floors"]),
        ({"cost": {"noise": 2}}, ["cost: unknown key 'noise'", "noise_sigma"]),
        ({"workload": presets.load("workload", "azure-conv") | {"rate": 3}}, ["'rate'", "rate_scale"]),
        ({"offline": {"kind": "none", "job": 3}}, ["unknown key 'job'", "jobs"]),
        ({"model": {"width": 3}}, ["unknown key 'width'", "hidden"]),
        ({"hardware": {"speed": 3}}, ["unknown key 'speed'", "peak_flops_per_s"]),
        ({"slo": 3}, ["slo is 3", *presets.names("slo")]),
        ({"model": 3}, ["unknown model '3'", "qwen2.5-7b"]),
        ({"hardware": None}, ["unknown hardware 'None'", "a100"]),
        ({"cluster": {"relaxed": 0}}, ["cluster.relaxed is 0", "at least 1"]),
        ({"cluster": {"strict": 1.5}}, ["cluster.strict is 1.5", "integer"]),
        ({"cluster": {"max_seqs": "many"}}, ["cluster.max_seqs is 'many'"]),
        ({"cluster": {"memory_utilization": 1.1}}, ["cluster.memory_utilization is 1.1", "at most 1"]),
        ({"cluster": {"link_bytes_per_s": 0}}, ["cluster.link_bytes_per_s", "positive"]),
        ({"cluster": {"link_latency_s": float("nan")}}, ["link_latency_s"]),
        ({"slo": {"ttft_s": 0, "tpot_s": 1}}, ["slo.ttft_s is 0", "positive"]),
        ({"slo": {"ttft_s": 1, "tpot_s": float("inf")}}, ["slo.tpot_s is inf", "positive"]),
        ({"slo": {"ttft_s": 1, "tpot_s": "fast"}}, ["slo.tpot_s is 'fast'"]),
        ({"slo": {"ttft_s": 1, "tpot_floors": float("nan")}}, ["slo.tpot_floors is nan", "positive"]),
        ({"slo": {"ttft_s": 1}}, ["slo.tpot_floors is None", "tpot_s or tpot_floors must be a positive number"]),
        ({"cost": {"noise_sigma": -0.1}}, ["cost.noise_sigma is -0.1"]),
        ({"cost": {"host_s": float("nan")}}, ["cost.host_s is nan"]),
        ({"cost": {"scheduler_form": "guess"}}, ["'guess'", "calibrated, ooco-xllm"]),
        ({"cluster": {"tensor_parallel": 3}}, ["tensor_parallel is 3", "28 heads"]),
        ({"episode_s": 0}, ["episode_s is 0"]),
        ({"warmup_s": -1}, ["warmup_s is -1"]),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_used(config, named):
    refused(config, *named)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"cluster": {"link_bytes_per_s": "fast"}}, ["link_bytes_per_s"]),
        ({"cluster": {"memory_utilization": "most"}}, ["memory_utilization"]),
        ({"cluster": {"pull_interval_s": None}}, ["pull_interval_s"]),
        ({"episode_s": "long"}, ["episode_s"]),
        ({"episode_s": None}, ["episode_s"]),
        ({"warmup_s": [1]}, ["warmup_s"]),
        ({"episode_s": float("inf")}, ["episode_s"]),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type(config, named):
    refused(config, *named)


def test_an_unknown_true_clock_is_refused_at_once():
    """Today the scenario is built, and the error comes from wherever the cost is asked for first."""
    refused({"cost": {"true_form": "guess"}}, "'guess'", "calibrated, ooco-xllm")
