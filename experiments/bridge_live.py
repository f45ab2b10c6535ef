"""An online request behind long offline work on real vLLM: the gateway's abort-and-retry against stock priorities.

    python experiments/bridge_live.py                            three arms, two cases, five repeats; about six minutes
    python experiments/bridge_live.py --repeats 3 --cases prefill --out runs/mine

One vLLM server (CPU, tiny random model, loopback) serves every arm, one after the other in each repeat, so that the
engine, its settings and the machine are the same:

  idle             the online request alone: what it needs
  stock priority   the server runs with --scheduling-policy priority; offline requests carry priority 10, online ones 0
  gateway          the same requests through the gateway with policy ooco, offline ones with service_tier flex; it gives
                   the engine no priorities, it aborts what is in the way and runs it again later

  decodes          four long offline decodes take all seats of the batch (--max-num-seqs 4). Stock priority preempts
                   only when a running request finds no KV, so the arrival waits until one of them ends
  prefill          one long offline prompt, computed in chunks that take the whole iteration; the arrival waits for its
                   end

TTFT is measured at the client, from sending to the first token. The table has medians and all values, and results.json
has them in seconds. In the last repeat the gateway's offline requests run to their end: what was aborted is finished.
Needs vLLM's environment: `python examples/live_cpu/setup_vllm.py`, or OOCO_VLLM_PYTHON.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from bridge_bars import Bar
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.live_cpu import deployment, servers
from examples.live_cpu.servers import MODEL, Engine, Server
from examples.live_cpu.setup_vllm import SetupError, ensure_vllm
from ooco_gym.errors import OocoError
from ooco_gym.evaluation.report import write_json

CASES = ("decodes", "prefill")
ARMS = ("idle", "stock priority", "gateway")
SEATS = 4
DEFAULTS: dict[str, Any] = {
    "cases": list(CASES),
    "repeats": 5,
    "decode_tokens": 4000,  # output of each of the four offline decodes
    "long_prompt_tokens": 24_000,
    "online_tokens": 128,  # prompt of the online request
    "settle_s": 0.5,  # from the start of the offline work on the engine to the online arrival
}
ENGINE = Engine(context=32_768, max_seqs=SEATS, more=("--scheduling-policy", "priority"))


def run(settings: Mapping[str, Any], console: Console) -> tuple[dict[str, Any], list[Bar]]:
    """Measure and print the table; what goes into results.json, and the bars. Raises OocoError on a setting."""
    check(settings)
    python = ensure_vllm()
    with tempfile.TemporaryDirectory(prefix="bridge-live-") as name:
        folder = Path(name)
        model = servers.ensure_model(python, folder / "model", "--context", str(ENGINE.context))
        console.print("starting vLLM: half a minute or more")
        with servers.vllm_servers(python, model, {"vllm": ENGINE}, folder, console.print) as started:
            engine = started["vllm"]
            with console.status("measuring lone requests"):
                machine = deployment.measure(engine, settings["online_tokens"], 4096)
            scenario = deployment.scenario(machine, model, ENGINE)
            path = servers.write_cluster(
                folder / "cluster.yaml", [(engine, "relaxed")], scenario, scrape_interval_s=0.1
            )
            with servers.gateway(path, "ooco", folder / "gateway.log") as front:
                bench = Bench(engine, front, settings, console)
                values = asyncio.run(bench.measure())
    medians = {case: {arm: statistics.median(found) for arm, found in arms.items()} for case, arms in values.items()}
    console.print(table(values, settings))
    results = {"ttft_s": values, "median_ttft_s": medians, "gateway": bench.gateway_counts,
               "offline_after_abort": bench.completed, "machine_s": vars(machine)}  # fmt: skip
    return results, [
        Bar(f"TTFT behind {case}, gateway; the bar is stock priority", found["gateway"] * 1e3,
            found["stock priority"] * 1e3, "ms")
        for case, found in medians.items()
    ]  # fmt: skip


def check(settings: Mapping[str, Any]) -> None:
    """Raise OocoError where a setting cannot be measured."""
    wrong = [case for case in settings["cases"] if case not in CASES]
    if wrong or not settings["cases"]:
        raise OocoError(f"cases is {list(settings['cases'])}, some of {', '.join(CASES)} are needed")
    for name, default in DEFAULTS.items():
        if isinstance(default, int) and settings[name] < 1:
            raise OocoError(f"{name} is {settings[name]}, a whole number of at least 1 is needed")
    if max(settings["long_prompt_tokens"], settings["decode_tokens"] + 64) + 16 > ENGINE.context:
        raise OocoError(f"the lengths exceed the server's context of {ENGINE.context} tokens")


def table(values: Mapping[str, Mapping[str, Sequence[float]]], settings: Mapping[str, Any]) -> Table:
    """Medians and all values of each case and arm."""
    shown = Table(
        title=f"TTFT of an online request ({settings['online_tokens']} prompt tokens), milliseconds",
        title_justify="left",
    )
    for column in ("behind", "arm", "median", "all values"):
        shown.add_column(column, justify="left" if column in ("behind", "arm") else "right")
    said = {"decodes": f"{SEATS} offline decodes of {settings['decode_tokens']:,} tokens",
            "prefill": f"an offline prompt of {settings['long_prompt_tokens']:,} tokens"}  # fmt: skip
    for case, arms in values.items():
        for arm, found in arms.items():
            every = " ".join(f"{value * 1e3:,.0f}" for value in found)
            shown.add_row(said[case] if arm == ARMS[0] else "", arm, f"{statistics.median(found) * 1e3:,.0f}", every)
        shown.add_section()
    return shown


class Bench:
    """The cases and arms, over one engine and one gateway."""

    def __init__(self, engine: Server, front: Server, settings: Mapping[str, Any], console: Console) -> None:
        self.engine, self.front, self.settings, self.console = engine, front, settings, console
        self.rng = random.Random()
        self.completed: dict[str, str] = {}
        self.gateway_counts: dict[str, float] = {}

    async def measure(self) -> dict[str, dict[str, list[float]]]:
        values: dict[str, dict[str, list[float]]] = {case: {arm: [] for arm in ARMS} for case in self.settings["cases"]}
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            for repeat in range(self.settings["repeats"]):
                last = repeat == self.settings["repeats"] - 1
                for case in self.settings["cases"]:
                    for arm in ARMS:
                        where = f"repeat {repeat + 1} of {self.settings['repeats']}, {case}, {arm}"
                        with self.console.status(where):
                            ttft_s = await self._once(session, case, arm, last)
                        values[case][arm].append(ttft_s)
                        self.console.print(f"  {where}: {ttft_s * 1e3:,.0f} ms")
        counts = self.front.metrics("ooco_preemptions_total", "ooco_wasted_tokens_total")
        self.gateway_counts = dict(zip(("preemptions", "wasted_tokens"), counts, strict=True))
        return values

    async def _once(self, session: aiohttp.ClientSession, case: str, arm: str, last: bool) -> float:
        """TTFT of one online arrival behind the offline work of ``case``."""
        await self._until(0, [])
        base = self.front.url if arm == "gateway" else self.engine.url
        bodies = [] if arm == "idle" else self._offline(case, arm)
        tasks = [asyncio.create_task(self._whole(session, base, body)) for body in bodies]
        try:
            if tasks:
                await self._until(len(tasks), tasks)
                await asyncio.sleep(self.settings["settle_s"])
                if any(task.done() for task in tasks):
                    raise OocoError(f"{case}: the offline work ended before the online request came, make it longer")
            ttft_s = await self._first_token(session, base, 0 if arm == "stock priority" else None)
            if last and arm == "gateway":
                answers = await asyncio.gather(*tasks)
                wanted = [body["max_tokens"] for body in bodies]
                right = sum(answer == tokens for answer, tokens in zip(answers, wanted, strict=True))
                self.completed[case] = f"{right} of {len(wanted)} offline requests ended with all their tokens"
                self.console.print(f"  {case}: {self.completed[case]}")
            return ttft_s
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _offline(self, case: str, arm: str) -> list[dict[str, Any]]:
        mark: dict[str, Any] = {"service_tier": "flex"} if arm == "gateway" else {"priority": 10}
        if case == "decodes":
            return [self._body(64, self.settings["decode_tokens"], **mark) for _ in range(SEATS)]
        return [self._body(self.settings["long_prompt_tokens"], 16, **mark)]

    def _body(self, prompt_tokens: int, output_tokens: int, **more: Any) -> dict[str, Any]:
        prompt = [self.rng.randrange(256) for _ in range(prompt_tokens)]
        return {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            **more,
        }

    async def _whole(self, session: aiohttp.ClientSession, base: str, body: Mapping[str, Any]) -> int:
        """Output tokens of an answer that is not streamed."""
        async with session.post(
            f"{base}/v1/completions", json=body, timeout=aiohttp.ClientTimeout(total=600)
        ) as answer:
            content = await answer.json()
            if answer.status != 200:
                raise OocoError(f"offline request: HTTP {answer.status}: {content}")
            return int(content["usage"]["completion_tokens"])

    async def _first_token(self, session: aiohttp.ClientSession, base: str, priority: int | None) -> float:
        body = self._body(self.settings["online_tokens"], 8, stream=True)
        if priority is not None:
            body["priority"] = priority
        began = time.perf_counter()
        first_s = 0.0
        async with session.post(
            f"{base}/v1/completions", json=body, timeout=aiohttp.ClientTimeout(total=600)
        ) as answer:
            if answer.status != 200:
                raise OocoError(f"online request: HTTP {answer.status}: {await answer.text()}")
            async for line in answer.content:
                if line.startswith(b'data: {"error"'):
                    raise OocoError(f"online request: {line.decode().strip()}")
                if line.startswith(b"data: {") and not first_s:
                    first_s = time.perf_counter() - began
        return first_s

    async def _until(self, running: int, tasks: Sequence[asyncio.Task[int]]) -> None:
        """Wait until the engine runs this many requests and none waits."""
        end = time.monotonic() + 120.0
        while True:
            counts = await asyncio.to_thread(self.engine.load)
            if counts == (running, 0):
                return
            for task in tasks:
                if task.done():
                    task.result()
                    raise OocoError("an offline request ended before all of them ran, make them longer")
            if time.monotonic() > end:
                state = f"the engine runs {counts[0]} requests and {counts[1]} wait"
                raise OocoError(f"{state}, {running} and 0 were expected")
            await asyncio.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=DEFAULTS["cases"], help="what the online request finds (all)"
    )
    said = {
        "repeats": "of every case and arm",
        "decode_tokens": "output of each offline decode",
        "long_prompt_tokens": "of the offline prefill",
        "online_tokens": "prompt of the online request",
    }
    for name, what in said.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=DEFAULTS[name], help=f"{what} ({DEFAULTS[name]})"
        )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bridge_live"), help="folder of results.json (runs/bridge_live)"
    )
    arguments = vars(parser.parse_args())
    out: Path = arguments.pop("out")
    console = Console() if sys.stdout.isatty() else Console(width=120)
    try:
        results, _ = run({**DEFAULTS, **arguments}, console)
    except (OocoError, SetupError, servers.ServerError, aiohttp.ClientError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the servers are stopped", file=sys.stderr)
        return 130
    out.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()}
    write_json(
        out / "results.json", {"live": {"settings": {**DEFAULTS, **arguments}, "machine": machine, "results": results}}
    )
    console.print(f"results in {out / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
