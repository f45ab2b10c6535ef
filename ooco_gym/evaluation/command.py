"""What every command shares: one-sentence errors, the compile notice, the admission step, resolved config on disk."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from ooco_gym.cluster import Simulator
from ooco_gym.errors import OocoError
from ooco_gym.evaluation.admission import Admission, admit
from ooco_gym.evaluation.report import WIDE
from ooco_gym.scenario import DEFAULT_PRESETS, Scenario, build_scenario

SCENARIO_KEYS = (*DEFAULT_PRESETS, "episode_s", "warmup_s", "data_dir")


def guarded(main: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Turn a user's mistake into one sentence on stderr and exit status 2."""

    @functools.wraps(main)  # Hydra finds the config folder beside the wrapped function's file
    def run(config: DictConfig) -> None:
        try:
            main(config)
        except (OocoError, OmegaConfBaseException) as error:
            print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run


def launch(main: Callable[[], None]) -> None:
    """Run a Hydra command; a mistake in its command line is one sentence, too."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print a dozen lines of its own and hide the reason
    try:
        main()
    except MissingConfigException as error:
        group, _, name = str(error.missing_cfg_file).partition("/")
        known = ", ".join(error.options or [])
        print(f"error: unknown {group} '{name}': known are {known}", file=sys.stderr)
        sys.exit(2)
    except HydraException as error:
        lines = [line for line in (*str(error).splitlines(), *str(error.__cause__ or "").splitlines()) if line.strip()]
        print(f"error: {'; '.join(lines[:2])}; --help lists every setting", file=sys.stderr)
        sys.exit(2)


def make_console() -> Console:
    """A console wide enough for the comparison table also where output goes to a file."""
    return Console() if sys.stdout.isatty() else Console(width=WIDE)


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain containers."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def scenario_of(config: Mapping[str, Any]) -> Scenario:
    """The scenario that a command's config describes."""
    return build_scenario({key: config[key] for key in SCENARIO_KEYS if key in config})


def compile_kernel(scenario: Scenario, console: Console) -> None:
    """Load the compiled simulator, saying so: the first time on a machine takes about half a minute."""
    with console.status("loading the simulator (compiled once per machine, about half a minute)"):
        simulator = Simulator(scenario)
        simulator.run(0.0)
        simulator.telemetry()


def admit_scenario(scenario: Scenario, config: Mapping[str, Any], console: Console) -> Admission:
    """Apply the admission rule with progress, and say at which rate the scenario runs."""
    with console.status("admission: scaling the online rate until online work alone violates at most 1 %") as status:
        admission = admit(
            scenario,
            config["workload"].get("rate_scale", "auto"),
            lambda scale, rate: status.update(f"admission: rate scale {scale:.3g} violates {rate:.2%}"),
        )
    online = admission.scenario.online
    console.print(
        f"[bold]{online.name}[/bold] ({online.role}) at {admission.rate_scale:.3g} of its rate: "
        f"{online.mean_rate_per_s:.2f} requests/s, prompt {online.mean_prompt_tokens:,.0f}, "
        f"output {online.mean_output_tokens:,.0f} tokens; online work alone violates {admission.violation_rate:.2%}"
    )
    return admission


def describe(scenario: Scenario, console: Console) -> None:
    """Two lines on what is simulated."""
    cluster, slo = scenario.cluster, scenario.slo
    console.print(
        f"{scenario.model.name} on {cluster.relaxed} relaxed + {cluster.strict} strict {scenario.hardware.name}, "
        f"{scenario.kv_blocks * cluster.block_tokens:,} KV tokens each, B_sat {scenario.saturation_batch}; "
        f"SLO: TTFT {slo.ttft_s * 1e3:.0f} ms, TPOT {slo.tpot_s * 1e3:.1f} ms; "
        f"offline {scenario.offline.kind}, prompt {scenario.offline.mean_prompt_tokens:,.0f}, "
        f"output {scenario.offline.mean_output_tokens:,.0f} tokens"
    )
    if not scenario.hardware.is_calibrated and "calibrated" in (scenario.cost.true_form, scenario.cost.scheduler_form):
        console.print(f"[yellow]note[/yellow]: {scenario.hardware.name} is {scenario.hardware.source}")


def save_config(config: Mapping[str, Any], folder: Path) -> None:
    """The resolved config beside what it produced."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(dict(config))), encoding="utf-8")
