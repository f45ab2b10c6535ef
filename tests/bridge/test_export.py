"""Export: the same decisions as the policy, a manifest that says all, and a destination that is never half written."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ooco_gym
from ooco_gym.bridge.exports import export
from ooco_gym.bridge.exports.deployed import load_deployed
from ooco_gym.bridge.exports.export import Source, export_command, export_policy, parity, probes, source_from_folder
from ooco_gym.cluster.control import KNOB_COUNT, KNOB_NAMES, KNOBS, action_to_knobs
from ooco_gym.cluster.observation import OBSERVATION_NAMES, OBSERVATION_SIZE, observation_bounds
from ooco_gym.errors import OocoError
from ooco_gym.policy import NetworkPolicy, save_policy
from tests.bridge.exports import CONSTANT, export_of, network, random_observations, record

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def exported(tmp_path):
    return export_of("network", tmp_path / "export")


def fake_run(folder, policy, rows=({"policy": "net", "violation_rate": 0.01, "tbt_p99_s": float("nan")},)):
    """A training run's folder as train.py leaves it."""
    save_policy(policy, folder / "policy")
    (folder / "config.yaml").write_text(
        "seed: 7\nrole: demo\nadmitted_rate_scale: 0.5\nworkload:\n  name: azure-conv\n  rate_scale: auto\n"
    )
    results = {"role": "demo", "best_step": 512, "found_feasible": True, "rows": list(rows), "history": [{"step": 1}]}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


# The same decisions.


def test_a_network_decides_the_same_on_random_observations(exported):
    policy, deployed = network(), load_deployed(exported[0])
    observations = random_observations(1000)
    expected = np.stack([policy.action(row) for row in observations])
    alone = np.stack([deployed.action(row) for row in observations])
    assert np.abs(alone - expected).max() <= 1e-5
    assert np.abs(deployed.actions(observations) - expected).max() <= 1e-5
    assert alone.dtype == np.float32 and 0.2 < (np.abs(expected) < 1).mean() < 1  # clipped and unclipped ones
    for seed in range(50):
        telemetry = record(seed)
        assert deployed.decide(telemetry) == pytest.approx(policy.decide(telemetry), rel=1e-4, abs=1e-5)
    assert (deployed.name, deployed.rules) == (policy.name, policy.rules)


def test_a_constant_decides_the_same_bits(tmp_path):
    folder, manifest = export_of("constant", tmp_path / "export")
    deployed = load_deployed(folder)
    for seed in range(1000):
        assert deployed.decide(record(seed)).tolist() == CONSTANT.decide(record(seed)).tolist()
    assert (deployed.name, deployed.rules) == (CONSTANT.name, CONSTANT.rules)
    assert [path.name for path in folder.iterdir()] == ["manifest.json"], "a constant needs no network"
    assert manifest["parity"] == {"of": "knob", "largest_difference": 0.0, "accepted": 1e-5}
    assert manifest["settings"] == dict(zip(KNOB_NAMES, CONSTANT.vector.tolist(), strict=True))


@pytest.mark.slow
def test_a_trained_ppo_decides_as_it_does_in_torch(tmp_path):
    """The action of stable-baselines3 itself, not only of the arrays taken from it."""
    torch = pytest.importorskip("torch")
    ppo = pytest.importorskip("stable_baselines3").PPO
    gymnasium = pytest.importorskip("gymnasium")
    from agents.ppo import export as arrays_of

    low, high = observation_bounds()

    class Spaces(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(low, high, seed=0)
        action_space = gymnasium.spaces.Box(-1.0, 1.0, (KNOB_COUNT,))

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), float(action.sum()), False, False, {}

    model = ppo("MlpPolicy", Spaces(), n_steps=64, batch_size=32, seed=0, device="cpu", learning_rate=3e-3)
    model.learn(256)
    with torch.no_grad():
        model.policy.action_net.weight.mul_(10.0)  # far from its initial zeros
    deployed = load_deployed(export_policy(Source(arrays_of(model, "ppo", {})), tmp_path / "export"))
    observations = random_observations(1000)
    expected, _ = model.predict(observations, deterministic=True)
    actions = np.stack([deployed.action(row) for row in observations])
    assert np.abs(actions - expected).max() <= 1e-5
    assert np.count_nonzero(actions.std(axis=0) > 0.01) > KNOB_COUNT / 2  # some knobs may sit at an end of their range


def test_parity_looks_where_it_says():
    low, high = observation_bounds()
    observations = probes()
    assert observations.shape == (1256, OBSERVATION_SIZE) and observations.dtype == np.float32
    assert (observations >= low).all() and (observations <= high).all()
    corners = observations[1000:]
    assert ((corners == low) | (corners == high)).all()
    assert (corners == low).all(axis=1).any() and (corners == high).all(axis=1).any()


def test_an_export_that_differs_is_refused(exported):
    policy = network()
    weight, bias = policy.layers[-1]
    other = NetworkPolicy("net", [*policy.layers[:-1], (weight, bias + np.float32(2e-5))])
    with pytest.raises(OocoError, match=r"differs by 2\S*e-05, at most 1e-05"):
        parity(other, load_deployed(exported[0]))


def test_a_failed_comparison_leaves_the_destination_alone(tmp_path):
    """Weights of standard deviation 1 amplify float32 rounding beyond what is accepted."""
    before = (export_of("constant", tmp_path / "out")[0] / "manifest.json").read_bytes()
    with pytest.raises(OocoError, match="float32 rounding"):
        export_policy(Source(network(gain=8.0)), tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# The manifest.


def test_the_manifest_describes_the_network(exported):
    folder, manifest = exported
    content = (folder / "policy.onnx").read_bytes()
    assert manifest["network"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert manifest["network"]["bytes"] == len(content) and manifest["network"]["layers"] == [
        [44, 64],
        [64, 64],
        [64, 10],
    ]
    low, high = observation_bounds()
    entries = manifest["observation"]
    assert [entry["name"] for entry in entries] == list(OBSERVATION_NAMES)
    assert np.array([[entry["low"], entry["high"]] for entry in entries], np.float32).T.tolist() == [
        low.tolist(),
        high.tolist(),
    ]
    assert [(knob["name"], knob["low"], knob["high"], knob["log"], knob["ooco"]) for knob in manifest["knobs"]] == [
        (knob.name, knob.low, knob.high, knob.log, knob.ooco) for knob in KNOBS
    ]
    assert (manifest["kind"], manifest["name"]) == ("network", "net")
    assert manifest["package_version"] == ooco_gym.__version__ and manifest["rules"] == network().rules
    compared = manifest["parity"]
    assert compared["observations"] == 1256 and 0 < compared["largest_difference"] <= compared["accepted"] == 1e-5


def test_the_network_carries_nothing_of_the_machine_that_made_it(exported):
    content = (exported[0] / "policy.onnx").read_bytes()
    for trace in (b"site-packages", b"File ", str(ROOT).encode(), b"stack_trace"):
        assert trace not in content


def test_exporting_again_gives_the_same_bytes(exported, tmp_path):
    again = export_policy(Source(network(), {"seed": 0}), tmp_path / "again")
    for name in ("policy.onnx", "manifest.json"):
        assert (again / name).read_bytes() == (exported[0] / name).read_bytes()


def test_the_provenance_and_the_table_of_a_run(tmp_path):
    run = fake_run(tmp_path / "run-1", CONSTANT)
    for folder in (run, run / "policy"):
        manifest = json.loads(
            (export_policy(source_from_folder(folder), tmp_path / "out") / "manifest.json").read_text()
        )
        training = manifest["training"]
        assert (training["seed"], training["role"], training["admitted_rate_scale"]) == (7, "demo", 0.5)
        assert (training["workload"], training["run"]) == ("azure-conv", "run-1")
        assert training["config"]["workload"] == {"name": "azure-conv", "rate_scale": "auto"}
        assert manifest["evaluation"]["rows"] == [{"policy": "net", "violation_rate": 0.01, "tbt_p99_s": None}]
        assert manifest["evaluation"]["best_step"] == 512 and "history" not in manifest["evaluation"]


def test_a_run_that_was_stopped_before_its_table(tmp_path, capsys):
    (fake_run(tmp_path / "run", CONSTANT) / "results.json").unlink()
    assert export_command([str(tmp_path / "run"), f"out={tmp_path / 'out'}"]) == 0
    assert "no evaluation table" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["evaluation"] is None


def test_a_saved_policy_on_its_own(tmp_path):
    source = source_from_folder(save_policy(network(), tmp_path / "saved"))
    assert source.training == {"steps": 1000, "seed": 0} and source.evaluation is None


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("results.json", "{", "not JSON"),
        ("results.json", "[]", "an object is needed"),
        ("results.json", "{}", "has no rows"),
        ("config.yaml", "a: [", "not the config"),
        ("config.yaml", "- 1", "not the config"),
        ("policy/policy.json", "{}", "not a saved policy"),
    ],
)
def test_a_damaged_run_is_refused(tmp_path, name, content, named):
    run = fake_run(tmp_path / "run", CONSTANT)
    (run / name).write_text(content)
    with pytest.raises(OocoError, match=named) as caught:
        source_from_folder(run)
    assert name in str(caught.value) and "\n" not in str(caught.value)


# The destination.


def test_an_export_or_an_empty_folder_is_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export_policy(Source(CONSTANT), out)
    export_policy(Source(replace(CONSTANT, name="later")), out)
    assert load_deployed(out).name == "later"
    folder, _ = export_of("network", tmp_path / "network")
    export_policy(Source(CONSTANT), folder)
    assert [path.name for path in folder.iterdir()] == ["manifest.json"], "the network of the old policy is gone"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network", "out"]


def test_what_is_no_export_is_left_alone(tmp_path):
    mine = tmp_path / "mine"
    save_policy(CONSTANT, mine)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text('{"format": "another"}')
    added, _ = export_of("constant", tmp_path / "added")
    (added / "notes.txt").write_text("precious")
    for name, named in [("mine", "not an exported"), ("file", "a file"), ("foreign", "not an"), ("added", "notes.txt")]:
        before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
        with pytest.raises(OocoError, match=named):
            export_policy(Source(CONSTANT), tmp_path / name)
        assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_an_interrupted_export_leaves_the_old_one(tmp_path, monkeypatch):
    folder, manifest = export_of("constant", tmp_path / "out")

    def interrupted(source, target):
        (target / "manifest.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_policy(Source(network()), folder)
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_move_puts_the_old_one_back(tmp_path, monkeypatch):
    folder, manifest = export_of("constant", tmp_path / "out")
    rename, calls = os.rename, []

    def failing(old, new):
        calls.append(new)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="No space"):
        export_policy(Source(replace(CONSTANT, name="later")), folder)
    assert json.loads((folder / "manifest.json").read_text()) == manifest


# The command.


def test_a_baseline_by_name(tmp_path, capsys):
    assert export_command(["baseline=slack-ooco", f"out={tmp_path / 'out'}"]) == 0
    assert load_deployed(tmp_path / "out").name == "slack-ooco"
    assert "slack-ooco (constant)" in capsys.readouterr().out


def test_a_baseline_outside_a_checkout(tmp_path):
    code = (
        "import sys; from ooco_gym.bridge.exports.export import export_command; sys.exit(export_command(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.modules['baselines'] = None; {code}", "baseline=ooco"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "run this in the checkout" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["007", "null", "1e3", "a=b", "{x}"])
def test_a_folder_is_called_as_it_is_written(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    save_policy(CONSTANT, tmp_path / "run" / name)
    assert export_command([f"run/{name}", f"out={name}"]) == 0
    assert load_deployed(tmp_path / name).name == "patient"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["out={}/out"], "RUN_DIR, or baseline=NAME"),
        (["{}/a", "{}/b"], "one policy is needed"),
        (["{}/a", "baseline=ooco"], "one policy is needed"),
        (["{}/absent"], "not found"),
        (["baseline=oracle"], "unknown baseline 'oracle'"),
        (["baseline=ooco", "to=x"], "unknown setting 'to': known are out, baseline"),
        (["baseline=ooco", "out="], "out= is given no value"),
        (["baseline=ooco", "out={}/a", "out={}/b"], "out= is given twice"),
        (["baseline=[ooco"], "unknown baseline '[ooco'"),
        (["baseline=ooco", "out=/proc/none/out"], "/proc/none"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, capsys, arguments, named):
    assert export_command([argument.format(tmp_path) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and named in said, said


def test_help_teaches(capsys):
    assert export_command(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("RUN_DIR", "baseline=ooco", "out=", "policy.onnx", "1e-5"))
    assert export_command([]) == 2


@pytest.mark.slow
def test_a_real_run_is_exported(tmp_path):
    """train.py for a thousand steps, then its folder through the command."""
    run, out = tmp_path / "run", tmp_path / "out"
    short = (
        "episode_s=60 warmup_s=10 agent.total_steps=1024 agent.validation_episodes=2 evaluation.episodes=2 logger=none"
    )
    trained = subprocess.run(
        [sys.executable, "train.py", *short.split(), "agent.validate_every=1024", f"hydra.run.dir={run}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert trained.returncode == 0, trained.stderr
    assert export_command([str(run), f"out={out}"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["training"]["config"]["agent"]["total_steps"] == 1024
    assert (manifest["training"]["workload"], manifest["training"]["role"]) == ("azure-conv", "train")
    assert {row["policy"] for row in manifest["evaluation"]["rows"]} >= {"ooco", "ppo", "base-pd"}
    assert manifest["parity"]["largest_difference"] <= 1e-5
    saved, deployed = source_from_folder(run).policy, load_deployed(out)
    for seed in range(20):
        assert deployed.decide(record(seed)) == pytest.approx(saved.decide(record(seed)), rel=1e-4, abs=1e-5)


def test_the_program_in_the_documentation_runs_on_numpy_and_onnxruntime_alone(exported):
    """docs/export.md shows how to run an export without this package."""
    text = (ROOT / "docs" / "export.md").read_text()
    program = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "InferenceSession" in block)
    exported[0].rename(exported[0].parent / "policy")
    observation = random_observations(1)[0]
    zeros = 'np.zeros(len(manifest["observation"]), np.float32)'
    assert zeros in program
    program = program.replace(zeros, f"np.array({observation.tolist()}, np.float32)")
    hidden = ["ooco_gym", "torch", "gymnasium", "numba", "onnx", "scipy"]
    code = f"import sys\nfor name in {hidden}: sys.modules[name] = None\n{program}\nprint(knobs.tolist())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=exported[0].parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = action_to_knobs(network().action(observation))
    assert json.loads(done.stdout) == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
