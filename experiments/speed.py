"""How fast the compiled cluster is: one core, compilation left out, the calibrated preset of Qwen2.5-7B on A100.

    python experiments/speed.py                     every case whose trace is there; a few minutes
    python experiments/speed.py --cases a0 a1       some of them
    python experiments/speed.py --growth            how cost grows with instances and with load
    python experiments/speed.py --dynosim           beside DynoSim on the same requests (sets up its own environment)

Each case runs in a process of its own, `--repeats` times after one run that is not counted; the tables show medians.
The simulator's cases and `vec` are held to one core. An *iteration* is what an engine would execute; *executed* are the
events of the simulator, of which a run of unchanged decode iterations is one. A *step* is one control interval of one
environment. results.json goes to `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ooco_gym import presets
from ooco_gym.cluster import Simulator
from ooco_gym.cluster.control import knobs_from_mapping, ooco_action
from ooco_gym.envs import ClusterVectorEnv
from ooco_gym.errors import OocoError
from ooco_gym.scenario import Scenario, build_scenario
from ooco_gym.workload import Requests
from ooco_gym.workload.build import online_source
from ooco_gym.workload.sources import TraceSource

CONVERSATION, DAY = "azure-conv-2023", "servegen-deepseek-r1"


def whole_trace(name: str, data_dir: str | None) -> Requests:
    """A recorded trace from its first arrival to its last; a day comes in two files."""
    settings = presets.load("workload", name)
    files = [settings["file"]]
    if name == DAY:
        files.append(files[0].replace("h00-12", "h12-24"))
    parts = []
    for position, file in enumerate(files):
        source = online_source({**settings, "file": file, "rate_scale": 1.0}, data_dir)
        assert isinstance(source, TraceSource)
        parts.append((source.requests, 12 * 3600.0 * position))
    columns = ("prompt_tokens", "output_tokens")
    arrival_s = np.concatenate([part.arrival_s + shift_s for part, shift_s in parts])
    return Requests(arrival_s, *(np.concatenate([getattr(part, name) for part, _ in parts]) for name in columns))


def case(
    trace: str, pool: int, load: float = 1.0, offline: bool = False, **knobs: float
) -> Callable[[str | None], tuple[Scenario, dict[str, float]]]:
    """A whole trace at ``load`` times its rate on ``pool`` relaxed and as many strict instances, under OOCO."""

    def build(data_dir: str | None) -> tuple[Scenario, dict[str, float]]:
        requests = whole_trace(trace, data_dir)
        base = build_scenario(
            {"cluster": {"relaxed": pool, "strict": pool}, "offline": "sharegpt-8k" if offline else "none"}
        )
        online = TraceSource(trace, requests, "test", load)
        seconds = requests.duration_s / load * (1 - 1e-9)
        return replace(base, online=online, warmup_s=0.0, episode_s=seconds), knobs

    return build


CASES = {
    "a0": ("azure-conv-2023 on 2+2, online only", case(CONVERSATION, 2)),
    "a1": ("the same beside an endless offline backlog", case(CONVERSATION, 2, offline=True)),
    "a2": ("the same with strict_prefill 1024", case(CONVERSATION, 2, offline=True, strict_prefill=1024)),
    "b": ("4 x the load on 8+8", case(CONVERSATION, 8, 4.0, offline=True)),
    "c32": ("16 x the load on 32+32", case(CONVERSATION, 32, 16.0, offline=True)),
    "c64": ("16 x the load on 64+64", case(CONVERSATION, 64, 16.0, offline=True)),
    "d": ("a day of servegen-deepseek-r1 on 16+16, online only", case(DAY, 16)),
}


#: How cost grows: the same load per instance on ever more instances, and ever more load on the same sixteen.
GROWTH = {
    **{f"n{2 * pool}": (f"{pool}+{pool}, {pool / 2:g} x the load", case(CONVERSATION, pool, pool / 2, offline=True))
       for pool in (1, 2, 4, 8, 16, 32, 64)},
    **{f"l{load:g}": (f"8+8, {load:g} x the load", case(CONVERSATION, 8, load, offline=True))
       for load in (0.5, 1.0, 2.0, 4.0, 6.0)},
}  # fmt: skip


def one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def measure(name: str, data_dir: str | None, repeats: int) -> dict[str, Any]:
    """One case of the simulator in this process."""
    one_core()
    scenario, knobs = {**CASES, **GROWTH}[name][1](data_dir)
    before_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = []
    for repeat in range(repeats + 1):
        simulator = Simulator(scenario, seed=0)
        simulator.set_knobs(knobs_from_mapping(knobs))
        if repeat == 0:
            simulator.run(1e-3)  # compiles, or loads what was compiled
        started_s = time.process_time()
        simulator.run(scenario.horizon_s)
        seconds.append(time.process_time() - started_s)
    world, cpu_s = simulator.cluster.world[0], median(seconds[1:])
    requests = int(world["online_finished"]) + int(world["offline_finished"])
    return {
        "what": {**CASES, **GROWTH}[name][0],
        "cpu_s": cpu_s,
        "cpu_s_of_each": seconds[1:],
        "requests": requests,
        "online_requests": len(simulator.cluster.online),
        "iterations_per_cpu_s": int(world["iterations"]) / cpu_s,
        "executed_iterations_per_cpu_s": int(world["events"]) / cpu_s,
        "requests_per_cpu_s": requests / cpu_s,
        "output_tokens_per_iteration": _output_tokens(simulator) / int(world["iterations"]),
        "simulated_s_per_cpu_s": scenario.horizon_s / cpu_s,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_mib_before_the_episode": before_mib,
    }


def _output_tokens(simulator: Simulator) -> int:
    """Tokens that iterations emitted: the mean over iterations is the mean batch, but for what was cut off."""
    cluster = simulator.cluster
    finished = cluster.online["finish_s"] < np.inf
    return int(cluster.online["output"][finished].sum() + cluster.world[0]["credited_output_tokens"])


def measure_vec(repeats: int) -> dict[str, Any]:
    """The native vector environment under OOCO's action: control steps per second of one core."""
    one_core()
    environments = ClusterVectorEnv(64, threads=1)
    actions = np.tile(ooco_action(), (64, 1))
    environments.reset(seed=0)
    seconds = []
    for _ in range(repeats + 1):
        started_s = time.process_time()
        for _ in range(100):
            environments.step(actions)
        seconds.append(time.process_time() - started_s)
    return {"steps_per_cpu_s": 6400 / median(seconds[1:]), "steps_per_cpu_s_of_each": [6400 / s for s in seconds[1:]]}


def measure_ppo(repeats: int) -> dict[str, Any]:
    """PPO of stable-baselines3 end to end on all cores, from a random policy: environment steps per second."""
    import torch
    from stable_baselines3 import PPO

    from agents.vec_env import Sb3VecEnv

    torch.set_num_threads(1)
    environments = Sb3VecEnv(ClusterVectorEnv(64, autoreset_mode="SameStep"))
    model = PPO("MlpPolicy", environments, n_steps=128, batch_size=2048, n_epochs=4, seed=0, device="cpu",
                policy_kwargs={"net_arch": [64, 64]})  # fmt: skip
    steps, rates, cpu_s = 3 * 64 * 128, [], []
    for _ in range(repeats + 1):
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        model.learn(steps, reset_num_timesteps=False)
        rates.append(steps / (time.perf_counter() - started_s))
        cpu_s.append(steps / (time.process_time() - started_cpu_s))
    return {"steps_per_s": median(rates[1:]), "steps_per_s_of_each": rates[1:], "steps_per_cpu_s": median(cpu_s[1:])}


LEARNING = {
    "vec": ("native vector environment, 64 x 2+2 instances, 1 s interval, ooco, one core", measure_vec),
    "ppo": ("PPO end to end on it, n_steps 128, batch 2048, 4 epochs, 64x64, all cores", measure_ppo),
}

_DYNOSIM = """
import json, sys, time
from pathlib import Path
from dynamo.replay.api import run_trace_replay
seconds = []
for _ in range(int(sys.argv[2]) + 1):
    started = time.process_time()
    done = run_trace_replay([Path(sys.argv[1])], num_workers=4, replay_mode="offline", router_mode="round_robin",
                            trace_block_size=512)["completed_requests"]
    seconds.append(time.process_time() - started)
print(json.dumps({"completed": done, "seconds": seconds[1:]}))
"""


def measure_dynosim(folder: Path, data_dir: str | None, repeats: int, console: Console) -> dict[str, Any]:
    """NVIDIA's DynoSim (Rust) on the requests of a0: four workers, round robin, no block shared between requests."""
    python = folder / "dynosim" / "bin" / "python"
    if not python.is_file():
        with console.status("setting up DynoSim in an environment of its own (60 MB)"):
            subprocess.run([sys.executable, "-m", "venv", str(folder / "dynosim")], check=True)
            packages = ["ai-dynamo==1.4.0", "ai-dynamo-runtime==1.4.0"]
            subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
    requests = whole_trace(CONVERSATION, data_dir)
    trace = folder / "dynosim-trace.jsonl"
    with trace.open("w", encoding="utf-8") as file:
        rows = zip(requests.arrival_s, requests.prompt_tokens.tolist(), requests.output_tokens.tolist(), strict=True)
        for row, (arrival_s, prompt, output) in enumerate(rows):
            blocks = [row * 1000 + block for block in range(-(-prompt // 512))]
            line = {"timestamp": arrival_s * 1e3, "input_length": prompt, "output_length": output, "hash_ids": blocks}
            file.write(json.dumps(line) + "\n")
    command = [str(python), "-c", _DYNOSIM, str(trace), str(repeats)]
    if hasattr(os, "sched_setaffinity"):
        command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), *command]
    with console.status("DynoSim"):
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    trace.unlink()
    cpu_s = median(found["seconds"])
    return {"cpu_s": cpu_s, "requests": found["completed"], "requests_per_cpu_s": found["completed"] / cpu_s}


def run_case(name: str, arguments: argparse.Namespace, console: Console) -> dict[str, Any] | None:
    """One case in a process of its own; None, said why, where its traces are not at hand."""
    command = [sys.executable, __file__, "--one", name, "--repeats", str(arguments.repeats)]
    if arguments.data_dir:
        command += ["--data-dir", arguments.data_dir]
    with console.status(f"{name}: {ALL[name][0]}"):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    if done.returncode == 3:
        console.print(f"{name}: left out, {done.stderr.strip().splitlines()[-1]}")
        return None
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _environment() -> dict[str, str]:
    """A child finds the packages beside this folder."""
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def prepared(folder: Path) -> Path:
    """The folder for results.json, made before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json.part").touch()
    except OSError as error:
        sys.exit(f"--out {folder}: {error.strerror or error}; a folder that can be written to is needed")
    return folder


def print_steps(results: dict[str, dict[str, Any]], console: Console) -> None:
    for name, row in results.items():
        rate = "steps_per_s" if "steps_per_s" in row else "steps_per_cpu_s"
        each = row[f"{rate}_of_each"]
        unit = "second" if rate == "steps_per_s" else "CPU second"
        console.print(
            f"{name}: [bold]{row[rate]:,.0f}[/bold] steps per {unit} ({min(each):,.0f} to {max(each):,.0f}); "
            f"{LEARNING[name][0]}"
        )


def print_table(results: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(title="per CPU second, one core", title_justify="left", box=SIMPLE_HEAD)
    headings = ("case", "iterations", "executed", "ns/iter.", "tokens/iter.", "requests", "simulated s", "CPU s", "MiB")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['iterations_per_cpu_s'] / 1e6:.2f} M",
            f"{row['executed_iterations_per_cpu_s'] / 1e6:.2f} M",
            f"{1e9 / row['iterations_per_cpu_s']:.0f}",
            f"{row['output_tokens_per_iteration']:.0f}",
            f"{row['requests_per_cpu_s']:,.0f}",
            f"{row['simulated_s_per_cpu_s']:,.0f}",
            f"{row['cpu_s']:.3f}",
            f"{row['peak_mib']:.0f}",
        )
    console.print(table)
    for name, row in results.items():
        console.print(f"  {name}: {row['what']}")


ALL: dict[str, tuple[str, Any]] = {**CASES, **GROWTH, **LEARNING}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    standard = {**CASES, **LEARNING}
    parser.add_argument("--cases", nargs="+", choices=ALL, metavar="CASE",
                        help="; ".join(f"{name}: {what}" for name, (what, _) in standard.items()))  # fmt: skip
    parser.add_argument("--growth", action="store_true", help="the growth cases instead: " + ", ".join(GROWTH))
    parser.add_argument("--repeats", type=int, default=5, help="counted runs per case (default 5)")
    parser.add_argument("--data-dir", help="folder of real traces; otherwise OOCO_DATA, otherwise ../shared/data")
    parser.add_argument(
        "--dynosim",
        action="store_true",
        help="run DynoSim on a0's requests, too; "
        "needs the package index and installs 60 MB into a virtual environment under --out",
    )
    parser.add_argument("--out", type=Path, help="folder of results.json (default runs/speed, or runs/growth)")
    parser.add_argument("--one", choices=ALL, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats is {arguments.repeats}, at least 1 is needed")
    if arguments.one:
        try:
            learning = arguments.one in LEARNING
            print(
                json.dumps(
                    LEARNING[arguments.one][1](arguments.repeats)
                    if learning
                    else measure(arguments.one, arguments.data_dir, arguments.repeats)
                )
            )
        except OocoError as error:
            print(error, file=sys.stderr)
            sys.exit(3)
        return
    if arguments.growth and (arguments.cases or arguments.dynosim):
        parser.error("--growth has cases of its own, without --cases and --dynosim")
    cases = list(GROWTH) if arguments.growth else arguments.cases or list(standard)
    if arguments.dynosim and "a0" not in cases:
        parser.error("--dynosim is compared with a0, which is not among --cases")
    console = Console() if sys.stdout.isatty() else Console(width=120)
    folder = prepared(arguments.out or Path("runs/growth" if arguments.growth else "runs/speed"))
    found: dict[str, Any] = {}
    interrupted = False
    try:
        Simulator(build_scenario(), seed=0).run(1e-3)  # compiles, if that has to be, where it can be seen
        for name in cases:
            found[name] = run_case(name, arguments, console)
    except KeyboardInterrupt:
        interrupted = True
    results = {name: row for name, row in found.items() if row is not None and name not in LEARNING}
    steps = {name: row for name, row in found.items() if row is not None and name in LEARNING}
    if not results and not steps:
        sys.exit("interrupted before anything was measured" if interrupted else "nothing was measured")
    if results:
        print_table(results, console)
    print_steps(steps, console)
    output: dict[str, Any] = {"cases": results, "steps": steps, "repeats": arguments.repeats}
    if arguments.dynosim and "a0" in results and not interrupted:
        dynosim = measure_dynosim(folder, arguments.data_dir, arguments.repeats, console)
        ratio = results["a0"]["online_requests"] / results["a0"]["cpu_s"] / dynosim["requests_per_cpu_s"]
        output |= {"dynosim_requests_per_cpu_s": dynosim["requests_per_cpu_s"], "a0_over_dynosim": ratio}
        console.print(f"DynoSim: {dynosim['requests_per_cpu_s']:,.0f} requests per CPU s; a0 is {ratio:.0f} x as fast")
    staged = folder / "results.json.part"
    staged.write_text(json.dumps(output, indent=2), encoding="utf-8")
    staged.replace(folder / "results.json")
    console.print(f"{'interrupted, kept what was measured; ' if interrupted else ''}results.json: {folder}")
    sys.exit(130 if interrupted else 0)


if __name__ == "__main__":
    main()
