"""The upper bound: below every way of batching the same work, above every policy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import baselines
from ooco_gym.errors import OocoError
from ooco_gym.evaluation import episode_seeds, run_episodes
from ooco_gym.evaluation.bound import Work, cheapest_cost, instance_seconds, offline_bound
from ooco_gym.evaluation.suite import load_suite, tuned_policy
from ooco_gym.policy import ConstantPolicy
from ooco_gym.roofline.cost import causal_pairs, iteration_s
from ooco_gym.scenario import build_scenario

SEEDS = episode_seeds("evaluation", 0, 2)
GREEDY = ConstantPolicy(
    "greedy",
    knobs={"preempt_slack": 1.2, "gate_batch": 2.0, "prefill_chunk": 2048, "strict_prefill": 512, "tpot_bound": 1.2},
)
SCENARIOS = (
    {},
    {"offline": "decode-heavy"},
    {"offline": "arxiv-summarization", "hardware": "h100"},
    {"workload": "azure-code", "slo": "loose"},
    {"cluster": "unified4"},
    {"cost": "ooco-xllm", "hardware": "ascend-910b"},
    {"model": "qwen3-30b-a3b", "cluster": {"relaxed": 2, "strict": 2, "tensor_parallel": 2}},
    {"cluster": {"relaxed": 2, "strict": 2, "strict_hardware": "h100"}},
)

requests = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 40)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    requests, st.integers(1, 4), st.sampled_from(["calibrated", "ooco-xllm"]), st.sampled_from([None, "qwen3-30b-a3b"])
)
def test_no_batching_of_the_same_work_is_quicker(lengths, group, form, model):
    scenario = build_scenario(
        {"cost": {"true_form": form, "scheduler_form": form}} | ({"model": model} if model else {})
    )
    cost = cheapest_cost(scenario)
    total_s, kv_tokens = 0.0, 1.0
    for start in range(0, len(lengths), group):  # prefill a group in one batch, then decode it together to the end
        members = lengths[start : start + group]
        prompts = [float(prompt) for prompt, _ in members]
        tokens = sum(prompts)
        batch = (tokens, sum(causal_pairs(p, 0.0) for p in prompts), sum(p * p for p in prompts), tokens, len(prompts))
        total_s += iteration_s(cost, *map(float, batch), 0.0, 0.0, 0.0)
        for step in range(1, max(output for _, output in members)):
            contexts = [float(prompt + step) for prompt, output in members if output > step]
            kv_tokens = max(kv_tokens, sum(contexts))
            decode = (float(len(contexts)), float(sum(contexts)), max(contexts))
            total_s += iteration_s(cost, 0.0, 0.0, 0.0, 0.0, 0.0, *decode)
    largest = max(sum(p for p, _ in lengths[i : i + group]) for i in range(0, len(lengths), group))
    work = Work.of(*np.array(lengths).T)
    assert instance_seconds(work, cost, float(largest), kv_tokens) <= total_s * (1 + 1e-9)


@pytest.mark.parametrize("config", SCENARIOS, ids=str)
def test_no_policy_exceeds_it(config):
    scenario = build_scenario({"episode_s": 300.0} | config)
    bound = offline_bound(scenario, SEEDS)
    for policy in [*(baselines.load(name) for name in baselines.known()), GREEDY]:
        outcomes = run_episodes(policy, scenario, SEEDS)
        useful = np.mean([outcome.offline_ideal_s_per_instance_s for outcome in outcomes])
        assert useful <= bound.useful, policy.name
    assert 0.2 < bound.useful < 2.5


@pytest.mark.slow
@pytest.mark.parametrize("entry", load_suite("v1"), ids=lambda entry: entry.name)
def test_no_policy_exceeds_it_in_the_suite(entry):
    try:
        scenario = entry.admitted(episode_s=240.0).scenario
    except OocoError as error:
        pytest.skip(str(error))
    bound = offline_bound(scenario, SEEDS)
    tuned = [tuned_policy("v1", level, entry.deployment) for level in ("tuned-ooco", "tuned-all", "tuned-global")]
    for policy in [*(baselines.load(name) for name in baselines.known()), GREEDY, *tuned]:
        outcomes = run_episodes(policy, scenario, SEEDS)
        useful = np.mean([outcome.offline_ideal_s_per_instance_s for outcome in outcomes])
        assert useful <= bound.useful, policy.name


def test_it_grows_with_the_cluster_and_shrinks_with_the_load():
    two, four = (offline_bound(build_scenario({"cluster": c}), SEEDS).offline_requests_per_s for c in ("2x2", "8x8"))
    assert 4 * two < four
    busy = offline_bound(build_scenario().with_rate_scale(3.0), SEEDS).useful
    assert busy < offline_bound(build_scenario(), SEEDS).useful
    assert offline_bound(build_scenario().with_rate_scale(50.0), SEEDS).useful == 0.0
    assert offline_bound(build_scenario({"offline": "none"}), SEEDS).useful == 0.0


def test_work_by_hand():
    work = Work.of([10, 4], [3, 1])
    assert (work.prompt_tokens, work.decode_tokens, work.requests, work.output_tokens) == (14, 2, 2, 4)
    assert work.prefill_pairs == 55 + 10 and work.decode_context == 11 + 12
