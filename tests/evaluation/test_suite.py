"""Suites: what is in them, and that test data stay out of training."""

import pytest

from ooco_gym import presets
from ooco_gym.cluster.control import KNOB_NAMES, ooco_knobs
from ooco_gym.errors import OocoError
from ooco_gym.evaluation.suite import load_suite, tuned_policy


def test_the_first_suite_covers_what_it_is_for_and_keeps_the_roles_apart():
    entries = load_suite("v1")
    assert {entry.role for entry in entries} == {"train", "validation", "test"}
    assert len({entry.name for entry in entries}) == len(entries) >= 20
    training = load_suite("v1", "train")
    assert {presets.load("workload", entry.config["workload"])["role"] for entry in training} == {"train"}
    assert {presets.load("workload", entry.config["workload"])["kind"] for entry in training} == {"synthetic"}
    for group, at_least in (("model", 2), ("hardware", 2), ("cluster", 3), ("slo", 2), ("offline", 2), ("workload", 4)):
        assert len({str(entry.config[group]) for entry in training if group in entry.config}) >= at_least, group


def test_an_entry_at_its_load_is_admitted():
    entry = next(entry for entry in load_suite("v1", "train") if entry.name == "conv-half-load")
    admission = entry.admitted(episode_s=60.0, warmup_s=10.0)
    assert admission.rate_scale == pytest.approx(0.5) and admission.violation_rate <= 0.01
    assert admission.scenario.online.rate_scale == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("scenarios", "said"),
    [
        ({}, "a mapping from names to configs"),
        ({"a": {"role": "train"}}, "scenario 'a': a mapping with a workload and a role"),
        ({"a": {"role": "tuning", "workload": "azure-conv"}}, "a role of train, validation, test"),
        ({"a": {"role": "train", "workload": "azure-code-2023"}}, "role is train, but workload .* is test data"),
        ({"a": {"role": "train", "workload": "azure-conv", "load": 0}}, "load is 0, a positive number"),
        ({"a": {"role": "train", "workload": "nowhere"}}, "unknown workload 'nowhere'"),
    ],
)
def test_suites_that_are_refused(monkeypatch, scenarios, said):
    real = presets.load
    monkeypatch.setattr(
        presets, "load", lambda group, name: {"scenarios": scenarios} if group == "suite" else real(group, name)
    )
    with pytest.raises(OocoError, match=said):
        load_suite("mine")


def test_scenarios_of_one_deployment_share_their_tuned_constants():
    by_name = {entry.name: entry for entry in load_suite("v1")}
    assert by_name["bursts"].deployment == by_name["test-conv"].deployment == "default"
    assert by_name["code"].deployment == by_name["test-mooncake"].deployment == "slo=loose"
    assert (
        by_name["diurnal"].deployment
        == by_name["test-reasoning"].deployment
        == ("cluster=8x8 slo={ttft_s:20.0,tpot_floors:8.0}")
    )
    trained_on = {entry.deployment for entry in load_suite("v1", "train")}
    assert {entry.deployment for entry in load_suite("v1")} <= trained_on


@pytest.mark.parametrize("level", ["tuned-ooco", "tuned-all", "tuned-global"])
def test_every_deployment_of_the_suite_has_tuned_constants(level):
    papers = {"gate_batch", "tpot_bound", "pull_kv", "pull_length"}
    for entry in load_suite("v1"):
        policy = tuned_policy("v1", level, entry.deployment)
        assert policy.name == level
        moved = {
            name for name, mine, theirs in zip(KNOB_NAMES, policy.vector, ooco_knobs(), strict=True) if mine != theirs
        }
        assert level != "tuned-ooco" or moved <= papers


def test_a_deployment_without_tuned_constants_lists_those_that_have_some():
    with pytest.raises(
        OocoError, match="no tuned-all for the deployment 'hardware=abacus'; known are default; slo=tight"
    ):
        tuned_policy("v1", "tuned-all", "hardware=abacus")
