"""An exported policy against the one in torch that it came from, and the time of a decision: part ``export``.

A small PPO run is trained, unless ``run`` names one, and exported by the command. What then decides runs in a process
that cannot import torch.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from bridge_bars import Bar, number
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from examples.live_cpu import servers
from examples.live_cpu.policies import prepare
from ooco_gym.cluster.observation import OBSERVATION_SIZE, observation_bounds
from ooco_gym.errors import OocoError
from ooco_gym.policy import NetworkPolicy, load_policy

DEFAULTS: dict[str, Any] = {
    "run": "",  # folder of a training run; empty: one is trained, about half a minute
    "observations": 1000,  # random, within the documented bounds
    "decisions": 5000,
    "seed": 1,
}
PARITY_BAR, DECISION_BAR_MS = 1e-5, 1.0
HIDDEN = ("torch", "stable_baselines3", "gymnasium", "onnx", "onnxscript")  # where the export decides
PROGRAM = Path(__file__).with_name("bridge_decisions.py")


def check(settings: Mapping[str, Any]) -> None:
    """Raise OocoError where ``run`` is no run of a network."""
    if not settings["run"]:
        return
    given, folder = Path(settings["run"]).resolve(), _folder(settings)
    if not isinstance(load_policy(given), NetworkPolicy):
        raise OocoError(f"run is '{settings['run']}', which holds a constant; a trained network is needed")
    if folder in (given, *given.parents):
        raise OocoError(f"run is '{settings['run']}', which lies in {folder}, where this part begins anew")


def run(settings: Mapping[str, Any], console: Console) -> tuple[dict[str, Any], list[Bar]]:
    """Train or take, export, compare, time; see the module's docstring."""
    folder = _folder(settings)
    given = Path(settings["run"]).resolve() if settings["run"] else folder / "trained"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with console.status("training and export") as status:
        _, exported = prepare(str(given) if settings["run"] else "trained", folder, console.print)
        policy = load_policy(given)
        assert isinstance(policy, NetworkPolicy)
        status.update("decisions in torch and without it")
        results = compare(given, exported, settings, folder / "observations.npz")
    results |= {"policy": policy.name, "steps": policy.provenance.get("steps")}
    console.print(table(results))
    if results["action_spread"] < 0.01:
        console.print("[yellow]this policy hardly looks at what it observes[/yellow]: parity says little of others")
    return results, [
        Bar(f"action against torch, {results['observations']:,} observations", results["action_difference"],
            PARITY_BAR),
        Bar("knob against torch, share of its range", results["knob_difference"], PARITY_BAR),
        Bar(f"decision, 99th percentile of {results['decisions']:,}", results["wall_ms"]["p99"], DECISION_BAR_MS, "ms"),
    ]  # fmt: skip


def _folder(settings: Mapping[str, Any]) -> Path:
    return (Path(settings["out"]) / "export").resolve()


def compare(given: Path, exported: str, settings: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The policy of a run in torch, its export without: what bridge_decisions.py prints."""
    low, high = observation_bounds()
    rng = np.random.default_rng(settings["seed"])
    observations = rng.uniform(low, high, (settings["observations"], OBSERVATION_SIZE)).astype(np.float32)
    np.savez(file, observations=observations, decisions=settings["decisions"])
    _child(file.parent, "torch", str(given), str(file))
    _child(file.parent, "export", exported, str(file), hidden=HIDDEN)
    found: dict[str, Any] = json.loads(file.with_suffix(".json").read_text())
    if found.pop("torch_is_there"):
        raise OocoError("export: torch could be imported where the export decided")
    return found | {"not_importable": HIDDEN}


def _child(folder: Path, *arguments: str, hidden: tuple[str, ...] = ()) -> None:
    """Run bridge_decisions.py; importing a hidden module raises ImportError there."""
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({hidden})); "
    code += f"runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    name = f"decisions-{arguments[0]}"
    child = servers.spawn(name, [sys.executable, "-c", code, *arguments], 0, folder / f"{name}.log", {}, folder)
    try:
        if child.process.wait():
            raise OocoError(f"{name} failed: {child.last_words()}")
    finally:
        child.stop()


def table(results: Mapping[str, Any]) -> Table:
    """Differences and times."""
    steps = f" after {results['steps']:,} steps" if results["steps"] is not None else ""
    title = f"export of {results['policy']}{steps}: onnxruntime, torch not importable"
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "median", "99 %", "largest"):
        shown.add_column(column, justify="right" if column else "left")
    shown.add_row(f"action, difference over {results['observations']:,}", "", "", number(results["action_difference"]))
    shown.add_row("knob, difference as a share of its range", "", "", number(results["knob_difference"]))
    for name, what in (("wall_ms", f"whole decision, ms, of {results['decisions']:,}"), ("cpu_ms", "  its CPU time")):
        shown.add_row(what, *(number(results[name][key]) for key in ("median", "p99", "max")))
    return shown
