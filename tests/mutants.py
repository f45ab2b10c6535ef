"""Break one sentence of the specification in the kernel, and see which test notices.

    python tests/mutants.py [name ...]        all of them take about half an hour on two cores

Every mutant is a copy of the checkout in a temporary folder with one line changed; the quick tests of the cluster run
against it and must fail. Prints a table of sentence, change and first test that failed; exits with 1 if one survives.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = Path("ooco_gym/cluster")


@dataclass(frozen=True)
class Mutant:
    name: str
    sentence: str  # of docs/specification.md
    file: str
    before: str
    after: str


MUTANTS = (
    Mutant("ties", "6: online before offline arrivals", "queues.py",
           "ONLINE_ARRIVAL, OFFLINE_ARRIVAL, DISRUPTION", "OFFLINE_ARRIVAL, ONLINE_ARRIVAL, DISRUPTION"),
    Mutant("places", "11: at most max_seqs members", "batching.py",
           "members < world.max_seqs and", "members <= world.max_seqs and"),
    Mutant("gate", "12: fewer than gate_batch * B_sat", "batching.py",
           "return state.offline_here + others < c.", "return state.offline_here + others <= c."),
    Mutant("reserve", "12: kv_reserve of the cache stays free", "batching.py",
           "(1.0 - c.world[0].knobs[KV_RESERVE])", "(1.0 - 0.5 * c.world[0].knobs[KV_RESERVE])"),
    Mutant("pieces", "12, 39: no piece below min(128, tokens left)", "batching.py",
           "SHORTEST_PIECE_TOKENS = 128", "SHORTEST_PIECE_TOKENS = 96"),
    Mutant("hand-over", "17: the smallest share of KV", "rules.py",
           "    return state.online_blocks / state.kv_blocks", "    return -state.online_blocks / state.kv_blocks"),
    Mutant("as of now", "17: KV as of the hand-over, not as last accounted", "transfer.py",
           "            advance_to_time(c, instance, world.now_s)\n            score =", "            score ="),
    Mutant("equal pulls", "27: of equally good decodes the first come is pulled", "strict.py",
           "score < best_score or record.order < c.", "score < best_score or record.order > c."),
    Mutant("pending", "20: pending prefill counts against the slack", "loop.py",
           "world.now_s, 0.0) + state.pending_s", "world.now_s, 0.0)"),
    Mutant("layer", "20: at the end of the running layer", "prefill.py",
           "layers_done = math.ceil(", "layers_done = 1.0 + math.ceil("),
    Mutant("chunk", "21: chunk granularity keeps finished pieces", "prefill.py",
           "world.rule_preemption == CHUNK and c.slots[slot].done > 0", "world.rule_preemption == CHUNK and False"),
    Mutant("stride", "23: re-estimated at every third sequence", "rules.py",
           "rule_mix_selection == MIX_EXACT else 3", "rule_mix_selection == MIX_EXACT else 4"),
    Mutant("growth", "26: the newest offline resident is evicted first", "rules.py",
           "    offline = lists.last(c, instance, OFFLINE_DECODES)\n    online = lists.last",
           "    offline = lists.first(c, instance, OFFLINE_DECODES)\n    online = lists.last"),
    Mutant("pull", "27: pulls stop at 0.9 of the bound", "decode.py",
           "PULL_STEP_RATIO = 0.9 / 0.98", "PULL_STEP_RATIO = 0.95 / 0.98"),
    Mutant("link", "30: a transfer carries context - 1 tokens", "transfer.py",
           "kv_bytes = (c.slots[slot].context - 1)", "kv_bytes = c.slots[slot].context"),
    Mutant("backlog head", "31: an evicted offline request returns to the head", "residents.py",
           "push_front(c, c.world[0].instances, REQUEUED, slot)", "push_back(c, c.world[0].instances, REQUEUED, slot)"),
    Mutant("strict prefill", "39: within tpot_bound", "mixing.py",
           "    bound_s = mix_bound_s(c, instance)\n    begun",
           "    bound_s = 1.1 * mix_bound_s(c, instance)\n    begun"),
    Mutant("pushback", "42: once per pull interval", "strict.py",
           "    state.next_push_s = world.now_s + world.pull_interval_s\n", ""),
    Mutant("restore", "44: a restore takes host bandwidth", "restore.py",
           "/ world.host_bytes_per_s", "/ world.link_bytes_per_s"),
    Mutant("drain", "46: a strict instance drains its inbound transfers", "roles.py",
           "+ state.incoming", ""),
    Mutant("hysteresis", "45: one role change per 10 s", "roles.py", "HYSTERESIS_S = 10.0", "HYSTERESIS_S = 9.0"),
    Mutant("failure", "47: what a failure interrupts goes to the head of a queue", "faults.py",
           "        remove(c, instance, WAITING, slot)\n        enqueue_online(c, slot, True)",
           "        remove(c, instance, WAITING, slot)\n        enqueue_online(c, slot, False)"),
    Mutant("cancellation", "50: a cancelled resident leaves after the iteration", "residents.py",
           "            state.cancelled -= 1\n            leave",
           "            state.cancelled -= 1\n        if False:\n            leave"),
)  # fmt: skip


def run(mutant: Mutant) -> str | None:
    """The first test that failed against the mutant, None if all passed."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", ".*cache"))
        path = copy / CLUSTER / mutant.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.before) != 1:
            sys.exit(f"mutant '{mutant.name}': its line is found {text.count(mutant.before)} times in {mutant.file}")
        path.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-m",
            "not slow",
            "tests/cluster",
            "-p",
            "no:cacheprovider",
        ]
        result = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", result.stdout, re.MULTILINE)
        if result.returncode not in (0, 1):
            sys.exit(f"mutant '{mutant.name}' could not be tested:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
        return failed.group(1) if failed else None


def main() -> int:
    names = [mutant.name for mutant in MUTANTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"some of: {', '.join(names)}")
    chosen = parser.parse_args().names or names
    if unknown := set(chosen) - set(names):
        parser.error(f"no mutant '{unknown.pop()}': known are {', '.join(names)}")
    console = Console()
    table = Table("mutant", "sentence", "caught by")
    survivors = 0
    for mutant in (mutant for mutant in MUTANTS if mutant.name in chosen):
        with console.status(f"{mutant.name}: {mutant.sentence}"):
            caught = run(mutant)
        survivors += caught is None
        shown = escape(caught) if caught else "[red]nothing: it survived[/red]"
        console.print(f"{mutant.name}: {shown}")
        table.add_row(mutant.name, mutant.sentence, shown)
    console.print(table)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
