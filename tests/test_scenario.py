"""Scenarios: deployments worked by hand, presets and mappings, and what is refused in one sentence."""

from dataclasses import replace

import numpy as np
import pytest
from omegaconf import OmegaConf

from ooco_gym import presets
from ooco_gym.cluster import Simulator
from ooco_gym.cluster.state import CANCEL, FAIL, RECOVER
from ooco_gym.errors import OocoError
from ooco_gym.roofline import decode_s, saturation_batch
from ooco_gym.scenario import DEFAULT_PRESETS, build_scenario
from ooco_gym.specs import FaultSpec, SloClass, SloSpec
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


def test_pools_of_different_devices():
    """Relaxed A100s beside one H100 and one A100 that decode: each has its own KV, cost and saturation batch."""
    pools = {"relaxed": 2, "strict": 2, "strict_hardware": ["h100", "a100"]}
    scenario = build_scenario({"cluster": pools})
    assert [device.name for device in scenario.instance_hardware] == ["a100", "a100", "h100", "a100"]
    a100, h100 = build_scenario(), build_scenario({"hardware": "h100"})
    assert scenario.instance_kv_blocks == tuple(s.kv_blocks for s in (a100, a100, h100, a100))
    assert scenario.kv_blocks == min(scenario.instance_kv_blocks)
    each = [s.instance_saturation_batch[0] for s in (a100, a100, h100, a100)]
    assert scenario.instance_saturation_batch == tuple(each) and len(set(each)) == 2
    assert scenario.saturation_batch == sum(each) / 4
    for clock in ("true_cost", "scheduler_cost"):
        costs = getattr(scenario, clock)
        assert costs.shape == (4,)
        assert costs[2] == getattr(h100, clock)[0] and all(costs[i] == getattr(a100, clock)[0] for i in (0, 1, 3))
    # objectives follow the slowest device of a pool, ideal seconds the mean device
    assert (scenario.decode_floor_s, scenario.mean_prefill_s) == (a100.decode_floor_s, a100.mean_prefill_s)
    for name in ("ideal_prompt_token_s", "ideal_output_token_s"):
        slow, fast = getattr(a100, name), getattr(h100, name)
        assert getattr(scenario, name) == pytest.approx((3 * slow + fast) / 4) and fast < slow


def test_one_device_for_a_whole_pool():
    scenario = build_scenario({"cluster": {"relaxed": 1, "strict": 2, "relaxed_hardware": "h100"}})
    assert [device.name for device in scenario.instance_hardware] == ["h100", "a100", "a100"]
    assert scenario.mean_prefill_s == build_scenario({"hardware": "h100"}).mean_prefill_s
    assert scenario.decode_floor_s == build_scenario().decode_floor_s
    own = presets.load("hardware", "h100") | {"name": "mine", "hbm_bytes": 60e9}
    scenario = build_scenario({"cluster": {"relaxed": 0, "strict": 0, "unified": 2, "unified_hardware": own}})
    assert [device.name for device in scenario.instance_hardware] == ["mine", "mine"]
    assert scenario.kv_blocks == int((54e9 - scenario.model.weight_bytes) // (16 * 57344))


def test_roles_of_the_instances():
    scenario = build_scenario({"cluster": {"relaxed": 1, "strict": 2, "unified": 1}})
    assert (scenario.instances, scenario.cluster.roles) == (4, (0, 1, 1, 2))
    assert build_scenario({"cluster": "unified4"}).cluster.roles == (2, 2, 2, 2)


def test_kv_blocks_as_the_cluster_says():
    assert build_scenario({"cluster": {"kv_blocks": 500}}).instance_kv_blocks == (500,) * 4
    scenario = build_scenario({"cluster": {"kv_blocks": [500, 600, 400, 700]}})
    assert scenario.instance_kv_blocks == (500, 600, 400, 700) and scenario.kv_blocks == 400
    simulator = Simulator(scenario)
    assert simulator.cluster.instances["kv_blocks"].tolist() == [500, 600, 400, 700]


def test_host_memory_by_hand():
    """64 GB hold blocks of 16 tokens of 57344 bytes, on every instance."""
    scenario = build_scenario()
    assert scenario.host_blocks == int(64e9 // (16 * 57344)) == 69754
    assert build_scenario({"cluster": {"host_kv_bytes": 0}}).host_blocks == 0
    assert Simulator(scenario).cluster.instances["host_blocks"].tolist() == [69754] * 4


def test_classes_of_objectives():
    """A class may say seconds or multiples; the two numbers of the whole are the tightest of any class."""
    classes = {"chat": {"ttft_s": 0.5, "tpot_floors": 5}, "voice": {"share": 3, "ttft_prefills": 10, "tpot_s": 0.02}}
    scenario = build_scenario({"slo": {"classes": classes}})
    chat, voice = scenario.slo.classes
    assert (chat.name, chat.share, chat.ttft_s, chat.tpot_s) == ("chat", 1.0, 0.5, 5 * scenario.decode_floor_s)
    assert (voice.name, voice.share, voice.ttft_s, voice.tpot_s) == ("voice", 3, 10 * scenario.mean_prefill_s, 0.02)
    assert (scenario.slo.ttft_s, scenario.slo.tpot_s) == (0.5, 0.02)
    assert scenario.slo.all_classes == (chat, voice)


def test_without_classes_there_is_one():
    (only,) = build_scenario({"slo": {"ttft_s": 1, "tpot_s": 0.1, "classes": {}}}).slo.all_classes
    assert (only.name, only.share, only.ttft_s, only.tpot_s) == ("online", 1.0, 1.0, 0.1)


def test_classes_are_drawn_by_their_shares():
    simulator = Simulator(build_scenario({"slo": "two-classes", "episode_s": 3600}), {}, 1)
    share = (simulator.cluster.online["slo_class"] == 0).mean()
    assert len(simulator.cluster.online) > 10_000 and share == pytest.approx(1 / 4, abs=0.02)
    slo = simulator.scenario.slo
    assert simulator.cluster.world[0]["slo_s"][:2].tolist() == [[c.ttft_s, c.tpot_s] for c in slo.classes]


def test_given_outages_are_failures_and_recoveries_in_order():
    """At equal times cancellations come first, then by instance."""
    outages = [{"instance": 2, "at_s": 5, "for_s": 3}, {"instance": 0, "at_s": 8.0, "for_s": 1.5}]
    simulator = Simulator(build_scenario({"faults": {"outages": outages}}))
    found = [(float(e["time_s"]), int(e["kind"]), int(e["index"])) for e in simulator.cluster.disruptions]
    assert found == [(5.0, FAIL, 2), (8.0, FAIL, 0), (8.0, RECOVER, 2), (9.5, RECOVER, 0)]


def test_drawn_failures_and_cancellations_are_as_frequent_as_asked():
    faults = {"mean_time_between_failures_s": 100, "mean_repair_s": 25, "cancel_share": 0.25, "cancel_after_s": 4.0}
    simulator = Simulator(build_scenario({"faults": faults, "episode_s": 20_000}), {}, 2)
    events, online = simulator.cluster.disruptions, simulator.cluster.online
    cancelled = events[events["kind"] == CANCEL]
    assert len(cancelled) / len(online) == pytest.approx(0.25, abs=0.01)
    after_s = cancelled["time_s"] - online["arrival_s"][cancelled["index"]]
    assert after_s.min() >= 0 and after_s.mean() == pytest.approx(4.0, rel=0.05)
    down_s = []
    for instance in range(4):
        mine = events[(events["kind"] != CANCEL) & (events["index"] == instance)]
        assert mine["kind"].tolist() == [FAIL, RECOVER] * (len(mine) // 2)  # in turns
        assert mine["time_s"][:-2].max() < 20_060
        down_s += list(mine["time_s"][1::2] - mine["time_s"][::2])
    assert len(down_s) == pytest.approx(4 * 20_060 / 125, rel=0.15) and np.mean(down_s) == pytest.approx(25, rel=0.15)


def test_the_faults_presets():
    nothing, unreliable = (build_scenario({"faults": name}).faults for name in ("none", "unreliable"))
    assert nothing == FaultSpec() and len(Simulator(build_scenario()).cluster.disruptions) == 0
    assert (unreliable.mean_time_between_failures_s, unreliable.cancel_share) == (1200.0, 0.05)
    simulator = Simulator(build_scenario({"faults": "unreliable", "episode_s": 1200}), {}, 1)
    assert set(simulator.cluster.disruptions["kind"]) == {CANCEL, FAIL, RECOVER}


# Presets and mappings.


@pytest.mark.parametrize("group", sorted(set(DEFAULT_PRESETS) - {"workload", "offline"}))
def test_every_preset_resolves(group):
    for name in presets.names(group):
        wide = {"qwen2.5-72b": 4, "llama-3.1-70b": 4, "qwen3-32b": 2, "qwen3-30b-a3b": 2}  # ranks that hold the weights
        scenario = build_scenario({"cluster": {"tensor_parallel": wide.get(name, 1)}} | {group: name})
        assert scenario.kv_blocks > 1000 and (scenario.true_cost["layers"] > 0).all()
        assert 0.002 < scenario.decode_floor_s < 0.05 and 1 < scenario.saturation_batch < 4096


def test_every_preset_without_data_files_simulates():
    for group in ("workload", "offline", "cluster", "slo", "faults"):
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
    assert (scenario.true_cost["hard_max"] == 1.0).all() and (scenario.scheduler_cost["hard_max"] == 1.0).all()


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
    assert np.isnan(cluster.online["first_s"]).tolist() == [False, False, False, True, False, True]
    assert np.isfinite(cluster.online["finish_s"]).tolist() == [True, True, True, False, True, False]
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
        ({"cluster": {"relaxed": 0}}, ["0 relaxed, 2 strict and 0 unified", "at least one relaxed and one strict"]),
        ({"cluster": {"strict": 1.5}}, ["cluster.strict is 1.5", "whole number"]),
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


def test_an_unknown_clock_is_refused_at_once():
    refused({"cost": {"true_form": "guess"}}, "cost.true_form is 'guess'", "calibrated, ooco-xllm")


# Every sentence of ooco_gym/specs.py.

BLOCKS = "one positive integer, or 4 of them, is accepted"
POOLS = "it needs at least one relaxed and one strict instance, or unified ones alone"


@pytest.mark.parametrize(
    ("cluster", "sentence"),
    [
        ({"relaxed": -1}, "cluster.relaxed is -1, a whole number is needed"),
        ({"strict": True}, "cluster.strict is True, a whole number is needed"),
        ({"unified": "two"}, "cluster.unified is 'two', a whole number is needed"),
        ({"relaxed": 0, "strict": 0}, f"cluster has 0 relaxed, 0 strict and 0 unified instances: {POOLS}"),
        ({"strict": 0, "unified": 3}, f"cluster has 2 relaxed, 0 strict and 3 unified instances: {POOLS}"),
        ({"tensor_parallel": 0}, "cluster.tensor_parallel is 0, it must be an integer of at least 1"),
        ({"max_batch_tokens": 1.5}, "cluster.max_batch_tokens is 1.5, it must be an integer of at least 1"),
        ({"max_seqs": None}, "cluster.max_seqs is None, it must be an integer of at least 1"),
        ({"chunk_tokens": 0}, "cluster.chunk_tokens is 0, it must be an integer of at least 1"),
        ({"block_tokens": True}, "cluster.block_tokens is True, it must be an integer of at least 1"),
        ({"memory_utilization": 0}, "cluster.memory_utilization is 0, accepted is above 0, at most 1"),
        ({"link_bytes_per_s": 0}, "cluster.link_bytes_per_s is 0, it must be a positive number"),
        ({"host_bytes_per_s": -1}, "cluster.host_bytes_per_s is -1, it must be a positive number"),
        ({"pull_interval_s": "soon"}, "cluster.pull_interval_s is 'soon', it must be a positive number"),
        ({"link_latency_s": -0.1}, "cluster.link_latency_s is -0.1, it must be at least 0"),
        ({"host_kv_bytes": float("inf")}, "cluster.host_kv_bytes is inf, it must be at least 0"),
        ({"kv_blocks": 0}, f"cluster.kv_blocks is 0, {BLOCKS}"),
        ({"kv_blocks": [9, 9]}, f"cluster.kv_blocks is [9, 9], {BLOCKS}"),
        ({"kv_blocks": [9, 9, 0, 9]}, f"cluster.kv_blocks is [9, 9, 0, 9], {BLOCKS}"),
        ({"kv_blocks": 3.5}, f"cluster.kv_blocks is 3.5, {BLOCKS}"),
        ({"relaxed_hardware": ["a100"]}, "cluster.relaxed_hardware has 1 entries for 2 instances"),
        ({"unified_hardware": ["a100"]}, "cluster.unified_hardware has 1 entries for 0 instances"),
    ],
    ids=str,
)  # fmt: skip
def test_a_cluster_that_cannot_be(cluster, sentence):
    with pytest.raises(OocoError) as caught:
        build_scenario({"cluster": cluster})
    assert str(caught.value) == sentence


def test_a_pools_hardware_that_is_not_known():
    refused({"cluster": {"strict_hardware": "abacus"}}, "unknown hardware 'abacus'", "a100")
    refused({"cluster": {"strict_hardware": ["a100", "abacus"]}}, "unknown hardware 'abacus'", "a100")
    refused({"cluster": {"strict_hardware": {"name": "x", "speed": 3}}}, "unknown key 'speed'")
    refused({"cluster": {"strict_hardware": 3}}, "unknown hardware '3'", "a100")


POSITIVE = "it must be a positive number of seconds"


@pytest.mark.parametrize(
    ("slo", "sentence"),
    [
        ({"ttft_s": 0.0}, f"slo.ttft_s is 0.0, {POSITIVE}"),
        ({"tpot_s": "fast"}, f"slo.tpot_s is 'fast', {POSITIVE}"),
        ({"classes": (SloClass("a", 1.0, -1.0, 1.0),)}, f"slo.classes.a.ttft_s is -1.0, {POSITIVE}"),
        ({"classes": (SloClass("a", 0, 1.0, 1.0),)}, "slo.classes.a.share is 0, it must be a positive number"),
        ({"classes": (SloClass("a", 1.0, 1.0, 1.0),) * 17}, "slo.classes is 17, at most 16 are accepted"),
    ],
    ids=str,
)  # fmt: skip
def test_objectives_that_cannot_be(slo, sentence):
    with pytest.raises(OocoError) as caught:
        SloSpec(**slo)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("classes", "named"),
    [
        ([{"share": 1}], ["slo.classes is [{'share': 1}]", "a mapping from class names to share and objectives"]),
        ({"chat": 0.5}, ["slo.classes is {'chat': 0.5}", "a mapping from class names"]),
        ({"chat": {"ttft": 1}}, ["slo.classes.chat: unknown key 'ttft'", "share, ttft_s, tpot_s, ttft_prefills"]),
        ({"chat": {"ttft_s": 1}}, ["slo.classes.chat.tpot_floors is None", "tpot_s or tpot_floors must be a positive"]),
        ({"chat": {"ttft_s": -1, "tpot_s": 1}}, ["slo.classes.chat.ttft_s is -1"]),
        ({"chat": {"ttft_s": 1, "tpot_s": 1, "share": -1}}, ["slo.classes.chat.share is -1"]),
        ({"chat": {"ttft_s": 1, "tpot_s": 1, "share": None}}, ["slo.classes.chat.share is None"]),
        ({f"c{i}": {"ttft_s": 1, "tpot_s": 1} for i in range(17)}, ["slo.classes is 17", "at most 16"]),
    ],
    ids=str,
)
def test_classes_that_cannot_be(classes, named):
    refused({"slo": {"classes": classes}}, *named)


@pytest.mark.parametrize(
    ("cost", "sentence"),
    [
        ({"host_s": 1.0}, "cost.host_s is 1.0, accepted is at least 0 and below 1"),
        ({"noise_sigma": True}, "cost.noise_sigma is True, accepted is at least 0 and below 1"),
        ({"bias_sigma": -0.5}, "cost.bias_sigma is -0.5, accepted is at least 0 and below 1"),
        ({"scheduler_form": 3}, "cost.scheduler_form is 3, known are calibrated, ooco-xllm"),
    ],
    ids=str,
)
def test_a_cost_that_cannot_be(cost, sentence):
    with pytest.raises(OocoError) as caught:
        build_scenario({"cost": cost})
    assert str(caught.value) == sentence


OUTAGE = "an instance index, at_s >= 0 and for_s > 0 are needed"


@pytest.mark.parametrize(
    ("faults", "named"),
    [
        ({"mean_time_between_failures_s": 0}, [f"faults.mean_time_between_failures_s is 0, {POSITIVE}"]),
        ({"mean_repair_s": None}, [f"faults.mean_repair_s is None, {POSITIVE}"]),
        ({"cancel_after_s": -1}, [f"faults.cancel_after_s is -1, {POSITIVE}"]),
        ({"cancel_share": 1.5}, ["faults.cancel_share is 1.5, accepted is 0 to 1"]),
        ({"cancel_share": "all"}, ["faults.cancel_share is 'all', accepted is 0 to 1"]),
        ({"outages": [{"instance": -1, "at_s": 0, "for_s": 1}]}, ["faults.outages is Outage(instance=-1", OUTAGE]),
        ({"outages": [{"instance": 0, "at_s": -1, "for_s": 1}]}, ["faults.outages is", "at_s=-1", OUTAGE]),
        ({"outages": [{"instance": 0, "at_s": 0, "for_s": 0}]}, ["faults.outages is", "for_s=0", OUTAGE]),
        ({"outages": [{"instance": 0, "at_s": "noon", "for_s": 1}]}, ["at_s='noon'", OUTAGE]),
        ({"outages": [{"instance": 4, "at_s": 0, "for_s": 1}]}, ["faults.outages: no instance 4 among 4"]),
        ({"outages": [{"instance": 0, "at_s": 0}]}, ["faults:", "for_s", "outages (instance, at_s, for_s)"]),
        ({"outages": [{"when": 0}]}, ["faults:", "'when'", "accepted are outages"]),
        ({"outages": [3]}, ["faults:", "accepted are outages"]),
        ({"outages": 3}, ["faults:", "accepted are outages"]),
        ({"cancel": 0.5}, ["faults:", "'cancel'", "cancel_share, cancel_after_s"]),
        (3, ["faults is 3", "none, unreliable"]),
    ],
    ids=str,
)  # fmt: skip
def test_faults_that_cannot_be(faults, named):
    refused({"faults": faults}, *named)


def test_lists_may_come_from_a_configuration_file():
    """Hydra's lists are lists too."""
    config = {
        "cluster": {"relaxed_hardware": ["a100", "h100"], "kv_blocks": [400, 500, 600, 700]},
        "faults": {"outages": [{"instance": 0, "at_s": 1, "for_s": 1}]},
        "slo": {"classes": {"chat": {"ttft_s": 1.0, "tpot_s": 0.1}}},
    }
    plain, from_file = build_scenario(config), build_scenario(OmegaConf.create(config))
    for name in ("instance_hardware", "instance_kv_blocks", "faults", "slo"):
        assert getattr(plain, name) == getattr(from_file, name)
