"""What every command shares: one-sentence errors, the compile notice, the admission step, resolved config on disk."""

from __future__ import annotations

import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from ooco_gym.cluster import Simulator
from ooco_gym.errors import OocoError
from ooco_gym.evaluation.admission import Admission, admit
from ooco_gym.evaluation.report import WIDE
from ooco_gym.scenario import SCENARIO_KEYS, Scenario, build_scenario
from ooco_gym.specs import ROLES


def guarded(main: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Turn a user's mistake into one sentence on stderr and exit status 2."""

    @functools.wraps(main)  # Hydra finds the config folder beside the wrapped function's file
    def run(config: DictConfig) -> None:
        try:
            main(config)
        except InstantiationException as error:
            _fail(str(error.__cause__ or error).splitlines()[0])
        except (OocoError, OmegaConfBaseException) as error:
            _fail(str(error).splitlines()[0])
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run


def launch(main: Callable[[], None]) -> None:
    """Run a Hydra command; a mistake in its command line is one sentence, too."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print a dozen lines of its own and hide the reason
    warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
    try:
        main()
    except MissingConfigException as error:
        group, _, name = str(error.missing_cfg_file).partition("/")
        _fail(f"unknown {group} '{name}': known are {', '.join(error.options or [])}")
    except HydraException as error:
        reason = str(error).splitlines()[0].replace("Could not override", "unknown setting").rstrip(".")
        _fail(f"{reason}; --help lists every setting")
    except OSError as error:
        _fail(f"{error.filename or 'the run folder'}: {error.strerror or error}; hydra.run.dir=FOLDER chooses another")


def _fail(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def whole(settings: Mapping[str, Any], key: str, low: int, where: str = "") -> int:
    """A whole number of at least ``low``; raises OocoError otherwise."""
    value = settings[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise OocoError(f"{where}{key} is {value!r}, a whole number of at least {low} is needed")
    return value


def listed(settings: Mapping[str, Any], key: str) -> list[Any]:
    """A list with something in it; raises OocoError otherwise."""
    value = settings[key]
    if not isinstance(value, list) or not value:
        raise OocoError(f"{key} is {value!r}, a list such as {key}=[...] with at least one entry is needed")
    return value


def positive(value: Any, what: str) -> float:
    """A positive finite number; raises OocoError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise OocoError(f"{what} is {value!r}, a positive number is needed")
    return float(value)


def flag(settings: Mapping[str, Any], key: str) -> bool:
    """True or false; raises OocoError otherwise, since any other word would count as true."""
    value = settings[key]
    if not isinstance(value, bool):
        raise OocoError(f"{key} is {value!r}, accepted are true and false")
    return value


def control_interval(settings: Mapping[str, Any]) -> float:
    """The control interval, seconds; raises OocoError unless it is positive and at most the episode."""
    interval_s = positive(settings["control_interval_s"], "control_interval_s")
    if interval_s > positive(settings["episode_s"], "episode_s"):
        raise OocoError(
            f"control_interval_s is {interval_s:g}, at most episode_s ({settings['episode_s']:g}) is accepted"
        )
    return interval_s


def make_console() -> Console:
    """A console that never cuts the comparison table where output goes to a file."""
    return Console() if sys.stdout.isatty() else Console(width=WIDE + 30)


def plain(config: DictConfig) -> dict[str, Any]:
    """The resolved config as plain containers."""
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def scenario_of(config: Mapping[str, Any]) -> Scenario:
    """The scenario that a command's config describes."""
    return build_scenario({key: config[key] for key in SCENARIO_KEYS if key in config})


def compile_kernel(scenario: Scenario) -> None:
    """Load the compiled simulator before anything is timed or shown; the first time it is compiled, which says so."""
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
    pools = " + ".join(f"{getattr(cluster, role)} {role}" for role in ROLES if getattr(cluster, role))
    devices = sorted({device.name: device for device in scenario.instance_hardware}.values(), key=lambda d: d.name)
    classes = f" (tightest of {len(slo.classes)} classes)" if slo.classes else ""
    console.print(
        f"{scenario.model.name} on {pools} {'/'.join(device.name for device in devices)}, "
        f"{scenario.kv_blocks * cluster.block_tokens:,} KV tokens each, B_sat {scenario.saturation_batch:.0f}; "
        f"SLO: TTFT {slo.ttft_s * 1e3:.4g} ms, TPOT {slo.tpot_s * 1e3:.3g} ms{classes}; "
        f"offline {scenario.offline.kind}, prompt {scenario.offline.mean_prompt_tokens:,.0f}, "
        f"output {scenario.offline.mean_output_tokens:,.0f} tokens"
    )
    for device in devices:
        if not device.is_calibrated and "calibrated" in (scenario.cost.true_form, scenario.cost.scheduler_form):
            console.print(f"[yellow]note[/yellow]: {device.name} is {device.source}")


def save_config(config: Mapping[str, Any], folder: Path) -> None:
    """The resolved config beside what it produced."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(dict(config))), encoding="utf-8")
