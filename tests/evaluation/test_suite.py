"""Suites: what is in them, and that test data stay out of training."""

import pytest

from ooco_gym import presets
from ooco_gym.errors import OocoError
from ooco_gym.evaluation.suite import load_suite


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
