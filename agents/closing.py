"""The end of every training run: a paired comparison on fresh seeds, its table, figures and results.json."""

from __future__ import annotations

from collections.abc import Sequence

from rich.progress import Progress

from agents.training import Training
from ooco_gym.cluster.telemetry import Telemetry
from ooco_gym.evaluation import Admission, Case, Comparison, episode_seeds, run_episode
from ooco_gym.evaluation.figures import plot_comparison, plot_knobs, plot_learning
from ooco_gym.evaluation.report import print_comparison, write_json
from ooco_gym.policy import Policy, SavedPolicy


def close_run(
    run: Training, policy: SavedPolicy, rivals: Sequence[Policy], admission: Admission, episodes: int
) -> None:
    """Evaluate the trained policy, its untrained self and the rivals on the same episodes, none of them seen before."""
    try:
        _close_run(run, policy, rivals, admission, episodes)
    except KeyboardInterrupt:
        run.console.print(f"interrupted: the best policy so far is {run.folder / 'policy'}, there is no table")
        raise


def _close_run(
    run: Training, policy: SavedPolicy, rivals: Sequence[Policy], admission: Admission, episodes: int
) -> None:
    scenario, role = admission.scenario, run.role
    case = Case(scenario, scenario.online.name, 1.0, admission.rate_scale, role, admission.violation_rate)
    comparison = Comparison(case, episode_seeds("evaluation", run.seed, episodes))
    policies: list[Policy] = [*rivals, run.untrained_policy(), policy]
    with Progress(console=run.console, transient=True) as progress:
        task = progress.add_task("evaluation on fresh seeds", total=len(policies) * episodes)
        comparison.run(policies, run.control_interval_s, lambda: progress.advance(task))
    rows = comparison.rows()
    marks = f"{'  role=demo' if role == 'demo' else ''}{'  (training was interrupted)' if run.interrupted else ''}"
    print_comparison(
        run.console, rows, f"{case.workload}, {episodes} fresh episodes of {scenario.episode_s:g} s{marks}"
    )
    if not run.found_feasible:
        run.console.print(
            "[yellow]no policy stayed safely within 3 % violations in validation[/yellow]: kept the one of step "
            f"{run.best_step}, which violates least; a higher reward.price or a looser slo may help"
        )
    differences = {}
    for theirs in dict.fromkeys((run.untrained_name, "ooco")):
        if theirs in comparison.outcomes:
            difference = comparison.difference(policy.name, theirs)
            differences[f"{policy.name} - {theirs}"] = [difference.value, difference.low, difference.high]
            run.console.print(
                f"{policy.name} - {theirs}: {100 * difference.value:+.1f} points of useful offline work "
                f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}], paired"
            )
    figures = run.folder / "figures"
    pictures = {
        "comparison": plot_comparison(rows, figures / "comparison.png"),
        "learning": plot_learning(run.history, figures / "learning.png"),
        "knobs": plot_knobs(_trajectory(run, policy), figures / "knobs.png"),
    }
    results = {
        "role": role,
        "best_step": run.best_step,
        "found_feasible": run.found_feasible,
        "interrupted": run.interrupted,
        "rows": rows,
        "paired_differences_of_offline_ideal_s_per_instance_s": differences,
        "history": run.history,
    }
    write_json(run.folder / "results.json", results)
    ours = next(row for row in rows if row["policy"] == policy.name)
    run.tracker.finish({f"evaluation/{key}": ours[key] for key in ours if not key.endswith("_ci95")}, pictures)
    run.console.print(f"policy, results.json and figures: {run.folder}")


def _trajectory(run: Training, policy: Policy) -> list[Telemetry]:
    """Telemetry of the first evaluation episode under the policy."""
    records: list[Telemetry] = []
    seed = episode_seeds("evaluation", run.seed, 1)[0]
    run_episode(
        policy,
        run.scenario,
        seed,
        run.control_interval_s,
        lambda simulator: records.append(simulator.telemetry()),
    )
    return records
