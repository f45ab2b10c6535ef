"""cluster.yaml: what is accepted, and that every mistake is one sentence that names its key."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

pytest.importorskip("starlette", reason="the bridge extra is not installed")
from ooco_gym.bridge.__main__ import main
from ooco_gym.bridge.gateway.config import load_config, parse_config
from ooco_gym.bridge.gateway.enforcement import ENFORCED_KNOBS, UNENFORCED_KNOBS, not_enforced
from ooco_gym.bridge.gateway.serve import bound
from ooco_gym.cluster.control import KNOB_NAMES, check_rules
from ooco_gym.errors import OocoError

ONE = {"url": "http://127.0.0.1:8001", "role": "relaxed"}
TWO = {"url": "http://127.0.0.1:8002", "role": "strict"}
GOOD = {"instances": [TWO, ONE]}


def test_defaults_and_order_of_instances():
    config = parse_config(GOOD, {})
    assert [entry.role for entry in config.instances] == ["relaxed", "strict"]  # rows of the scenario's costs
    assert (config.listen.host, config.connector, config.dry_run) == ("127.0.0.1", "none", False)
    assert (config.scenario.cluster.relaxed, config.scenario.cluster.strict) == (1, 1)
    assert config.pull_mode == "recompute"
    assert parse_config({**GOOD, "connector": "nixl"}, {}).pull_mode == "handover"
    assert config.api_key is None
    alone = parse_config({"instances": [ONE]}, {})
    assert alone.scenario.cluster.unified == 1


def test_counts_and_keys_are_taken_over():
    entries = [{**ONE, "kv_blocks": 100, "max_num_seqs": 8}, {**TWO, "url": "http://h:1/v1/", "kv_blocks": 200}]
    values = {"instances": entries, "scenario": {"hardware": "h100", "cluster": {"tensor_parallel": 2}},
              "api_key_env": "KEY", "limits": {"max_queue": 5}, "timeouts": {"drain_s": 1}}  # fmt: skip
    config = parse_config(values, {"KEY": " secret "})
    assert config.scenario.instance_kv_blocks == (100, 200) and config.scenario.cluster.tensor_parallel == 2
    assert config.instances[1].url == "http://h:1" and config.instances[0].max_num_seqs == 8
    assert (config.api_key, config.limits.max_queue, config.timeouts.drain_s) == ("secret", 5, 1.0)
    assert "secret" not in repr(config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"instances": None}, "instances is empty, a list of at least one mapping such as {url: "),
        ({"instances": []}, "instances is [], a list"),
        ({"instances": ONE}, "instances is {'url'"),
        ({"instances": ["http://127.0.0.1:8001"]}, "instances[0] is 'http://127.0.0.1:8001', a mapping such as {url: "),
        ({"instances": [{**ONE, "url": [ONE["url"]]}]}, "instances[0].url is ['http://127.0.0.1:8001'], a URL"),
        ({"instances": [{**ONE, "url": "http://a\n:1"}]}, "instances[0].url is 'http://a\\n:1'"),
        ({"instances": [{**ONE, "url": "http://xn--"}]}, "instances[0].url is 'http://xn--'"),
        ({"instances": [{**ONE, "url": "ftp://x"}]}, "instances[0].url is 'ftp://x'"),
        ({"instances": [{**ONE, "url": "http://x:99999"}]}, "instances[0].url"),
        ({"instances": [{**ONE, "url": "http://u:p@x"}]}, "instances[0].url holds a user"),
        ({"instances": [ONE, ONE]}, "instances[1].url is http://127.0.0.1:8001, which instances[0] has already"),
        ({"instances": [{**ONE, "url": "http://h"}, {**ONE, "url": "HTTP://H/v1"}]}, "instances[1].url is HTTP://H, "),
        ({"instances": [{**ONE, "role": "fast"}]}, "instances[0].role is 'fast'"),
        ({"instances": [{**ONE, "kv_blocks": 0}]}, "instances[0].kv_blocks is 0"),
        ({"instances": [{**ONE, "max_num_seqs": True}]}, "instances[0].max_num_seqs is True"),
        ({"instances": [{**ONE, "weight": 1}]}, "instances[0].weight is an unknown key"),
        ({"instances": [ONE], "connector": "nixl"}, "connector is 'nixl', which needs"),
        ({"connector": "lmcache"}, "connector is 'lmcache', accepted are none, example, nixl"),
        ({"pull": "handover"}, "pull is 'handover'"),
        ({"scenario": {"hardware": "abacus"}}, "scenario: unknown hardware 'abacus'"),
        ({"scenario": {"cluster": {"relaxed": 3}}}, "scenario.cluster.relaxed is not accepted"),
        ({"scenario": {"cluster": "2x2"}}, "scenario.cluster is '2x2'"),
        ({"scenario": {"episode_s": 3}}, "scenario.episode_s is an unknown key"),
        ({"scenario": []}, "scenario is [], a mapping such as {model: "),
        ({"scenario": {"slo": [1]}}, "scenario: slo is [1]: a preset name"),
        ({"listen": []}, "listen is [], a mapping such as {host: "),
        ({"limits": False}, "limits is False, a mapping such as {max_queue: "),
        ({"timeouts": 5}, "timeouts is 5, a mapping such as {drain_s: "),
        ({"connector": ["none"]}, "connector is ['none'], accepted are"),
        ({"dry_run": {"yes": 1}}, "dry_run is {'yes': 1}, true or false"),
        ({"jobs": ["a"]}, "jobs is ['a'], a path is needed"),
        ({"jobs": "/no/such/folder/jobs.sqlite"}, "jobs is /no/such/folder/jobs.sqlite, but there is no folder"),
        ({"jobs": "~/jobs.sqlite"}, "jobs is ~/jobs.sqlite, but there is no folder ~"),
        ({"decision_log": "/no/such/folder/log"}, "decision_log is /no/such/folder/log, but there is no folder"),
        ({"decision_log": "/"}, "decision_log is /, which is no regular file"),
        ({"decision_log": "same", "jobs": "./same"}, "jobs is ./same, which is the decision_log as well"),
        ({"listen": {"port": 70000}}, "listen.port is 70000"),
        ({"listen": {"host": ""}}, "listen.host is ''"),
        ({"listen": {"tls": 1}}, "listen.tls is an unknown key"),
        (
            {"limits": {"max_body_bytes": 1.5}},
            "limits.max_body_bytes is 1.5, a whole number from 1,024 to 1,073,741,824",
        ),
        ({"limits": {"max_body_bytes": 10}}, "limits.max_body_bytes is 10"),
        ({"limits": {"max_queue": [10]}}, "limits.max_queue is [10]"),
        ({"limits": {"max_online": 10**9}}, "limits.max_online is 1000000000, a whole number from 1 to 1,000,000"),
        ({"timeouts": {"drain_s": 0}}, "timeouts.drain_s is 0, a number from 0.01 to 3,600 is needed"),
        ({"timeouts": {"connect_s": 1e-6}}, "timeouts.connect_s is 1e-06, a number from 0.01 to 600 is needed"),
        ({"timeouts": {"idle_s": None}}, "timeouts.idle_s is empty, a number"),
        ({"control_interval_s": float("nan")}, "control_interval_s is nan, a number from 0.01 to 600 is needed"),
        ({"control_interval_s": 1e-9}, "control_interval_s is 1e-09"),
        ({"control_interval_s": "1" * 999}, "control_interval_s is '" + "1" * 79 + "..., a number"),
        ({"scrape_interval_s": 1e9}, "scrape_interval_s is 1000000000.0, a number from 0.01 to 600 is needed"),
        ({"policy_time_s": True}, "policy_time_s is True"),
        ({"dry_run": "yes"}, "dry_run is 'yes'"),
        ({"decision_log": 3}, "decision_log is 3"),
        ({"api_key_env": "NOT_SET"}, "api_key_env names the environment variable NOT_SET, which is not set"),
        ({"api_key_env": "a b"}, "api_key_env is not the name"),
        ({"api_key": "x"}, "api_key is an unknown key"),
    ],
)
def test_mistakes_are_one_sentence_with_the_key(change, says):
    with pytest.raises(OocoError) as caught:
        parse_config({**GOOD, **change}, {})
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


def test_file_and_overrides(tmp_path, monkeypatch):
    path = tmp_path / "cluster.yaml"
    path.write_text("instances: [{url: 'http://127.0.0.1:1', role: relaxed}]\nlisten: {port: 1}\n")
    config = load_config(path, {"listen": {"port": 0}, "dry_run": True})
    assert config.listen.port == 0 and config.dry_run
    for override, says in (
        ({"limits": [1]}, "limits is [1], a mapping"),
        ({"listen": 3}, "listen is 3, a mapping"),
        ({"instances": {"0": {"url": "x"}}}, "instances is {'0': {'url': 'x'}}, a list"),
    ):
        with pytest.raises(OocoError) as caught:  # whatever the file has there
            load_config(path, override)
        assert says in str(caught.value)
    path.write_text("- instances\n")
    with pytest.raises(OocoError, match=r"the file is \['instances'\], a mapping such as"):
        load_config(path)
    for text in ("instances: [", "3", "instances: {a: 1}", "at: 2020-13-45", "jobs: ???", "a: &a [*a]", "[" * 9999):
        path.write_text(text)
        with pytest.raises(OocoError, match=r"^config .*cluster\.yaml: ") as caught:
            load_config(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(OocoError, match="no such file"):
        load_config(tmp_path / "none.yaml")


def test_a_misspelt_folder_is_refused_before_anything_is_opened(tmp_path, capsys):
    path = tmp_path / "cluster.yaml"
    path.write_text("instances: [{url: 'http://127.0.0.1:1', role: relaxed}]\nlisten: {port: 0}\n")
    store, log = tmp_path / "jbos" / "jobs.sqlite", tmp_path / "decisions.jsonl"
    assert main(["serve", f"config={path}", f"decision_log={log}", f"jobs={store}"]) == 2
    assert f"jobs is {store}, but there is no folder {store.parent}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_every_knob_is_said_to_be_enforced_or_not():
    assert set(ENFORCED_KNOBS) | set(UNENFORCED_KNOBS) == set(KNOB_NAMES)
    assert not set(ENFORCED_KNOBS) & set(UNENFORCED_KNOBS)
    notes = not_enforced(parse_config(GOOD, {}), check_rules({}))
    for knob in UNENFORCED_KNOBS:
        assert any(note.startswith(f"knob {knob} is not enforced") for note in notes)
    dry = not_enforced(parse_config({**GOOD, "dry_run": True}, {}), check_rules({}))
    assert sum(note.startswith("knob ") for note in dry) == len(KNOB_NAMES)
    off = not_enforced(parse_config({**GOOD, "pull": "off"}, {}), check_rules({"mix_selection": "all"}))
    assert any("pull_kv is not enforced: pull is off" in note for note in off)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sing"], "unknown command 'sing'"),
        (["serve"], "serve needs config=FILE"),
        (["serve", "config"], "argument 'config' is not understood"),
        (["serve", "config=/none.yaml"], "config /none.yaml: no such file"),
        (["serve", "config=[1"], "arguments: not understood"),
        (["serve", f"config={'x' * 9999}"], "config xxx"),
    ],
)
def test_command_line_mistakes_are_one_sentence(arguments, says, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {says}") and error.count("\n") == 1


def test_serving_needs_no_torch_agents_or_baselines():
    code = (
        "import sys, ooco_gym.bridge.gateway.serve; "
        "print([name for name in ('torch', 'agents', 'baselines', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_teaches(capsys):
    assert main(["--help"]) == 0 and main(["serve", "--help"]) == 0
    out = capsys.readouterr().out
    assert "export" in out and "explain" in out and "config=cluster.yaml" in out and "role: relaxed" in out


def test_pull_off_as_yaml_reads_it(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("instances: [{url: 'http://127.0.0.1:1', role: relaxed}]\npull: off\n")
    assert load_config(path).pull_mode == "off"


def test_what_may_be_a_secret_is_not_repeated(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("instances: [{url: 'http://127.0.0.1:1', role: relaxed}]\napi_key_env: sk-secret\n")
    with pytest.raises(OocoError, match="api_key_env is not the name") as caught:
        load_config(path)
    assert "sk-secret" not in str(caught.value)


def test_an_address_that_is_taken_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OocoError, match=r"listen: 127\.0\.0\.1:\d+ cannot be used: Address already in use"):
            bound("127.0.0.1", taken.getsockname()[1])
