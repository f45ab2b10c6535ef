"""The four rule schedulers: each loads, runs an episode, and behaves in its kind."""

import pytest

import baselines
from ooco_gym.cluster import Simulator, ooco_knobs
from ooco_gym.cluster.control import RULES
from ooco_gym.errors import OocoError
from ooco_gym.policy import ConstantPolicy, Policy, load_policy, save_policy
from ooco_gym.scenario import build_scenario

NAMES = ["base-pd", "no-offline", "online-priority", "ooco"]


def episode(policy, scenario, seed=0):
    """A whole episode through the simulator, one decision per second after warm-up."""
    simulator = Simulator(scenario, policy.rules, seed)
    policy.reset()
    simulator.set_knobs(policy.decide(simulator.telemetry()))
    simulator.run(scenario.warmup_s)
    while simulator.now_s < scenario.horizon_s:
        simulator.set_knobs(policy.decide(simulator.telemetry()))
        simulator.run(min(simulator.now_s + 1.0, scenario.horizon_s))
    return simulator


@pytest.fixture(scope="module")
def runs():
    scenario = build_scenario({"episode_s": 120, "warmup_s": 20})
    return {name: episode(baselines.load(name), scenario) for name in NAMES}


def test_the_four_are_known_and_unknown_ones_list_them():
    assert set(NAMES) <= set(baselines.known())
    with pytest.raises(
        OocoError, match=r"unknown baseline 'sjf': known are .*base-pd.* no-offline, online-priority, ooco"
    ):
        baselines.load("sjf")


@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_is_a_named_policy_that_can_be_saved(name, tmp_path):
    policy = baselines.load(name)
    assert isinstance(policy, Policy) and isinstance(policy, ConstantPolicy)
    assert policy.name == name and policy.description
    again = load_policy(save_policy(policy, tmp_path))
    assert again.rules == policy.rules and again.vector.tolist() == policy.vector.tolist()


def test_ooco_is_the_first_choice_of_every_rule_and_every_knobs_own_setting():
    policy = baselines.load("ooco")
    assert policy.rules == {name: choices[0] for name, choices in RULES.items()}
    assert policy.vector.tolist() == ooco_knobs().tolist()


def test_every_baseline_serves_the_same_online_requests(runs):
    first = runs["ooco"].cluster
    for name, run in runs.items():
        for field in ("arrival_s", "prompt", "output", "slo_class"):
            assert run.cluster.online[field].tolist() == first.online[field].tolist()
        assert run.outcome().online_requests > 200
        due = first.online["arrival_s"] < 100
        assert (run.cluster.online["finish_s"][due] < 140).mean() > 0.9, name


def test_no_offline_does_no_offline_work(runs):
    outcome, world = runs["no-offline"].outcome(), runs["no-offline"].cluster.world[0]
    assert outcome.offline_requests_per_s == outcome.offline_ideal_s_per_instance_s == 0
    assert world["credited_prompt_tokens"] == world["credited_output_tokens"] == world["offline_taken"] == 0
    assert outcome.preemptions == outcome.evictions == outcome.migrations == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_never_leaves_the_paper(runs, name):
    """No prompt in pieces, no strict prefill, no pushback, no role change, no checkpoint."""
    outcome = runs[name].outcome()
    assert outcome.mixed_iterations == outcome.pushbacks == outcome.role_changes == outcome.checkpoints == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_serves_stock_engines_too(name):
    """Without pools its rules act as far as they concern an instance that runs both phases."""
    outcome = episode(baselines.load(name), build_scenario({"cluster": "unified4", "episode_s": 60})).outcome()
    assert outcome.online_requests > 200 and outcome.mixed_iterations > 100
    assert (outcome.offline_requests_per_s > 1) == (name != "no-offline")
    assert outcome.preemptions == outcome.migrations == outcome.pushbacks == 0


def test_no_offline_is_the_easiest_on_online_work(runs):
    outcomes = {name: run.outcome() for name, run in runs.items()}
    for name in set(NAMES) - {"no-offline"}:
        assert outcomes["no-offline"].tpot_p99_s < outcomes[name].tpot_p99_s
        assert outcomes["no-offline"].ttft_p99_s < outcomes[name].ttft_p99_s


def test_ooco_preempts_and_pulls(runs):
    outcome = runs["ooco"].outcome()
    assert outcome.preemptions > 10 and outcome.migrations > 10
    assert 0 < outcome.wasted_fraction < 1 and outcome.offline_requests_per_s > 1


@pytest.mark.parametrize("name", ["online-priority", "base-pd"])
def test_plain_disaggregation_never_preempts_nor_pulls(runs, name):
    outcome = runs[name].outcome()
    assert outcome.preemptions == outcome.migrations == 0
    assert outcome.offline_requests_per_s > 1
    assert outcome.wasted_fraction == 0 or outcome.evictions > 0


def test_ooco_keeps_the_time_per_token_that_base_pd_breaks(runs):
    slo = runs["ooco"].scenario.slo
    outcomes = {name: runs[name].outcome() for name in ("ooco", "base-pd")}
    assert outcomes["ooco"].feasible and not outcomes["base-pd"].feasible
    assert outcomes["ooco"].tpot_p99_s < slo.tpot_s


@pytest.mark.parametrize("name", NAMES)
def test_an_episode_repeats(runs, name):
    again = episode(baselines.load(name), runs[name].scenario)
    assert again.outcome() == runs[name].outcome()
