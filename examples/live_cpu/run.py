"""Two real vLLM servers, a gateway, and the policies that scheduled them in simulation, on a machine without a GPU.

    python examples/live_cpu/run.py                                       base-pd, ooco and a policy trained here
    python examples/live_cpu/run.py --policies ooco runs/MY_RUN --seconds 120
    python examples/live_cpu/run.py --workload azure-code --rate 1.5 --offline arxiv-summarization

In order: vLLM is installed into .venv-vllm beside this file (once, one to three minutes), a tiny random model is made,
one relaxed and one strict vLLM server start on loopback and are measured: lone requests give what the gateway predicts
with, and a replay of the online work alone gives the objectives, twice the TTFT and TPOT that 99 % of it stay within.
Both are written to cluster.yaml. Then, policy by policy, a gateway (`python -m ooco_gym.bridge serve`) starts in front
of the same servers, the same slice of the workload is replayed, online requests as streams and offline ones as a job of
the Batch API, and one row of the table of experiments/compare.py is counted. The logs, cluster.yaml, every decision and
results.json are in --work. Ctrl-C stops everything.

What it shows is the machinery with real engines. Each server has its share of the cores for itself, but the gateway and
the clients run on the same ones, so the figures are of this machine and this minute.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.live_cpu import deployment, replay, servers
from examples.live_cpu.policies import prepare
from examples.live_cpu.servers import Engine, Server, ServerError
from examples.live_cpu.setup_vllm import SetupError, ensure_vllm
from ooco_gym import presets
from ooco_gym.errors import OocoError
from ooco_gym.evaluation.report import comparison_table, write_json
from ooco_gym.scenario import Scenario, build_scenario
from ooco_gym.workload import offline_work, online_source

HERE = Path(__file__).resolve().parent
WIDTH = 95  # of the table: the columns of compare.py without those that cannot be seen from outside, without intervals
ENGINE = Engine(max_seqs=8)
MARGIN = 2.0  # objectives over the 99th percentile of online work alone
ALONE = "no-offline"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--policies",
        nargs="+",
        default=["base-pd", "ooco", "trained"],
        metavar="POLICY",
        help="baselines, folders of training runs or exports, or `trained`: a small one trained here",
    )
    parser.add_argument(
        "--workload",
        default="azure-conv",
        help="name in conf/workload, synthetic or a real trace (azure-conv)",
    )
    parser.add_argument("--offline", default="sharegpt-8k", help="name in conf/offline, for the lengths (sharegpt-8k)")
    parser.add_argument("--seconds", type=float, default=45.0, help="of the slice (45)")
    parser.add_argument("--rate", type=float, default=1.5, help="online requests per second (1.5)")
    parser.add_argument(
        "--length-scale", type=float, default=0.2, help="on all lengths, for a context of 4,096 tokens (0.2)"
    )
    parser.add_argument("--jobs", type=int, default=3000, help="offline requests in the batch (3000)")
    parser.add_argument("--seed", type=int, default=0, help="of the slice (0)")
    parser.add_argument(
        "--work", type=Path, default=HERE / "work", help="folder for model, logs and results (examples/live_cpu/work)"
    )
    given = parser.parse_args()
    for name in ("seconds", "rate", "length_scale", "jobs"):
        if not 0 < getattr(given, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {getattr(given, name)}, a positive number is needed")
    return given


def one_policy(
    given: argparse.Namespace,
    config: Path,
    source: str,
    name: str,
    pair: Mapping[str, Server],
    world: tuple[replay.Slice, Scenario],
    console: Console,
) -> dict[str, Any]:
    """A fresh gateway with a fresh job store, one replay, and the engines idle again."""
    store = given.work / f"jobs-{name}"
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir(parents=True)
    decisions, log = given.work / f"decisions-{name}.jsonl", given.work / "logs" / f"gateway-{name}.log"
    for old in (decisions, log):
        old.unlink(missing_ok=True)
    overrides = [f"jobs={store / 'jobs.db'}", f"decision_log={decisions}"]
    with (
        servers.gateway(config, source, log, overrides) as front,
        Progress(console=console, transient=True) as progress,
    ):
        task = progress.add_task(name, total=given.seconds)
        row, seen = replay.replay(front, *world, lambda passed: progress.update(task, completed=passed))
        write_json(given.work / f"online-{name}.json", [asdict(one) for one in seen])
    end = time.monotonic() + 60.0
    while any(server.load() != (0, 0) for server in pair.values()):
        if time.monotonic() > end:
            raise ServerError("the engines still work a minute after the gateway has stopped")
        time.sleep(0.2)
    return {"policy": name, **row, **{f"{metric}_ci95": [value, value] for metric, value in row.items()}}


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end like Ctrl-C: every server is stopped
    given = arguments()
    given.work = given.work.resolve()
    console = Console() if sys.stdout.isatty() else Console(width=120)
    rows: list[dict[str, Any]] = []
    try:
        run(given, console, rows)
    except (OocoError, SetupError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: every server is stopped", file=sys.stderr)
        return 130
    return 0


def run(given: argparse.Namespace, console: Console, rows: list[dict[str, Any]]) -> None:
    """The whole example; ``rows`` has what was finished, whatever happens."""
    workload = presets.load("workload", given.workload)
    online, offline = online_source(workload), offline_work(presets.load("offline", given.offline))
    if offline.lengths is None:
        raise OocoError(f"--offline is '{given.offline}', which has no lengths")
    work = replay.cut(
        online, offline, given.seconds, given.rate, given.length_scale, ENGINE.context, given.jobs, given.seed
    )
    python = ensure_vllm()
    policies = [prepare(name, given.work, console.print) for name in given.policies]
    model = servers.ensure_model(python, given.work / "model")
    console.print("starting one relaxed and one strict vLLM server: half a minute or more")
    logs = given.work / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    with servers.vllm_servers(python, model, {"relaxed": ENGINE, "strict": ENGINE}, logs, console.print) as pair:
        config, scenario = declare(given, work, model, pair, console)
        try:
            for name, source in policies:
                rows.append(one_policy(given, config, source, name, pair, (work, scenario), console))
                console.print(f"  {describe(rows[-1])}")
        finally:
            if rows:
                show(given, work, rows, scenario, console)


def declare(
    given: argparse.Namespace, work: replay.Slice, model: Path, pair: Mapping[str, Server], console: Console
) -> tuple[Path, Scenario]:
    """Measure, and write cluster.yaml with what was measured."""
    lengths = [len(piece.prompt) for piece in work.online] or [512]
    machine = deployment.measure(pair["relaxed"], round(sum(lengths) / len(lengths)))
    block = deployment.scenario(machine, model, ENGINE)
    config = _write(given, block, pair)
    console.print(
        f"a prompt of {machine.prompt_tokens} tokens alone takes {machine.ttft_s * 1e3:.0f} ms, a token "
        f"{machine.tpot_s * 1e3:.1f} ms; now the online work alone"
    )
    _, source = prepare(ALONE, given.work, console.print)
    alone = one_policy(given, config, source, ALONE, pair, (work, _scenario(block)), console)
    for name in ("ttft", "tpot"):
        block["slo"][f"{name}_s"] = round(MARGIN * alone[f"{name}_p99_s"], 5)
    block["cost"]["host_s"] = round(alone["tpot_p50_s"], 6)
    config, scenario = _write(given, block, pair), _scenario(block)
    console.print(
        f"  99 % of it wait at most {alone['ttft_p99_s'] * 1e3:.0f} ms and {alone['tpot_p99_s'] * 1e3:.1f} ms a token; "
        f"objectives: TTFT {scenario.slo.ttft_s * 1e3:.0f} ms, TPOT {scenario.slo.tpot_s * 1e3:.1f} ms"
    )
    return config, scenario


def _write(given: argparse.Namespace, block: Mapping[str, Any], pair: Mapping[str, Server]) -> Path:
    instances = [(pair["relaxed"], "relaxed"), (pair["strict"], "strict")]
    return servers.write_cluster(
        given.work / "cluster.yaml", instances, block, scrape_interval_s=0.2, timeouts=servers.PATIENT
    )


def _scenario(block: Mapping[str, Any]) -> Scenario:
    return build_scenario({**block, "cluster": {**block["cluster"], "relaxed": 1, "strict": 1}})


def describe(row: Mapping[str, Any]) -> str:
    return (
        f"{row['policy']}: {row['online_requests']} online requests, {row['online_failed']} failed; "
        f"{row['preemptions']:.0f} preemptions, {row['pulls']:.0f} pulls, {row['wasted_fraction']:.0%} of offline work "
        "thrown away" + ("" if row["offline_left"] > 0 else "; the offline work ran out: give it more --jobs")
    )


def show(
    given: argparse.Namespace, work: replay.Slice, rows: Sequence[dict[str, Any]], scenario: Scenario, console: Console
) -> None:
    load = f"{given.workload}, {given.rate:g} requests/s, lengths x {given.length_scale:g}"
    title = f"{load}: {work.seconds:g} s on real vLLM"
    console.print(comparison_table(rows, title, WIDTH))
    path = given.work / "results.json"
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    write_json(path, {"settings": settings, "slo_s": json.loads(json.dumps(asdict(scenario.slo))), "rows": list(rows)})
    console.print(f"results.json, cluster.yaml, decisions and logs: {given.work}")


if __name__ == "__main__":
    sys.exit(main())
