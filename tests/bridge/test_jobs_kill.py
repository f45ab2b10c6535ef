"""Three SIGKILLs, the quick form of experiments/bridge_kill.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_three_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "experiments/bridge_kill.py"), "--kills", "3", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["kills"] == len(results["rounds"]) == 3
    assert results["requests"] > 1000
    assert results["faults"] == results["lost"] == results["duplicated"] == 0
