"""Policies over a suite of scenarios, each as a share of what is possible: ``python experiments/benchmark.py``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # baselines live in the checkout, not in the package

import baselines
from ooco_gym.cluster import Outcome
from ooco_gym.cluster.outcome import FEASIBLE_VIOLATION_RATE
from ooco_gym.errors import OocoError
from ooco_gym.evaluation import Case, Comparison, episode_seeds, run_episodes
from ooco_gym.evaluation.admission import Admission
from ooco_gym.evaluation.aggregate import Aggregate, Results, aggregate
from ooco_gym.evaluation.command import (
    compile_kernel,
    control_interval,
    flag,
    guarded,
    launch,
    listed,
    make_console,
    plain,
    save_config,
    whole,
)
from ooco_gym.evaluation.figures import plot_profiles, plot_scores
from ooco_gym.evaluation.report import write_json
from ooco_gym.evaluation.suite import Entry, load_suite, tuned_policy
from ooco_gym.policy import Policy
from ooco_gym.scenario import Scenario, build_scenario
from ooco_gym.workload.sources import ROLES

#: How the instances of a scenario's cluster are divided for policies of other architectures.
SHAPES = {
    "unified": lambda n: {"relaxed": 0, "strict": 0, "unified": n},
    "dedicated": lambda n: {"relaxed": max(n // 4, 1), "strict": max(n // 4, 1), "unified": n - 2 * max(n // 4, 1)},
}
TUNED = ("tuned-ooco", "tuned-all", "tuned-global")
REFERENCE = "ooco"
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class Contender:
    """A policy as the suite sees it: the same everywhere, or tuned per deployment; on the pools or another shape."""

    name: str
    policy: Policy | None  # None: a tuned constant of the deployment
    shape: str | None = None

    def on(self, entry: Entry, scenario: Scenario, tuned: str) -> tuple[Policy, Scenario]:
        """What runs in that scenario: same requests, objectives and number of instances for everybody."""
        policy = self.policy or tuned_policy(tuned, self.name, entry.deployment)
        if self.shape is None:
            return policy, scenario
        cluster = replace(scenario.cluster, **SHAPES[self.shape](scenario.instances))
        return policy, replace(scenario, cluster=cluster)


def contenders(entries: Sequence[Any]) -> list[Contender]:
    """What compare.py accepts, the names of tuned constants, and ``shape`` inside braces."""
    found = []
    for entry in entries:
        shape = entry.get("shape") if isinstance(entry, Mapping) else None
        if shape is not None and str(shape) not in SHAPES:
            raise OocoError(f"policies: shape is {shape!r}, accepted are {', '.join(SHAPES)}")
        if entry in TUNED:
            found.append(Contender(str(entry), None))
            continue
        bare = {key: value for key, value in entry.items() if key != "shape"} if shape else entry
        policy = baselines.resolve(bare)
        found.append(Contender(policy.name, policy, shape))
    baselines.refuse_twice([contender.name for contender in found])
    return found


@dataclass
class Bench:
    """Outcomes of all contenders on the scenarios so far."""

    contenders: Sequence[Contender]
    seeds: Sequence[int]
    tuned: str
    control_interval_s: float
    entries: list[Entry]
    outcomes: list[list[list[Outcome]]]  # [scenario][policy][episode]
    bounds: list[float]
    rows: list[dict[str, Any]]

    def add(self, entry: Entry, admission: Admission, progress: Progress) -> None:
        """Run every contender on one more scenario."""
        scenario = admission.scenario
        name, rate_scale = scenario.online.name, admission.rate_scale
        case = Case(scenario, name, entry.load, rate_scale, entry.role, admission.violation_rate)
        comparison = Comparison(case, self.seeds)
        task = progress.add_task(entry.name, total=len(self.contenders) * len(self.seeds))
        for contender in self.contenders:
            policy, where = contender.on(entry, scenario, self.tuned)
            tick = partial(progress.advance, task)
            outcomes = run_episodes(policy, where, self.seeds, self.control_interval_s, tick)
            comparison.outcomes[contender.name] = outcomes
        progress.remove_task(task)
        rows = comparison.rows()
        for contender, row in zip(self.contenders, rows, strict=True):
            self.rows.append({"scenario": entry.name, "shape": contender.shape or "pools", **row})
        self.entries.append(entry)
        self.outcomes.append(list(comparison.outcomes.values()))
        self.bounds.append(rows[0]["useful_bound"])

    def results(self, role: str | None = None) -> Results:
        """Of all scenarios, or of those with a role."""
        names = [contender.name for contender in self.contenders]
        whole = Results.of(names, [entry.name for entry in self.entries], self.outcomes, self.bounds)
        return whole.chosen([entry.name for entry in self.entries if role in (None, entry.role)])


def score_table(results: Results, rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """A line per policy, a column per scenario: useful work as a share of the bound, and violations where it fails."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("policy", no_wrap=True)
    for name in results.scenarios:
        table.add_column(name.replace("-", "\n"), justify="right")
    found = {(row["policy"], row["scenario"]): row for row in rows}
    for policy in results.policies:
        cells = []
        for name in results.scenarios:
            row = found[policy, name]
            late = f"[red]late {100 * row['violation_rate']:.0f}[/red]"
            cells.append(f"{100 * row['share_of_bound']:.0f}" if row["feasible"] else late)
        table.add_row(policy, *cells)
    return table


def aggregate_table(found: Mapping[str, Aggregate], scenarios: int, reference: str, title: str) -> Table:
    """A line per policy, best interquartile mean first."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("policy", "within 3 %", "IQM of scores, %", "mean, %", f"IQM - {reference}, points"):
        table.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=True)
    for name, one in sorted(found.items(), key=lambda item: -item[1].interquartile_mean.value):
        middle, mean, difference = one.interquartile_mean, one.mean, one.difference
        table.add_row(
            name,
            f"{one.feasible}/{scenarios}",
            middle.shown(".1f", 100),
            mean.shown(".1f", 100),
            difference.shown("+.1f", 100),
        )
    return table


def report(bench: Bench, console: Console, folder: Path) -> None:
    """Print what there is and write results.json and the figures."""
    by_role: dict[str, Any] = {}
    reference = REFERENCE if REFERENCE in [one.name for one in bench.contenders] else bench.contenders[0].name
    for role in ROLES:
        results = bench.results(role)
        count = len(results.scenarios)
        if count == 0:
            continue
        title = f"{role}, {len(bench.seeds)} paired episodes each: useful work, % of the bound; late: % that violate"
        console.print(score_table(results, bench.rows, title))
        found = aggregate(results, reference)
        by_role[role] = {name: asdict(one) for name, one in found.items()}
        if count > 1:
            console.print(aggregate_table(found, count, reference, f"{role}: {count} scenarios together"))
            plot_profiles(results, folder / f"profile-{role}.png")
        plot_scores(results, folder / f"scores-{role}.png")
    write_json(folder / "results.json", {"reference": reference, "aggregates": by_role, "rows": bench.rows})
    console.print(
        f"[dim]score: useful work over its upper bound, 0 above {100 * FEASIBLE_VIOLATION_RATE:.0f} % violations; IQM: "
        "interquartile mean over scenarios; 95 % intervals by a bootstrap over episodes within scenarios.[/dim]"
    )
    console.print(f"results.json and figures: {folder}")


def _seeds(settings: Mapping[str, Any]) -> int:
    seeds = whole(settings, "seeds", 1)
    if seeds > MOST_SEEDS:
        raise OocoError(f"seeds is {seeds}, at most {MOST_SEEDS} is accepted")
    return seeds


def chosen_entries(settings: Mapping[str, Any]) -> list[Entry]:
    """The entries of the suite that the settings ask for; raises OocoError on an unknown name or role."""
    for role in listed(settings, "roles"):
        if role not in ROLES:
            raise OocoError(f"roles: '{role}' is unknown, accepted are {', '.join(ROLES)}")
    entries = load_suite(str(settings["scenarios"]), *settings["roles"])
    if settings["only"] is None:
        return entries
    known = [entry.name for entry in entries]
    for name in listed(settings, "only"):
        if name not in known:
            raise OocoError(
                f"only: no scenario '{name}' in suite '{settings['scenarios']}', known are {', '.join(known)}"
            )
    return [entry for entry in entries if entry.name in settings["only"]]


@hydra.main(version_base="1.3", config_path="../conf", config_name="benchmark")
@guarded
def main(config: DictConfig) -> None:
    settings = plain(config)
    console, folder = make_console(), Path(HydraConfig.get().runtime.output_dir)
    if flag(settings, "quick"):
        settings |= {"seeds": 2, "episode_s": 120.0, "warmup_s": 30.0}
    entries = chosen_entries(settings)
    seeds = episode_seeds("evaluation", whole(settings, "seed", 0), _seeds(settings))
    bench = Bench(
        contenders(listed(settings, "policies")),
        seeds,
        str(settings["constants"]),
        control_interval(settings),
        [],
        [],
        [],
        [],
    )
    for contender in bench.contenders:  # a tuned constant that is missing is said before anything runs
        for entry in entries:
            if contender.policy is None:
                tuned_policy(bench.tuned, contender.name, entry.deployment)
    save_config(settings, folder)
    compile_kernel(build_scenario({}))
    times = {key: settings[key] for key in ("episode_s", "warmup_s", "data_dir")}
    try:
        with Progress(console=console, transient=True) as progress:
            every = progress.add_task("scenarios", total=len(entries))
            for entry in entries:
                try:
                    bench.add(entry, entry.admitted(**times), progress)
                except OocoError as error:
                    progress.console.print(f"[yellow]{entry.name}[/yellow] left out: {error}")
                progress.advance(every)
    except KeyboardInterrupt:
        console.print(f"interrupted: {'keeping what' if bench.entries else 'nothing'} was finished")
        if not bench.entries:
            raise
    if not bench.entries:
        raise OocoError("no scenario of the suite could be run")
    report(bench, console, folder)


if __name__ == "__main__":
    launch(main)
