"""The main job and compare.py from end to end, as a user runs them, on a small window of a real trace.

Each test starts Python, Hydra and torch, once or many times: all are slow.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ooco_gym.errors import OocoError
from ooco_gym.policy import NetworkPolicy, load_policy
from ooco_gym.workload import find_data

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
WINDOW = "workload.window=[0,600]"
SHORT = ["episode_s=60", "warmup_s=10"]
SMALL = [*SHORT, "agent.total_steps=2048", "agent.validate_every=1024", "agent.validation_episodes=2"]
METRICS = (
    "violation_rate ttft_p50_s ttft_p99_s tpot_p50_s tpot_p99_s tbt_p99_s offline_output_tokens_per_s "
    "offline_requests_per_s wasted_fraction"
).split()


@pytest.fixture(scope="module")
def trace():
    try:
        return find_data("azure-conv-2023.csv.gz")
    except OocoError as error:
        pytest.skip(str(error))


def command(script, *arguments, folder=None):
    where = [f"hydra.run.dir={folder}"] if folder else []
    return [sys.executable, str(ROOT / script), *arguments, *where]


def run(script, *arguments, folder=None):
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_API_KEY"}
    return subprocess.run(
        command(script, *arguments, folder=folder), cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def trained(trace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "train"
    done = run("train.py", "workload=azure-conv-2023", WINDOW, *SMALL, "evaluation.episodes=3", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_main_job_on_a_real_window(trained):
    folder, printed = trained
    results = json.loads((folder / "results.json").read_text())
    assert [row["policy"] for row in results["rows"]] == [
        "no-offline",
        "base-pd",
        "online-priority",
        "ooco",
        "ppo-untrained",
        "ppo",
    ]
    assert results["role"] == "demo" and "role=demo" in printed  # the trace is not training data
    assert all(row["policy"] in printed for row in results["rows"])
    by_name = {row["policy"]: row for row in results["rows"]}
    assert by_name["no-offline"]["offline_output_tokens_per_s"] == 0
    assert by_name["ooco"]["offline_output_tokens_per_s"] > 0
    for name in METRICS[:-1]:  # the untrained policy is OOCO, but for the second it takes to be asked
        assert by_name["ppo-untrained"][name] == pytest.approx(by_name["ooco"][name], rel=0.05, abs=1e-3)
    assert {entry["step"] for entry in results["history"] if "train/reward" in entry} == {1024, 2048}
    for figure in ("comparison", "learning", "knobs"):
        assert (folder / "figures" / f"{figure}.png").stat().st_size > 10_000
    assert "admitted_rate_scale" in (folder / "config.yaml").read_text()
    assert list((folder / "wandb").glob("offline-run-*")), "W&B works without an account"


def test_a_trained_policy_loads_and_compares(trained, tmp_path):
    folder, _ = trained
    policy = load_policy(folder / "policy")
    assert isinstance(policy, NetworkPolicy)
    done = run(
        "experiments/compare.py",
        "workloads=[azure-conv-2023]",
        f"policies=[ooco,{folder / 'policy'},{{baseline: ooco, name: patient, knobs: {{preempt_slack: 0.8}}}}]",
        "loads=[0.5,1.0]",
        "seeds=3",
        *SHORT,
        folder=tmp_path / "compare",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "compare" / "results.json").read_text())["rows"]
    assert [(row["policy"], row["load"]) for row in rows] == [
        (name, load) for load in (0.5, 1.0) for name in ("ooco", policy.name, "patient")
    ]
    for row in rows:
        assert row["seeds"] == 3 and row["workload"] == "azure-conv-2023" and isinstance(row["feasible"], bool)
        for metric in METRICS:
            low, high = row[f"{metric}_ci95"]
            assert low <= row[metric] <= high and np.isfinite([low, high]).all()
    assert (tmp_path / "compare" / "comparison.png").stat().st_size > 10_000


def test_a_trace_and_two_runs_of_ones_own(trained, tmp_path):
    folder, _ = trained
    trace = tmp_path / "mine.csv"
    rows = "\n".join(f"{second},{200 + second % 7},{20 + second % 5}" for second in range(300))
    trace.write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}\n")
    policies = f"policies=[{{policy: {folder}, name: a}},{{policy: {folder}, name: b}}]"
    compared = tmp_path / "compare"
    done = run("experiments/compare.py", f"workloads=[{trace}]", policies, "seeds=2", *SHORT, folder=compared)
    assert done.returncode == 0, done.stderr
    a, b = json.loads((compared / "results.json").read_text())["rows"]
    assert (a["policy"], b["policy"], a["workload"]) == ("a", "b", "mine")
    assert a["online_requests"] > 50 and a["violation_rate"] == b["violation_rate"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = run("experiments/compare.py", folder=blocked / "run")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "hydra.run.dir" in done.stderr


def test_ctrl_c_keeps_the_policy_and_prints_the_table(tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        command(
            "train.py",
            *SHORT,
            "agent.total_steps=100000000",
            "agent.validation_episodes=2",
            "evaluation.episodes=2",
            "logger=none",
            folder=folder,
        ),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background shells ignore it for children
    )
    patience = time.monotonic() + 240
    while not (folder / "checkpoints" / "latest.zip").is_file():
        assert process.poll() is None and time.monotonic() < patience
        time.sleep(0.2)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    printed, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint
    assert "interrupted" in printed and "ppo" in printed
    assert json.loads((folder / "results.json").read_text())["interrupted"] is True
    load_policy(folder / "policy")


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        ("train.py", ["hardware=abacus"], ["unknown hardware 'abacus'", "a100", "h100"]),
        ("train.py", ["agent=oracle"], ["unknown agent 'oracle'", "ppo"]),
        ("train.py", ["evaluation.baselines=[oracle]"], ["unknown baseline 'oracle'", "ooco"]),
        ("train.py", ["model=qwen2.5-72b"], ["does not fit", "tensor_parallel"]),
        ("train.py", ["nonsense=1"], ["nonsense"]),
        ("train.py", ["workload=csv"], ["file is missing"]),
        ("train.py", ["workload=csv", "workload.file=absent.csv"], ["absent.csv", "OOCO_DATA"]),
        ("train.py", ["workload.rate_scale=50", "episode_s=60"], ["admission rule", "largest scale that passes"]),
        ("train.py", ["agent.n_steps=few", "logger=none", *SHORT], ["agent.n_steps", "few"]),
        (
            "experiments/compare.py",
            ["policies=[{baseline: ooco, knobs: {preempt_slack: 9}}]"],
            ["preempt_slack", "1.5"],
        ),
        ("experiments/compare.py", ["policies=[runs/absent/policy]"], ["runs/absent/policy", "policy.json"]),
        ("experiments/compare.py", ["workloads=[absent]"], ["unknown workload 'absent'", "azure-conv"]),
        ("experiments/compare.py", ["seeds=0"], ["seeds is 0", "at least 1"]),
        ("experiments/compare.py", ["seeds=few"], ["seeds is 'few'", "whole number"]),
        ("experiments/compare.py", ["loads=[-1]"], ["-1", "positive"]),
        ("experiments/compare.py", ["workloads=azure-conv"], ["workloads is 'azure-conv'", "workloads=[...]"]),
        ("experiments/compare.py", ["policies=[]"], ["policies is []", "at least one"]),
        ("experiments/compare.py", ["policies=[ooco,ooco]"], ["two are called 'ooco'", "{policy: FOLDER, name: ANOTH"]),
        ("experiments/compare.py", ["control_interval_s=0"], ["control_interval_s is 0", "positive"]),
        ("experiments/compare.py", ["episode_s=1e9"], ["requests in an episode", "at most"]),
        ("train.py", ["evaluation.episodes=0"], ["evaluation.episodes is 0", "at least 1"]),
        ("train.py", ["seed=-1"], ["seed is -1", "at least 0"]),
        ("train.py", ["agent.gamma=2"], ["agent.gamma is 2", "0 to 1"]),
        ("train.py", ["agent.hidden=[0]"], ["agent.hidden is [0]", "at least 1"]),
        ("train.py", ["reward.price=-1"], ["reward.price is -1", "at least 0"]),
        ("train.py", ["reward.price=dear"], ["reward.price is 'dear'", "number"]),
        ("train.py", ["model.hf_config=absent.json"], ["absent.json", "config.json"]),
    ],
)
def test_a_mistake_is_one_sentence_and_a_failing_status(script, arguments, named, tmp_path):
    done = run(script, *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for part in named:
        assert part in done.stderr


@pytest.mark.parametrize("script", ["train.py", "experiments/compare.py"])
def test_help_teaches(script):
    done = run(script, "--help")
    assert done.returncode == 0
    for part in ("python " + script, "hardware", "a100", "azure-co", "Ctrl-C"):
        assert part in done.stdout
