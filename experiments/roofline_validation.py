"""How well the cost model predicts iterations that were measured: errors on models and devices it was not fitted to.

    python experiments/roofline_validation.py                          all devices, two minutes of one core
    python experiments/roofline_validation.py --devices h100           one of them
    python experiments/roofline_validation.py --data-dir /data         measured/ lies in /data

Whole iterations are put together from kernels measured alone (measured_iterations.py says how). The constants
are fitted with every model left out in turn; RTX 4090 has one model, and its errors are in sample. Beside them:

  preset      conf/hardware as it is (fitted to all of these models)
  datasheet   the same formula with every efficiency 1 and no fixed times
  ooco-xllm   the form of the open OOCO implementation, hard maximum, six constants and a fixed time per layer and per
              iteration, fitted without the model
  forest      a random forest on batch and model sizes; `seen`: on a random fifth of the rows, `held out`: without the
              model. Left out when scikit-learn is not installed
  chain       the calibrated form with the serial term over every context, not the decodes' only; not in the simulator

A100 and H100 have no measurements of one attention kernel for prefill and decode together. `mixed` there is a prefill
kernel and a decode kernel one after the other, judged with decode_row_pad and chain_ns fitted to such batches of the
other models; the presets' values are of fused kernels. Writes results.json and figures to --out.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import measured_iterations as measured
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ooco_gym.errors import OocoError
from ooco_gym.roofline.calibration.fit import BOUNDS, Fit, errors, fit, solve
from ooco_gym.roofline.calibration.measurement import Measurement, batch_kind
from ooco_gym.roofline.calibration.terms import Array, Terms, predict_s, terms, unit_device
from ooco_gym.roofline.calibration.two_numbers import from_two_numbers, two_numbers
from ooco_gym.roofline.hardware import CalibratedConstants, HardwareSpec, resolve_hardware
from ooco_gym.roofline.model import ModelSpec, resolve_model

KINDS = ("decode", "prefill", "mixed")
TWO_KERNELS = ("a100", "h100")  # their mixed batches are two kernels
#: Where every fit starts, and what it keeps of a constant that its data do not identify: round values, the same for all
#: devices, so that no device's own preset leaks into an error. 64 are the rows of a FlashAttention-2 tile.
PRIOR = CalibratedConstants(0.75, 0.8, 4.0, 1.0, 15.0, 0.5, 0.8, 15.0, 20.0, 64.0, 7.0, 0.35)
NEAREST = {"a100": "h100", "h100": "a100", "rtx-pro-6000": "rtx-4090", "rtx-4090": "rtx-pro-6000"}
MIXED_CONSTANTS = ("decode_row_pad", "chain_ns")
#: (MAPE, p95, |bias|) in per cent for whole iterations of held-out models, and of a held-out device's MAPE.
BARS = {"a100": (5.5, 14.0, 1.0), "h100": (5.0, 14.0, 1.0), "rtx-pro-6000": (5.0, 14.0, 1.0)}
DEVICE_BAR = 10.0

XLLM_BOUNDS = {
    "gemm_flops": (0.02, 1.5), "gemm_bytes": (0.02, 1.5), "prefill_attention_flops": (0.01, 1.5),
    "decode_attention_flops": (0.001, 100.0), "attention_bytes": (0.02, 1.5), "allreduce_bytes_per_s": (1e9, 1e13),
    "layer_us": (0.0, 1e3), "iteration_us": (0.0, 1e5),
}  # fmt: skip
XLLM_START = {
    "gemm_flops": 0.68, "gemm_bytes": 0.58, "prefill_attention_flops": 0.59, "decode_attention_flops": 0.60,
    "attention_bytes": 0.38, "allreduce_bytes_per_s": 50e9, "layer_us": 50.0, "iteration_us": 100.0,
}  # fmt: skip


def fitted_kinds(device: str) -> tuple[str, ...]:
    return KINDS[:2] if device in TWO_KERNELS else KINDS


class Device:
    """One device's iterations and the fits that leave each model out."""

    def __init__(self, name: str, data: Path) -> None:
        self.name, self.data = name, data
        self.peaks = replace(resolve_hardware(name), calibrated=PRIOR)
        self.rows = measured.iterations(data, name)
        self.kinds = np.array([batch_kind(row) for row in self.rows])
        self.models = np.array([row.group for row in self.rows])
        self.groups = sorted(set(self.models))
        self.terms = terms(self.rows, self.peaks)

    def training(self, without: str, kinds: Sequence[str] | None = None) -> list[Measurement]:
        return measured.training_rows(self.data, self.name, kinds or fitted_kinds(self.name), without)

    def held_out(self, predict: Callable[[str, Array], Array]) -> Array:
        """Seconds of every row, each by ``predict(model left out, mask of its rows)``; in sample for a sole model."""
        found = np.full(len(self.rows), np.nan)
        for group in self.groups:
            mask = self.models == group
            found[mask] = predict(group if len(self.groups) > 1 else "", mask)
        return found

    def calibrated(self, without: str, mask: Array) -> Array:
        rest = fit(self.training(without), self.peaks, by_group=False).device
        seconds = predict_s(self.terms[mask], rest.calibrated)
        if self.name in TWO_KERNELS:
            mixed = self.kinds[mask] == "mixed"
            seconds[mixed] = predict_s(self.terms[mask][mixed], self.two_kernels(rest, without).device.calibrated)
        return seconds

    def two_kernels(self, fitted: HardwareSpec, without: str) -> Fit:
        """The two constants of mixed batches, fitted to one kernel after the other; the others as in ``fitted``."""
        rows = [row for row in self.training(without, ["mixed"]) if row.kind == "iteration"]
        return fit(rows, fitted, by_group=False, keep=[name for name in BOUNDS if name not in MIXED_CONSTANTS])

    def chain(self, without: str, mask: Array) -> Array:
        rest = fit(self.training(without), self.peaks, by_group=False, chain_all=True).device
        rows = [row for row, chosen in zip(self.rows, mask, strict=True) if chosen]
        return predict_s(terms(rows, self.peaks, chain_all=True), rest.calibrated)

    def xllm(self, without: str, mask: Array) -> Array:
        rows = [row for row in self.training(without, KINDS) if row.kind == "iteration"]
        table = terms(rows, self.peaks, "ooco-xllm")
        constants, _ = solve(lambda c: xllm_s(table, c), table.measured_s, table.weight, XLLM_START, XLLM_BOUNDS)
        judged = [row for row, chosen in zip(self.rows, mask, strict=True) if chosen]
        return xllm_s(terms(judged, self.peaks, "ooco-xllm"), constants)

    def by_kind(self, seconds: Array) -> dict[str, dict[str, float]]:
        """Errors by kind, and of ``whole``: every kind that the main fit is of."""
        measured_s = self.terms.measured_s
        masks = {kind: self.kinds == kind for kind in KINDS}
        masks["whole"] = np.isin(self.kinds, fitted_kinds(self.name))
        return {kind: errors(seconds[mask], measured_s[mask]) for kind, mask in masks.items() if mask.any()}


def xllm_s(t: Terms, c: Mapping[str, float]) -> Array:
    """Seconds of the ooco-xllm form, with a fixed time per layer and per iteration that it does not have."""
    gemm = np.maximum(t.gemm_compute_s / c["gemm_flops"], t.gemm_memory_s / c["gemm_bytes"])
    compute = t.pairs_s / c["prefill_attention_flops"] + t.context_s / c["decode_attention_flops"]
    memory = t.kv_s / c["attention_bytes"]
    attention = np.where(t.has_prefill > 0, np.maximum(compute, memory), memory)
    fixed = t.attention_count * c["layer_us"] * 1e-6 + c["iteration_us"] * 1e-6
    return np.asarray(
        (t.gemm_count * gemm).sum(axis=1) + attention + t.allreduce_s / c["allreduce_bytes_per_s"] + fixed
    )


def forest_errors(device: Device) -> dict[str, dict[str, dict[str, float]]] | None:
    """A random forest's errors, model seen and held out; None without scikit-learn."""
    try:
        from sklearn.ensemble import RandomForestRegressor  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    features, target = np.array([_features(row) for row in device.rows]), np.log(device.terms.measured_s)

    def predict(train: Array, judged: Array) -> Array:
        forest = RandomForestRegressor(n_estimators=100, random_state=0, n_jobs=1)
        return np.asarray(np.exp(forest.fit(features[train], target[train]).predict(features[judged])))

    fold = np.random.default_rng(0).integers(5, size=len(device.rows))
    seen = np.empty(len(fold))
    for part in range(5):
        seen[fold == part] = predict(fold != part, fold == part)
    found = {"forest, seen": device.by_kind(seen)}
    if len(device.groups) > 1:
        held = device.held_out(lambda _, mask: predict(~np.asarray(mask, dtype=bool), mask))
        found["forest, held out"] = device.by_kind(held)
    return found


def _features(row: Measurement) -> list[float]:
    model = row.model
    assert model is not None
    batch = [row.prefills, row.prefill_tokens, row.past_tokens, row.decodes, row.context_tokens, row.tp]
    sizes = [model.hidden, model.layers, model.q_heads, model.kv_heads, model.intermediate, model.vocab, model.experts]
    return [float(value) for value in (*batch, row.prefills * row.prefill_tokens + row.decodes, *sizes)]


def measured_two(data: Path, name: str) -> tuple[float, float]:
    """(gemm_flops, gemm_bytes) of one device: aiconfigurator's GEMMs, or the operators' where it has none."""
    device = replace(resolve_hardware(name), calibrated=PRIOR)
    known = name in measured.AIC_NAMES
    return two_numbers(measured.gemm_rows(data, name) if known else measured.kernels(data, name), device)


def leave_device_out(devices: Mapping[str, Device], fits: Mapping[str, Fit], data: Path) -> dict[str, Any]:
    """Errors on a device with its datasheet, two measured numbers, and the constants of other devices."""
    found: dict[str, Any] = {}
    for name, device in devices.items():
        flops, moved = measured_two(data, name)
        found[name] = {"gemm_flops": flops, "gemm_bytes": moved}
        donors = {"mean": [one for one in fits if one != name], "nearest": [NEAREST[name]]}
        for label, others in donors.items():
            specs = [fits[one].device for one in others if one in fits]
            if specs:
                preset = from_two_numbers(device.peaks, flops, moved, specs)
                seconds = predict_s(device.terms, preset.calibrated)
                one = np.array([row.tp == 1 for row in device.rows]) & np.isin(device.kinds, fitted_kinds(name))
                found[name][label] = device.by_kind(seconds)
                found[name][label]["tp 1"] = errors(seconds[one], device.terms.measured_s[one])
    return found


def other_devices(data: Path) -> dict[str, dict[str, float]]:
    """What the tables say of devices without whole iterations: the two numbers of their GEMMs, and the all-reduce."""
    found = {}
    for name in ("h200", "b200", "l40s"):
        flops, moved = measured_two(data, name)
        rows = measured.allreduce_rows(data, name, resolve_model("llama-3.1-70b"))
        fitted = fit(rows, replace(resolve_hardware(name), calibrated=PRIOR))
        both = {key: fitted.constants[key].value for key in ("allreduce_us", "allreduce_bytes")}
        found[name] = {"gemm_flops": flops, "gemm_bytes": moved, **both}
        found[name]["allreduce_mape"] = fitted.in_sample["allreduce"]["mape"]
    return found


YI = ModelSpec("Yi-34B", 7168, 60, 56, 8, 128, 20480, 64000)
QWEN_7B = ModelSpec("Qwen2.5-7B", 3584, 28, 28, 4, 128, 18944, 152064)


def row_pad_evidence(data: Path, a100: HardwareSpec) -> dict[str, float]:
    """Does the one published hybrid batch (Yi-34B, tp 2, A100 PCIe, three decodes in a chunk of 1,024) tell?

    Per cent by which it is slower than the chunk of prefill alone, measured and predicted. The contexts of its decodes
    were not published: 1,024 tokens each are taken, the length of its prompts.
    """
    with gzip.open(data / "sarathi_yi34b_batch_times.csv.gz", "rt", newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["phase"].startswith("hybrid")]
    hybrid = next(float(row["ms"]) for row in rows if row["prefill_tokens"] == "1021")
    alone = next(float(row["ms"]) for row in rows if row["prefill_tokens"] == "1024")
    found = {"measured_percent": 100 * (hybrid / alone - 1)}
    batches = [
        Measurement("iteration", 1.0, YI, 2, prefills=1, prefill_tokens=1021, decodes=3, context_tokens=1024),
        Measurement("iteration", 1.0, YI, 2, prefills=1, prefill_tokens=1024),
        Measurement("iteration", 1.0, QWEN_7B, 1, prefills=1, prefill_tokens=256, decodes=128, context_tokens=2500),
    ]
    table = terms(batches, a100)
    for pad in (0.0, 40.0, 80.0):
        seconds = predict_s(table, replace(a100.calibrated, decode_row_pad=pad))
        found[f"pad_{pad:.0f}_percent"] = float(100 * (seconds[0] / seconds[1] - 1))
        found[f"pad_{pad:.0f}_ms_of_128_decodes_with_256"] = float(seconds[2] * 1e3)
    return found


def validate(name: str, data: Path, out: Path) -> tuple[Device, Fit, dict[str, Any]]:
    device = Device(name, data)
    fitted = fit(device.training(""), device.peaks)
    held = device.held_out(device.calibrated)
    preset = predict_s(device.terms, resolve_hardware(name).calibrated)
    found: dict[str, Any] = {"held_out": device.by_kind(held), "models": len(device.groups)}
    found["rivals"] = {
        "preset": device.by_kind(preset),
        "datasheet": device.by_kind(predict_s(device.terms, unit_device(device.peaks).calibrated)),
        "ooco-xllm, refitted": device.by_kind(device.held_out(device.xllm)),
        **(forest_errors(device) or {}),
        "chain over all contexts": device.by_kind(device.held_out(device.chain)),
    }
    one = np.array([row.tp == 1 for row in device.rows]) & np.isin(device.kinds, fitted_kinds(name))
    seen = device.terms.measured_s
    found["tp_1"] = {"held_out": errors(held[one], seen[one]), "preset": errors(preset[one], seen[one])}
    found["by_model"] = {
        str(group): errors(held[mask], seen[mask])
        for group in device.groups
        for mask in [(device.models == group) & np.isin(device.kinds, fitted_kinds(name))]
    }
    found["cuts"] = {label: errors(held[mask], seen[mask]) for label, mask in cuts(device).items()}
    found["constants"] = {key: asdict(value) for key, value in fitted.constants.items()}
    if name in TWO_KERNELS:
        both = device.two_kernels(fitted.device, "")
        found["two_kernels"] = {key: asdict(both.constants[key]) for key in MIXED_CONSTANTS}
    found["chain_constants"] = asdict(
        fit(device.training(""), device.peaks, by_group=False, chain_all=True).device.calibrated
    )
    plot(device, held, out)
    return device, fitted, found


def cuts(device: Device) -> dict[str, Any]:
    """Where the errors lie, by what is likely to matter."""
    new = np.array([row.prefill_tokens for row in device.rows])
    past = np.array([row.past_tokens for row in device.rows])
    decodes = np.array([row.decodes for row in device.rows])
    context = np.array([row.context_tokens for row in device.rows])
    whole = np.isin(device.kinds, fitted_kinds(device.name))
    masks = {
        "chunks below 256 on a past above 2,048": (new > 0) & (new < 256) & (past > 2048),
        "all but those": ~((new > 0) & (new < 256) & (past > 2048)),
        "decode, context above 4,096": (device.kinds == "decode") & (context > 4096),
        "decode, batch 1": (device.kinds == "decode") & (decodes == 1),
    }
    return {label: mask & whole for label, mask in masks.items() if (mask & whole).any()}


def plot(device: Device, seconds: Array, out: Path) -> None:
    """One figure of three panels: predicted against measured, error against batch, error against context."""
    seen, whole = device.terms.measured_s, np.isin(device.kinds, fitted_kinds(device.name))
    error = 100 * (seconds / seen - 1)
    batch = np.array([row.decodes + row.prefills for row in device.rows])
    context = np.array([max(row.context_tokens, row.past_tokens + row.prefill_tokens) for row in device.rows])
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for kind in fitted_kinds(device.name)[::-1]:
        mask = device.kinds == kind
        axes[0].loglog(seen[mask] * 1e3, seconds[mask] * 1e3, ".", ms=3, alpha=0.5, label=kind)
    ends = [seen[whole].min() * 1e3, seen[whole].max() * 1e3]
    axes[0].plot(ends, ends, "k-", lw=0.8)
    axes[0].set(xlabel="measured ms", ylabel="predicted ms", title=f"{device.name}, held-out models")
    axes[0].legend()
    for axis, values, label in ((axes[1], batch, "sequences"), (axes[2], context, "longest context, tokens")):
        sizes = np.unique(values[whole])
        bands = np.array([np.quantile(error[whole & (values == size)], [0.05, 0.5, 0.95]) for size in sizes])
        axis.semilogx(sizes, bands[:, 1], "o-", ms=3)
        axis.fill_between(sizes, bands[:, 0], bands[:, 2], alpha=0.25)
        axis.axhline(0, color="k", lw=0.8)
        axis.set(xlabel=label, ylabel="error % (median, 5 to 95 %)")
    figure.savefig(out / f"{device.name}.png", dpi=120)
    plt.close(figure)


def triple(found: Mapping[str, float]) -> str:
    return f"{found['mape']:.1f} / {found['p95']:.1f} / {found['bias']:+.1f}"


def print_device(name: str, found: Mapping[str, Any], console: Console) -> None:
    note = "models held out" if found["models"] > 1 else "one model, in sample"
    table = Table(title=f"{name}: MAPE / p95 / bias, %", title_justify="left", box=SIMPLE_HEAD)
    columns = [*(kind for kind in KINDS if kind in found["held_out"]), "whole"]
    for heading in ("", *columns):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row(f"calibrated, {note}", *(triple(found["held_out"][kind]) for kind in columns))
    for label, rival in found["rivals"].items():
        table.add_row(label, *(triple(rival[kind]) for kind in columns))
    table.add_section()
    table.add_row("rows", *(f"{found['held_out'][kind]['n']:,}" for kind in columns))
    console.print(table)
    if name in BARS and found["models"] > 1:
        whole = found["held_out"]["whole"]
        values = (whole["mape"], whole["p95"], abs(whole["bias"]))
        said = ("MAPE", "p95", "|bias|")
        missed = [
            f"{what} {is_:.2f} > {bar:g}" for what, is_, bar in zip(said, values, BARS[name], strict=True) if is_ > bar
        ]
        console.print(f"  bars {' / '.join(f'{bar:g}' for bar in BARS[name])}: " + (", ".join(missed) or "met"))
    for label, one in {**found["by_model"], **found["cuts"]}.items():
        console.print(f"  {label}: {triple(one)} of {one['n']:,}")
    for label, one in found["tp_1"].items():
        console.print(f"  tp 1, {label}: {triple(one)} of {one['n']:,}")


def print_constants(fits: Mapping[str, Fit], results: Mapping[str, Any], console: Console) -> None:
    table = Table(title="constants, all models (+- standard error)", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("")
    for name in fits:
        table.add_column(name, justify="right")
    for constant in BOUNDS:
        cells = []
        for one in fits.values():
            c = one.constants[constant]
            cells.append(f"{c.value:.3g} +- {c.error:.2g}" if c.identified else f"({c.value:.3g})")
        table.add_row(constant, *cells)
    console.print(table)
    console.print("in brackets: not identified, the value the fit started from")
    for name, found in results.items():
        if name not in TWO_KERNELS:
            names = ("prefill_attention_flops", "decode_row_pad", "chain_ns")
            said = ", ".join(f"{key} {found['chain_constants'][key]:.3g}" for key in names)
            console.print(f"{name}, chain over all contexts: {said}")
        if "two_kernels" in found:
            pair = found["two_kernels"]
            said = ", ".join(
                f"{key} {one['value']:.3g} +- {one['error']:.2g}" + ("" if one["identified"] else " (not identified)")
                for key, one in pair.items()
            )
            console.print(f"{name}, a prefill kernel and a decode kernel one after the other: {said}")


def print_devices_out(found: Mapping[str, Any], console: Console) -> None:
    table = Table(title="device left out: datasheet and two numbers, MAPE / p95 / bias, %", title_justify="left",
                  box=SIMPLE_HEAD)  # fmt: skip
    for heading in ("", "gemm_flops", "gemm_bytes", "others' mean", "nearest", "nearest, tp 1", f"bar {DEVICE_BAR:g}"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, one in found.items():
        cells = [triple(one[label]["whole"]) if label in one else "" for label in ("mean", "nearest")]
        cells.append(triple(one["nearest"]["tp 1"]) if "nearest" in one else "")
        met = [label for label in ("mean", "nearest") if label in one and one[label]["whole"]["mape"] <= DEVICE_BAR]
        table.add_row(
            name, f"{one['gemm_flops']:.3f}", f"{one['gemm_bytes']:.3f}", *cells, " and ".join(met) or "missed"
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", choices=measured.DEVICES, default=list(measured.DEVICES),
                        metavar="DEVICE", help=f"some of {', '.join(measured.DEVICES)}")  # fmt: skip
    parser.add_argument("--data-dir", help="folder that holds measured/; otherwise OOCO_DATA, otherwise ../shared/data")
    parser.add_argument("--out", type=Path, default=Path("runs/roofline"), help="results and figures (runs/roofline)")
    arguments = parser.parse_args()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--out {arguments.out}: {error.strerror}; a folder that can be written to is needed")
    console = Console() if sys.stdout.isatty() else Console(width=140)
    try:
        data = measured.folder(arguments.data_dir)
        devices, fits, results = {}, {}, {}
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name in arguments.devices:
            with console.status(name):
                device, fitted, found = validate(name, data, arguments.out)
            devices[name], fits[name], results[name] = device, fitted, found
            print_device(name, found, console)
        print_constants(fits, results, console)
        out = leave_device_out(devices, fits, data)
        print_devices_out(out, console)
        other = other_devices(data)
        for name, one in other.items():
            console.print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in one.items()))
        evidence = row_pad_evidence(data, resolve_hardware("a100"))
        console.print("decode_row_pad on A100: " + ", ".join(f"{key} {value:.2f}" for key, value in evidence.items()))
    except OocoError as error:
        sys.exit(str(error))
    if not any("forest, seen" in found["rivals"] for found in results.values()):
        console.print("no random forest: scikit-learn is not installed")
    output = {name: found.pop("held_out") for name, found in results.items()}
    output |= {"details": results, "leave_one_device_out": out, "two_numbers": other, "decode_row_pad": evidence}
    (arguments.out / "results.json").write_text(json.dumps(output, indent=2), encoding="utf-8")
    console.print(f"results.json and figures: {arguments.out}")


if __name__ == "__main__":
    main()
