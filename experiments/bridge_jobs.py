"""SIGKILLs of the whole gateway while it works on batches: part ``kills`` of bridge_bench.py.

The same account as in ``bridge_kill.py``, with the gateway itself under test: store, Batch API, scheduler and control
loop, over two fake vLLM instances whose answer is a function of the request, so that every delivered line can be
checked.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge_bars import Bar
from bridge_kill import run as kill_and_account
from bridge_kill import show
from bridge_upstream import fake_vllm
from rich.console import Console

from examples.live_cpu import servers

DEFAULTS: dict[str, Any] = {"kills": 20, "seed": 1, "mean_ms": 20.0}  # mean_ms: of a request on a fake instance


def run(settings: Mapping[str, Any], console: Console) -> tuple[dict[str, Any], list[Bar]]:
    """Kill the gateway ``kills`` times and account for every request."""
    folder = (Path(settings["out"]) / "kills").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mean_ms = settings["mean_ms"]
    with fake_vllm("relaxed", folder, mean_ms) as relaxed, fake_vllm("strict", folder, mean_ms) as strict:
        config = servers.write_cluster(folder / "cluster.yaml", [(relaxed, "relaxed"), (strict, "strict")], {})
        words = [sys.executable, "-m", "ooco_gym.bridge", "serve", f"config={config}", "policy=ooco"]
        command = f"{shlex.join(words)} jobs={{store}} listen.port={{port}}"
        results = kill_and_account(settings["kills"], settings["seed"], command, "stub", folder, console)
    show(results, console)
    others = results["faults"] - results["lost"] - results["duplicated"]
    return {**results, "command": "python -m ooco_gym.bridge serve"}, [
        Bar(f"results lost in {results['kills']} kills, of {results['requests']:,}", results["lost"], 0),
        Bar("results delivered twice", results["duplicated"], 0),
        Bar("other faults: wrong, foreign, not accepted, forgotten", others, 0),
    ]
