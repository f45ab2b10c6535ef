"""Presets: every file builds, carries the published numbers, and every mistake in a file is named."""

import copy

import numpy as np
import pytest
import yaml

from ooco_gym import presets
from ooco_gym.errors import OocoError
from ooco_gym.workload import find_data, offline_work, online_source

ROLES = {
    "azure-conv": "train",
    "azure-code": "train",
    "mooncake": "train",
    "deepseek-r1": "train",
    "csv": "train",
    "azure-conv-2023": "validation",
    "azure-code-2023": "test",
    "mooncake-synthetic": "test",
    "servegen-deepseek-r1": "test",
}
SYNTHETIC = ("azure-conv", "azure-code", "mooncake", "deepseek-r1")
TRACES = ("azure-conv-2023", "azure-code-2023", "mooncake-synthetic", "servegen-deepseek-r1")
# Requests per second of the fits (deepseek-r1: of the whole day), then of the traces (data/traces/README.md).
RATES = (5.53, 2.57, 3.90, 16.01, 5.53, 2.57, 3.91, 16.84)


def shared(path):
    try:
        return find_data(path)
    except OocoError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", presets.names("workload"))
def test_every_workload_names_itself(name):
    config = presets.load("workload", name)
    assert config["name"] == name
    assert config["role"] == ROLES.get(name, config["role"]) and config["role"] in ("train", "validation", "test")
    assert config["kind"] == "trace" or config["role"] == "train"  # only recorded traffic is kept from training
    assert config["rate_scale"] == "auto"
    assert config["description"] and "\n" not in config["description"]


@pytest.mark.parametrize(("name", "rate"), list(zip(SYNTHETIC + TRACES, RATES, strict=True)))
def test_online_presets_build_and_sample(name, rate):
    config = presets.load("workload", name)
    if config["kind"] == "trace":
        shared(config["file"])
    source = online_source(config)
    assert (source.name, source.role, source.rate_scale) == (name, ROLES[name], 1.0)
    assert source.mean_rate_per_s == pytest.approx(rate, abs=0.006)
    requests = source.sample(0, 600.0)
    assert requests.duration_s < 600
    assert len(requests) > 300


@pytest.mark.parametrize("name", [n for n in presets.names("offline") if n != "table"])
def test_offline_presets_build_and_sample(name):
    config = presets.load("offline", name)
    work = offline_work(config)
    assert config["name"] == name
    if name == "none":
        assert len(work.sample(0, 600.0)) == 0
        return
    jobs = work.sample(0, 600.0)
    assert jobs.endless
    assert jobs.prompt_tokens.mean() == pytest.approx(work.mean_prompt_tokens, rel=0.05)
    assert jobs.output_tokens.mean() == pytest.approx(work.mean_output_tokens, rel=0.05)
    other = offline_work(config | {"kind": "poisson", "rate_per_s": 1.0}).sample(0, 60.0)
    assert other.prompt_tokens.tolist() == jobs.prompt_tokens[: len(other)].tolist()


def test_offline_presets_cover_prefill_heavy_to_decode_heavy():
    ratio = {}
    for name in ("arxiv-long", "arxiv-summarization", "sharegpt-8k", "decode-heavy"):
        work = offline_work(presets.load("offline", name))
        ratio[name] = work.mean_prompt_tokens / work.mean_output_tokens
    assert list(ratio.values()) == sorted(ratio.values(), reverse=True)
    assert ratio["arxiv-long"] > 50
    assert ratio["decode-heavy"] < 0.05


def test_preset_numbers_are_the_fitted_ones():
    fit = yaml.safe_load(shared("synthetic_fit.yaml").read_text())
    online, offline = fit["online_traces"], fit["offline_length_tables"]
    pairs = [
        ("workload", "azure-conv", online["azure-conv-2023"]),
        ("workload", "azure-code", online["azure-code-2023"]),
        ("workload", "mooncake", online["mooncake-synthetic"]),
        ("workload", "deepseek-r1", online["servegen-deepseek-r1-24h"]),
        ("offline", "arxiv-summarization", offline["len-arxiv-summarization"]),
        ("offline", "sharegpt-8k", offline["len-sharegpt-8k"]),
        ("offline", "arxiv-long", offline["len-arxiv-long-online"]),
    ]
    for group, name, source in pairs:
        config = presets.load(group, name)
        lengths = config["lengths"]
        assert lengths["components"] == source["lengths"]["bivariate_lognormal_mixture"]
        assert lengths["support"]["prompt_tokens"] == source["lengths"]["support"]["prompt"]
        assert lengths["support"]["output_tokens"] == source["lengths"]["support"]["output"]
        if config.get("arrivals", {}).get("model") in ("markov", "diurnal"):
            params = source["arrivals"]["params"]
            assert config["arrivals"]["transition_per_bin"] == params["transition_matrix_per_bin"]
            assert config["arrivals"]["bin_s"] == params["bin_s"]
            rates = params.get("rate_per_s", params.get("state_rate_multiplier"))
            assert rates in (config["arrivals"].get("rate_per_s"), config["arrivals"].get("state_multiplier"))
            assert online_source(config).arrivals.chain.stationary == pytest.approx(params["stationary"], abs=2e-4)


def test_a_trace_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,5,1\n10,6,2\n30,7,3\n")
    config = presets.load("workload", "csv")
    with pytest.raises(OocoError, match="workload 'csv': file is missing, it must be given"):
        online_source(config)
    assert online_source(config | {"file": str(tmp_path / "my.csv")}).mean_rate_per_s == 0.1
    assert online_source(config | {"file": "my.csv"}, data_dir=tmp_path).mean_prompt_tokens == 6
    monkeypatch.chdir(tmp_path)
    source = online_source(config | {"file": "my.csv", "window": [5, 15], "rate_scale": 2})
    assert (source.rate_scale, source.mean_rate_per_s, source.mean_prompt_tokens) == (2, 0.2, 6)


def test_a_length_table_of_ones_own(tmp_path):
    (tmp_path / "my.csv").write_text("prompt_tokens,output_tokens\n5,1\n7,3\n")
    config = presets.load("offline", "table")
    with pytest.raises(OocoError, match="offline 'table': lengths: file is missing"):
        offline_work(config)
    work = offline_work(config | {"lengths": {"model": "table", "file": "my.csv"}}, data_dir=tmp_path)
    assert (work.mean_prompt_tokens, work.mean_output_tokens) == (6, 2)


def test_fixed_lengths_and_poisson_by_hand():
    config = {
        "name": "toy",
        "role": "test",
        "kind": "synthetic",
        "rate_scale": 0.5,
        "arrivals": {"model": "poisson", "rate_per_s": 4},
        "lengths": {"model": "fixed", "prompt_tokens": 100, "output_tokens": 10},
    }
    source = online_source(config)
    assert (source.mean_rate_per_s, source.mean_prompt_tokens, source.mean_output_tokens) == (2, 100, 10)
    assert np.unique(source.sample(0, 100.0).prompt_tokens).tolist() == [100]


def changed(config, path, value):
    """A copy of the mapping with the value at the dotted path set, or deleted where value is ``...``."""
    config = copy.deepcopy(config)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    node = config
    for key in parents:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return config


@pytest.mark.parametrize(
    ("preset", "path", "value", "named"),
    [
        ("azure-code", "colour", 1, "unknown key 'colour', accepted are description, name, role"),
        ("azure-code", "name", ..., "workload: name is missing"),
        ("azure-code", "role", "exam", "role is 'exam', it must be one of train, validation, test"),
        ("azure-code", "kind", "magic", "kind is 'magic', it must be one of synthetic, trace"),
        ("azure-code", "rate_scale", "fast", "rate_scale is 'fast', it must be 'auto' or a positive number"),
        ("azure-code", "rate_scale", -2, "rate_scale is -2, it must be 'auto' or a positive number"),
        ("azure-code", "arrivals", 5, "'azure-code': arrivals is 5, it must be a mapping"),
        ("azure-code", "arrivals.model", "chaos", "arrivals: model is 'chaos', it must be one of poisson"),
        ("azure-code", "arrivals.bin_s", 0, "arrivals: bin_s is 0, it must be a positive number"),
        ("azure-code", "arrivals.speed", 3, "arrivals: unknown key 'speed', accepted are model, rate_per_s"),
        ("azure-code", "arrivals.rate_per_s", [1, 2], "'azure-code': arrivals: rate_per_s has shape (2,)"),
        ("azure-code", "arrivals.rate_per_s", "high", "rate_per_s is 'high', it must be a list of numbers"),
        ("azure-code", "arrivals.transition_per_bin", [[1], [1, 2]], "equally long lists of numbers"),
        (
            "azure-code",
            "arrivals.transition_per_bin.0",
            [0.5] * 6,
            "arrivals: each row of transition_per_bin",
        ),
        ("azure-code", "arrivals.ticks.probability", 2, "arrivals: probability is 2"),
        ("azure-code", "arrivals.ticks.hum", 2, "ticks: unknown key 'hum'"),
        ("deepseek-r1", "arrivals.harmonics", [[1, 2, 3]], "harmonics must be a list of [cosine, sine]"),
        ("deepseek-r1", "arrivals.compress", ..., "arrivals: compress is missing"),
        ("azure-conv", "lengths.support.prompt_tokens", [5], "prompt_tokens is [5], it must be two numbers"),
        (
            "azure-conv",
            "lengths.support.prompt_tokens",
            [5, 2],
            "'azure-conv': lengths: largest value in the",
        ),
        ("azure-conv", "lengths.components.1.rho", 3, "lengths: components[1]: rho is 3"),
        ("azure-conv", "lengths.components.1.tau", 3, "components[1]: unknown key 'tau'"),
        ("azure-conv", "lengths.components.0.weight", 0.9, "weights of the length components sum to"),
        ("azure-conv", "lengths.components", {}, "components is {}, it must be a list"),
        ("azure-conv-2023", "file", 7, "file is 7, it must be text"),
        ("azure-conv-2023", "file", "no-such.csv", "data file 'no-such.csv' not found"),
        ("azure-conv-2023", "window", [1, 2, 3], "window is [1, 2, 3], it must be two numbers"),
        ("azure-conv-2023", "arrivals", {}, "unknown key 'arrivals', accepted are"),
    ],
)
def test_mistakes_in_a_workload_are_named(preset, path, value, named):
    with pytest.raises(OocoError) as caught:
        online_source(changed(presets.load("workload", preset), path, value))
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (
            "kind",
            "some",
            "offline 'sharegpt-8k': kind is 'some', it must be one of none, endless, jobs, poisson",
        ),
        ("kind", "jobs", "offline: jobs is None"),
        ("kind", "poisson", "offline: rate_per_s is None"),
        ("rate_per_s", -1, "offline 'sharegpt-8k': rate_per_s is -1"),
        ("jobs", 1.5, "offline 'sharegpt-8k': jobs is 1.5, it must be a whole number"),
        ("lengths", None, "kind endless needs lengths"),
        ("deadline", 5, "unknown key 'deadline', accepted are"),
    ],
)
def test_mistakes_in_offline_work_are_named(path, value, named):
    with pytest.raises(OocoError) as caught:
        offline_work(changed(presets.load("offline", "sharegpt-8k"), path, value))
    assert named in str(caught.value)


def test_a_config_must_be_a_mapping():
    with pytest.raises(OocoError, match="workload is \\[\\], it must be a mapping"):
        online_source([])
