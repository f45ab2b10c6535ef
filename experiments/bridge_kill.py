"""Kill the process that serves offline jobs with SIGKILL again and again, and count what is lost or delivered twice.

    python experiments/bridge_kill.py                        20 kills of the jobs over a stub; about a minute
    python experiments/bridge_kill.py --kills 100 --seed 7
    python experiments/bridge_kill.py --command 'SERVE --store {store} --port {port}' --expect any

A client uploads batches with the stock `openai` client while the process is killed in an upload, in a validation, while
requests run, while a batch is finalised, or at any moment, and started again on the same store. What the dead process
left on disk is looked at in a copy. In the end every batch that was accepted must have ended with exactly one line per
request, and with `--expect stub` the line must hold the right answer. Whatever was answered with 200 before a kill must
be there after it: files with their content, batches, counts of finished requests. `{store}` and `{port}` in `--command`
are filled in; the process must serve /v1/files and /v1/batches on that port. results.json goes to `--out`; the exit
status is 1 if anything was lost, doubled or wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shlex
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import openai
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bridge_stub import answer

from examples.live_cpu import servers
from ooco_gym.errors import OocoError

URL: Final = "/v1/completions"
PHASES = ("upload", "validation", "running", "finalising", "any")
ENDED = ("completed", "failed", "expired", "cancelled")
STUB = f"{shlex.quote(sys.executable)} {shlex.quote(str(Path(__file__).with_name('bridge_stub.py')))}"
COMMAND = STUB + " --store {store} --port {port}"
START_S, END_S = 60.0, 300.0


@dataclass
class Job:
    """One batch that the client wants done, and what it has been told of it."""

    number: int
    bodies: dict[str, dict[str, Any]]
    file_id: str | None = None
    batch_id: str | None = None
    _content: bytes = b""

    def content(self) -> bytes:
        """Its input file."""
        if not self._content:
            requests = (
                {"custom_id": custom_id, "method": "POST", "url": URL, "body": body}
                for custom_id, body in self.bodies.items()
            )
            self._content = "".join(json.dumps(request) + "\n" for request in requests).encode()
        return self._content


@dataclass
class Told:
    """What the process has promised: it may not forget it."""

    files: dict[str, str] = field(default_factory=dict)  # id -> sha256 of its content
    batches: dict[str, int] = field(default_factory=dict)  # id -> requests finished when last asked


class Served:
    """The process under test on one store; started and killed many times."""

    def __init__(self, command: str, folder: Path) -> None:
        self.store = folder / "jobs.sqlite"
        self._command = command
        self._log = folder / "process.log"
        self._port = servers.free_port()
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self._port}/v1", api_key="none", max_retries=0, timeout=60.0
        )
        self._server: servers.Server | None = None

    def start(self) -> float:
        """Start it and wait until it answers; returns the seconds that took."""
        words = [word.format(store=self.store, port=self._port) for word in shlex.split(self._command)]
        environment = {"PYTHONPATH": os.pathsep.join([str(servers.ROOT), os.environ.get("PYTHONPATH", "")])}
        began = time.monotonic()
        self._server = servers.spawn("process", words, self._port, self._log, environment, Path.cwd())
        while time.monotonic() - began < START_S:
            with contextlib.suppress(openai.APIConnectionError):
                self.client.batches.list(limit=1)
                return time.monotonic() - began
            if not self._server.alive():
                break
            time.sleep(0.02)
        raise OocoError(f"{shlex.join(words)} does not serve: {self._server.last_words()}")

    def kill(self) -> None:
        if self._server and self._server.alive():
            self._server.kill()

    def left_on_disk(self) -> dict[str, int]:
        """What a copy of the dead process's store holds in half-done states."""
        counts = {
            "uploads": "SELECT count(*) FROM files WHERE complete = 0",
            "validating": "SELECT count(*) FROM batches WHERE status = 'validating'",
            "running": "SELECT count(*) FROM requests WHERE state = 'running'",
            "finalizing": "SELECT count(*) FROM batches WHERE status = 'finalizing'",
        }
        with tempfile.TemporaryDirectory() as folder:
            for suffix in ("", "-wal"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(f"{self.store}{suffix}", Path(folder) / f"copy{suffix}")
            with contextlib.closing(sqlite3.connect(Path(folder) / "copy")) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
                return {name: connection.execute(sql).fetchone()[0] for name, sql in counts.items()}


class Client:
    """Submits jobs, through kills, and remembers what it was told."""

    def __init__(self, served: Served, rng: random.Random) -> None:
        self.jobs: list[Job] = []
        self.told = Told()
        self._served = served
        self._rng = rng

    def new_job(self, requests: int, prompt_bytes: int) -> Job:
        number = len(self.jobs)
        bodies = {
            f"job-{number}-{index}": {
                "model": "stub",
                "max_tokens": 16,
                "prompt": self._rng.randbytes(8).hex() * length,
            }
            for index, length in enumerate([max(1, prompt_bytes // 16)] * requests)
        }
        self.jobs.append(Job(number, bodies))
        return self.jobs[-1]

    def upload(self, job: Job) -> None:
        content = job.content()
        file_id = self._served.client.files.create(file=(f"{job.number}.jsonl", content), purpose="batch").id
        self.told.files[file_id] = hashlib.sha256(content).hexdigest()
        job.file_id = file_id

    def submit(self, job: Job) -> None:
        """Upload and start; what does not get through because of a kill is done by ``resubmit``."""
        with contextlib.suppress(openai.APIConnectionError):
            if job.file_id is None:
                self.upload(job)
            assert job.file_id is not None
            metadata = {"job": str(job.number)}
            create = self._served.client.batches.create
            batch = create(input_file_id=job.file_id, endpoint=URL, completion_window="24h", metadata=metadata)
            self.told.batches[batch.id] = 0
            job.batch_id = batch.id

    def resubmit(self) -> None:
        """After a restart: adopt batches whose acceptance was not heard of, and submit what was never accepted."""
        for batch in self._served.client.batches.list(limit=100):
            job = self.jobs[int((batch.metadata or {})["job"])]
            job.batch_id = job.batch_id or batch.id
            self.told.batches.setdefault(batch.id, 0)
        for job in self.jobs:
            if job.batch_id is None:
                self.submit(job)

    def look(self, job: Job) -> Any:
        """The job's batch now."""
        assert job.batch_id is not None
        batch = self._served.client.batches.retrieve(job.batch_id)
        counts = batch.request_counts
        assert counts is not None
        self.told.batches[batch.id] = max(self.told.batches[batch.id], counts.completed + counts.failed)
        return batch

    def broken_promises(self) -> list[str]:
        """What was told before the kill and is not so after it."""
        client, broken = self._served.client, []
        for file_id, digest in list(self.told.files.items()):
            try:
                content = client.files.content(file_id).content
            except openai.NotFoundError:
                broken.append(f"file {file_id} is gone")
                continue
            if hashlib.sha256(content).hexdigest() != digest:
                broken.append(f"file {file_id} has other content")
        for batch_id, finished in self.told.batches.items():
            try:
                counts = client.batches.retrieve(batch_id).request_counts
            except openai.NotFoundError:
                broken.append(f"batch {batch_id} is gone")
                continue
            if counts and counts.completed + counts.failed < finished:
                broken.append(f"batch {batch_id} had {finished} finished requests and has fewer")
        return broken


def bring_to(phase: str, client: Client, rng: random.Random) -> threading.Thread:
    """Give the process work and return at a random moment of ``phase``; the thread is what is still being sent."""
    sizes = {"upload": (rng.randint(150, 250), 80_000), "validation": (rng.randint(2000, 4000), 1500)}
    sizes |= {"finalising": (rng.randint(1500, 2500), 100), "any": (rng.randint(400, 1200), 100)}
    job = client.new_job(*sizes.get(phase, (rng.randint(50, 400), 100)))
    job.content()
    if phase == "validation":
        client.upload(job)
    sender = threading.Thread(target=client.submit, args=(job,))
    sender.start()
    if phase == "upload":
        time.sleep(rng.uniform(0.02, 0.15))
    elif phase == "any":
        time.sleep(rng.uniform(0.0, 0.8))
    else:
        sender.join()
    if phase == "validation":
        time.sleep(rng.uniform(0.0, 0.3))
    elif phase == "running":
        share = rng.random()
        while not has_run(client.look(job), share):
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.03))
    elif phase == "finalising":
        while not has_run(client.look(job), 0.97):
            time.sleep(0.001)
        while client.look(job).status == "in_progress":
            pass
        time.sleep(rng.choice([0.0, rng.uniform(0.0, 0.005)]))
    return sender


def has_run(batch: Any, share: float) -> bool:
    counts = batch.request_counts
    done = counts.completed + counts.failed
    return batch.status in ENDED or (batch.status == "in_progress" and done >= share * counts.total)


def wait_for_all(client: Client, console: Console) -> list[Any]:
    """Every batch of the process, once all have ended."""
    deadline = time.monotonic() + END_S
    with console.status("waiting for every batch to end") as status:
        while True:
            batches = list(client._served.client.batches.list(limit=100))
            open_batches = [batch for batch in batches if batch.status not in ENDED]
            if not open_batches:
                return batches
            if time.monotonic() > deadline:
                raise OocoError(f"{len(open_batches)} batches have not ended within {END_S:g} s")
            status.update(f"waiting for {len(open_batches)} batches to end")
            time.sleep(0.2)


def account(client: Client, batches: list[Any], expect: str) -> dict[str, int]:
    """Count lines against requests: what is lost, doubled, foreign or wrong."""
    totals: Counter[str] = Counter(batches=len(batches), not_accepted=0)
    for job in client.jobs:
        totals["not_accepted"] += job.batch_id is None
    totals["batches_lost"] = len(set(client.told.batches) - {batch.id for batch in batches})
    for batch in batches:
        job = client.jobs[int(batch.metadata["job"])]
        lines: Counter[str] = Counter()
        for entry, is_error in _lines(client._served.client, batch):
            custom_id = entry["custom_id"]
            lines[custom_id] += 1
            if custom_id in job.bodies and not _is_right(entry, is_error, job.bodies[custom_id], expect):
                totals["wrong"] += 1
        totals["requests"] += len(job.bodies)
        totals["lost"] += sum(custom_id not in lines for custom_id in job.bodies)
        totals["duplicated"] += sum(count - 1 for count in lines.values())
        totals["foreign"] += sum(custom_id not in job.bodies for custom_id in lines)
        totals["not_completed"] += batch.status != "completed"
    names = ("batches", "requests", "not_accepted", "batches_lost", "not_completed", "lost", "duplicated", "foreign")
    return {name: totals[name] for name in (*names, "wrong")}


def _lines(client: openai.OpenAI, batch: Any) -> Iterator[tuple[dict[str, Any], bool]]:
    for file_id, is_error in ((batch.output_file_id, False), (batch.error_file_id, True)):
        if file_id:
            for line in client.files.content(file_id).text.splitlines():
                yield json.loads(line), is_error


def _is_right(entry: dict[str, Any], is_error: bool, body: dict[str, Any], expect: str) -> bool:
    response = entry["response"]
    if expect == "any":
        return response is not None and entry["error"] is None
    status, expected = answer(URL, body)
    is_as_expected = response is not None and (response["status_code"], response["body"]) == (status, expected)
    return is_as_expected and entry["error"] is None and is_error == (status >= 400)


def run(kills: int, seed: int, command: str, expect: str, folder: Path, console: Console) -> dict[str, Any]:
    """Kill ``kills`` times and account for everything."""
    rng = random.Random(seed)
    served = Served(command, folder)
    client = Client(served, rng)
    rounds, broken = [], []
    phases = [PHASES[number % len(PHASES)] for number in range(kills)]
    rng.shuffle(phases)
    began = time.monotonic()
    try:
        served.start()
        for number, phase in enumerate(phases, 1):
            sender = bring_to(phase, client, rng)
            served.kill()
            sender.join()
            left = served.left_on_disk()
            start_s = served.start()
            broken += client.broken_promises()
            client.resubmit()
            rounds.append({"phase": phase, "left_on_disk": left, "restart_s": round(start_s, 3)})
            told = ", ".join(f"{count} {name}" for name, count in left.items() if count) or "nothing half-done"
            console.print(
                f"kill {number:3d} of {kills}, aimed at {phase:10s}: left {told}; up again in {start_s:.2f} s"
            )
        totals = account(client, wait_for_all(client, console), expect)
    finally:
        served.kill()
    faults = len(broken) + sum(totals[name] for name in FAULTS)
    return {
        **{"kills": kills, "seed": seed, "command": command, "expect": expect, "faults": faults, **totals},
        **{"broken_promises": broken, "rounds": rounds, "seconds": round(time.monotonic() - began, 1)},
    }


FAULTS = ("not_accepted", "batches_lost", "not_completed", "lost", "duplicated", "foreign", "wrong")


def show(results: dict[str, Any], console: Console) -> None:
    table = Table(box=SIMPLE_HEAD)
    for column in (
        "aimed at",
        "kills",
        "left an upload",
        "a validation",
        "running ones",
        "requests run again",
        "a finalizing batch",
    ):
        table.add_column(column, justify="left" if column == "aimed at" else "right")
    for phase in (*PHASES, "all"):
        rounds = [entry["left_on_disk"] for entry in results["rounds"] if phase in (entry["phase"], "all")]
        struck = [sum(entry[name] > 0 for entry in rounds) for name in ("uploads", "validating", "running")]
        running = sum(entry["running"] for entry in rounds)
        finalizing = sum(entry["finalizing"] > 0 for entry in rounds)
        table.add_row(phase, *map(str, (len(rounds), *struck, running, finalizing)))
    console.print(table)
    console.print(
        f"{results['kills']} kills, {results['batches']} batches, {results['requests']:,} requests: "
        f"{results['lost']} lost, {results['duplicated']} duplicated, {results['foreign']} foreign, "
        f"{results['wrong']} wrong, {results['batches_lost']} batches lost, {results['not_completed']} not completed, "
        f"{len(results['broken_promises'])} broken promises; {results['seconds']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs (default 20)")
    parser.add_argument("--seed", type=int, default=1, help="of phases, moments and requests (default 1)")
    parser.add_argument("--command", default=COMMAND, help="the process under test (default: bridge_stub.py)")
    parser.add_argument("--expect", choices=("stub", "any"), default="stub", help="which answers are right")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bridge_kill"), help="folder of results.json and the store"
    )
    options = parser.parse_args()
    if options.kills < 1:
        parser.error(f"--kills is {options.kills}; at least 1 is accepted")
    options.out.mkdir(parents=True, exist_ok=True)
    if (options.out / "jobs.sqlite").exists():
        parser.error(f"{options.out} holds the store of an earlier run; choose another --out or delete it")
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        results = run(options.kills, options.seed, options.command, options.expect, options.out, console)
    except OocoError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the process under test is killed", file=sys.stderr)
        sys.exit(130)
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    show(results, console)
    console.print(f"{options.out / 'results.json'} written")
    sys.exit(1 if results["faults"] else 0)


if __name__ == "__main__":
    main()
