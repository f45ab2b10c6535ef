"""From what `--policies` names to what the gateway loads: baselines and trained policies become export folders."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from examples.live_cpu.servers import ROOT, ServerError

#: A policy small enough for an example: half a minute of PPO on one relaxed and one strict simulated instance.
TRAINING = ["agent=ppo", "agent.total_steps=40000", "agent.validate_every=20000", "evaluation.episodes=4",
            "cluster=2x2", "cluster.relaxed=1", "cluster.strict=1", "logger=none"]  # fmt: skip


def prepare(name: str, work: Path, say: Callable[[str], None]) -> tuple[str, str]:
    """(name in the table, what `serve policy=` takes); raises ServerError where a command fails."""
    if name == "ooco":
        return name, name
    folder = Path(name)
    if folder.is_dir():
        if (folder / "manifest.json").is_file():
            return folder.resolve().name, str(folder.resolve())
        return folder.resolve().name, _export(str(folder.resolve()), work / "policies" / folder.resolve().name)
    if name == "trained":
        run = work / "trained"
        if not (run / "policy" / "policy.json").is_file():
            say("training a small policy in simulation, once: about a minute")
            _command([str(ROOT / "train.py"), *TRAINING, f"hydra.run.dir={run}"], "training", work / "train.log")
        return name, _export(str(run), work / "policies" / name)
    return name, _export(f"baseline={name}", work / "policies" / name)


def _export(source: str, out: Path) -> str:
    _command(
        ["-m", "ooco_gym.bridge", "export", source, f"out={out}"], f"export of {source}", out.parent / "export.log"
    )
    return str(out)


def _command(arguments: Sequence[str], what: str, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    with log.open("w") as output:
        environment = {**os.environ, "PYTHONPATH": path, "WANDB_MODE": "offline"}
        done = subprocess.run(
            [sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise ServerError(f"{what} failed: {lines[-1] if lines else 'no message'} (log: {log})")
