"""The studies over many scenarios, in small forms, as a user runs them: benchmark, ablations, headroom, the paper."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import baselines
from agents.levels import Tuner
from experiments.benchmark import contenders
from ooco_gym.cluster.control import ooco_knobs
from ooco_gym.errors import OocoError
from ooco_gym.evaluation import hindsight
from ooco_gym.evaluation.headroom import Effort
from ooco_gym.evaluation.suite import load_suite
from ooco_gym.scenario import build_scenario

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["seeds=2", "episode_s=60", "warmup_s=20"]


def run(script, *arguments, cwd=ROOT):
    command = [sys.executable, str(ROOT / "experiments" / script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_what_may_contend():
    found = contenders(
        [
            "ooco",
            "tuned-all",
            {"baseline": "hygen", "shape": "unified"},
            {"baseline": "dedicated-split", "shape": "dedicated"},
        ]
    )
    assert [one.name for one in found] == ["ooco", "tuned-all", "hygen", "dedicated-split"]
    entry = next(entry for entry in load_suite("v1", "train") if entry.name == "conv-1x3")
    scenario = entry.admitted(episode_s=30.0, warmup_s=5.0).scenario
    split = [found[i].on(entry, scenario, "v1")[1].cluster for i in range(4)]
    assert [(c.relaxed, c.strict, c.unified) for c in split] == [(1, 3, 0), (1, 3, 0), (0, 0, 4), (1, 1, 2)]
    assert found[2].on(entry, scenario, "v1")[1].online == scenario.online
    assert found[1].on(entry, scenario, "v1")[0].knobs != found[0].policy.knobs


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["ooco", "ooco"], "two are called 'ooco'"),
        ([{"baseline": "hygen", "shape": "round"}], "shape is 'round', accepted are unified, dedicated"),
        ([{"baseline": "ooco", "speed": 1}], "is not understood"),
        ([{"baseline": "arrow", "knobs": {"gate_batch": 2.0}}], "'arrow' decides as it goes"),
        ([{"baseline": "ooco", "rules": {"preemption": "never"}}], "rule 'preemption' is 'never'"),
        (["nobody"], "unknown baseline 'nobody'"),
    ],
)
def test_contenders_that_are_refused(entries, said):
    with pytest.raises(OocoError, match=said):
        contenders(entries)


def test_every_rival_is_one_short_file_that_names_its_source():
    for name in baselines.known():
        text = (ROOT / "baselines" / f"{name.replace('-', '_')}.py").read_text()
        assert len(text.splitlines()) <= 60, name
        assert text.startswith('"""') and "import" in text


@pytest.mark.slow
def test_the_benchmark_scores_policies_and_keeps_its_config(tmp_path):
    policies = "policies=[no-offline,ooco,tuned-global,{baseline: hygen, shape: unified}]"
    done = run("benchmark.py", "only=[conv,conv-half-load]", policies, *SHORT, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "train: 2 scenarios together" in done.stdout and "tuned-global" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(row["policy"], row["scenario"]) for row in results["rows"]][:4] == [
        (name, "conv") for name in ("no-offline", "ooco", "tuned-global", "hygen")
    ]
    scores = results["aggregates"]["train"]
    assert scores["no-offline"]["interquartile_mean"]["value"] == 0.0 == scores["ooco"]["difference"]["value"]
    assert scores["tuned-global"]["difference"]["low"] > 0.0
    assert OmegaConf.load(tmp_path / "config.yaml").only == ["conv", "conv-half-load"]
    assert {"scores-train.png", "profile-train.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_ablations_change_one_control_each(tmp_path):
    done = run("benchmark.py", "--config-name", "ablations", "only=[default]", *SHORT, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    rows = {row["policy"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert rows["no preemption"]["violation_rate"] > 0.1 > rows["ooco"]["violation_rate"]
    assert rows["keeps chunks of 2048"]["wasted_fraction"] < rows["ooco"]["wasted_fraction"]
    assert rows["no migration"]["offline_requests_per_s"] < rows["ooco"]["offline_requests_per_s"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("benchmark.py", ["only=[convoy]"], "no scenario 'convoy' in suite 'v1', known are conv,"),
        ("benchmark.py", ["roles=[exam]"], "roles: 'exam' is unknown, accepted are train, validation, test"),
        ("benchmark.py", ["constants=v9"], "unknown tuned 'v9': known are v1"),
        ("benchmark.py", ["scenarios=v9"], "unknown suite 'v9'"),
        ("benchmark.py", ["seeds=0"], "seeds is 0, a whole number of at least 1"),
        ("benchmark.py", ["quick=maybe"], "quick is 'maybe', accepted are true and false"),
        ("benchmark.py", ["seeds=1000000000000"], "at most 10000 is accepted"),
        ("reproduce_paper.py", ["limits=[abc]"], "limits: 'abc' is not a violation rate"),
        ("reproduce_paper.py", ["policies=[]"], "policies is []"),
        ("reproduce_paper.py", ["seed=-1"], "seed is -1, a whole number of at least 0"),
        ("reproduce_paper.py", ["curve_per_s=[-1]"], "curve_per_s: an entry is -1, a positive number"),
        ("reproduce_paper.py", ["sensitivity_of=[nope]"], "unknown workload 'nope'"),
        ("headroom.py", ["--only", "test-code"], "no training scenario 'test-code' in suite 'v1'"),
        ("headroom.py", ["--suite", "v9"], "unknown suite 'v9'"),
        ("reproduce_paper.py", ["limits=[]"], "limits is"),
        ("reproduce_paper.py", ["workloads=[moon]"], "unknown workload 'moon'"),
        ("reproduce_paper.py", ["rows=[moon]"], "rows: 'moon' is unknown, accepted is a list of some of a100"),
        ("reproduce_paper.py", ["seeds=1"], "seeds is 1, a whole number of at least 2"),
    ],
)
def test_a_mistake_is_one_sentence(script, arguments, said, tmp_path):
    where = ["--out", str(tmp_path)] if script == "headroom.py" else [f"hydra.run.dir={tmp_path}"]
    done = run(script, *arguments, *where)
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_constants_tuned_on_another_scenario_of_the_same_name_are_not_taken_over(tmp_path, monkeypatch):
    effort = Effort(1, 1, 20.0, 2, 20.0, 1, 1)
    tuned_on = []
    monkeypatch.setattr(hindsight, "held_reward", lambda scenario, *_: tuned_on.append(scenario.identity) or 0.0)
    one, other = (build_scenario({"episode_s": 20.0, "warmup_s": 5.0, "slo": slo}) for slo in ("medium", "loose"))
    with ThreadPoolExecutor(1) as threads:
        for scenario, again in ((one, 10), (one, 0), (other, 10)):
            tuned_on.clear()
            tuner = Tuner(effort, 0, tmp_path / "tuned.json", lambda *_: None, threads)
            tuner.tune("here", {"conv": scenario}, ["gate_batch"], [ooco_knobs()])
            assert set(tuned_on) == ({scenario.identity} if again else set()) and len(tuned_on) >= again
    (tmp_path / "tuned.json").write_text("[]")
    with pytest.raises(OocoError, match="is damaged; delete it"):
        Tuner(effort, 0, tmp_path / "tuned.json", lambda *_: None, threads)


@pytest.mark.slow
def test_headroom_goes_on_where_it_was_interrupted(tmp_path):
    arguments = ["--quick", "--only", "conv-half-load", "--out", str(tmp_path)]
    command = [sys.executable, str(ROOT / "experiments" / "headroom.py"), *arguments]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "tuned.json").is_file() and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert "the same command goes on from there" in said or first.returncode == 0
    kept = json.loads((tmp_path / "tuned.json").read_text())
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["tuned"]["tuned-global"] == kept["tuned-global"]["found"]
    row = results["scenarios"]["conv-half-load"]
    assert row["hindsight - tuned-here"]["low"] >= 0.0
    tuned = OmegaConf.load(tmp_path / "tuned.yaml")
    assert set(tuned) == {"tuned-global", "tuned-ooco", "tuned-all", "tuned-here"} and "default" in tuned["tuned-all"]


@pytest.mark.slow
def test_the_papers_figure_in_a_small_form(tmp_path):
    small = ["policies=[base-pd,ooco]", "limits=[0.03,0.0]", "curve_per_s=[1.0,4.0]", "precision=0.3"]
    arguments = [
        *small,
        *SHORT,
        "workloads=[ooc-like]",
        "sensitivity_of=[ooc-like]",
        "rows=[slo-loose]",
        f"hydra.run.dir={tmp_path}",
    ]
    done = run("reproduce_paper.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "published 3.00" in done.stdout and "slo-loose" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    rows = results["workloads"]["ooc-like"]["policies"]
    assert rows["ooco"]["published_per_s"] == 3.0 and len(rows["ooco"]["curve"]) == 2
    assert rows["ooco"]["capacity_per_s"]["0.03"]["value"] < results["workloads"]["ooc-like"]["bound_requests_per_s"]
    capacity = {float(limit): found["value"] for limit, found in rows["base-pd"]["capacity_per_s"].items()}
    assert capacity[0.0] <= capacity[0.03]
    probes = (tmp_path / "probes.jsonl").read_text()
    again = run("reproduce_paper.py", *arguments)
    assert again.returncode == 0 and (tmp_path / "probes.jsonl").read_text() == probes  # nothing was tried twice
    assert json.loads((tmp_path / "results.json").read_text()) == results
