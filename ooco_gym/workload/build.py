"""From the YAML of ``conf/workload`` and ``conf/offline`` to the objects that produce requests.

The files themselves are the schema's documentation; here each key is checked where it enters.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

from ooco_gym.errors import OocoError
from ooco_gym.workload.arrivals import Arrivals, DiurnalArrivals, MarkovArrivals, PoissonArrivals, Ticks
from ooco_gym.workload.lengths import Component, FixedLengths, Lengths, MixtureLengths, TableLengths
from ooco_gym.workload.offline import KINDS, OfflineKind, OfflineWork
from ooco_gym.workload.section import Section
from ooco_gym.workload.sources import ROLES, Role, SyntheticSource, TraceSource
from ooco_gym.workload.trace import find_data, read_lengths, read_trace

DataDir = str | os.PathLike[str] | None


def online_source(config: Mapping[str, Any], data_dir: DataDir = None) -> SyntheticSource | TraceSource:
    """Online source of a ``conf/workload`` mapping; ``rate_scale: auto`` counts as 1 (the caller searches).

    ``data_dir`` is where trace files are looked for (see ``find_data``). Raises OocoError naming the wrong
    key.
    """
    top = _named(config, "workload")
    name = top.text("name")
    role = cast(Role, top.choice("role", ROLES))
    kind = top.choice("kind", ("synthetic", "trace"))
    rate_scale = _rate_scale(top)
    if kind == "synthetic":
        arrivals = _arrivals(top.section("arrivals"))
        lengths = _lengths(top.section("lengths"), data_dir)
        top.close()
        return SyntheticSource(name, arrivals, lengths, rate_scale, role)
    file = top.text("file")
    window = top.pair("window") if top.has("window") else None
    top.close()
    return TraceSource(name, read_trace(find_data(file, data_dir)), role, rate_scale, window)


def offline_work(config: Mapping[str, Any], data_dir: DataDir = None) -> OfflineWork:
    """Offline work of a ``conf/offline`` mapping; ``data_dir`` as in :func:`online_source`."""
    top = _named(config, "offline")
    top.has("name")
    kind = cast(OfflineKind, top.choice("kind", KINDS))
    lengths = _lengths(top.section("lengths"), data_dir) if top.has("lengths") and kind != "none" else None
    rate_per_s = top.not_negative("rate_per_s") if top.has("rate_per_s") else None
    jobs = top.whole("jobs") if top.has("jobs") else None
    top.close()
    return OfflineWork(kind, lengths, rate_per_s, jobs)


def _named(config: Mapping[str, Any], group: str) -> Section:
    name = config.get("name") if isinstance(config, Mapping) else None
    top = Section(config, f"{group} '{name}'" if name else group)
    top.has("description")
    return top


def _rate_scale(top: Section) -> float:
    value = top.raw("rate_scale")
    if value == "auto":
        return 1.0
    try:
        return top.positive("rate_scale")
    except OocoError:
        message = f"{top.label('rate_scale')} is {value!r}, it must be 'auto' or a positive number"
        raise OocoError(message) from None


def _arrivals(section: Section) -> Arrivals:
    model = section.choice("model", ("poisson", "markov", "diurnal"))
    try:
        result = {"poisson": _poisson, "markov": _markov, "diurnal": _diurnal}[model](section)
    except OocoError as error:
        raise _placed(error, section) from None
    section.close()
    return result


def _poisson(section: Section) -> Arrivals:
    return PoissonArrivals(section.positive("rate_per_s"))


def _markov(section: Section) -> Arrivals:
    rates, matrix = section.array("rate_per_s", 1), section.array("transition_per_bin", 2)
    bin_s = section.positive("bin_s")
    if not section.has("ticks"):
        return MarkovArrivals(rates, matrix, bin_s)
    part = section.section("ticks")
    ticks = Ticks(
        period_s=part.positive("period_s"),
        probability=part.number("probability"),
        jitter_s=part.not_negative("jitter_s"),
        delay_s=part.not_negative("delay_s"),
    )
    part.close()
    return MarkovArrivals(rates, matrix, bin_s, ticks)


def _diurnal(section: Section) -> Arrivals:
    harmonics = section.array("harmonics", 2)
    if harmonics.shape[1] != 2:
        raise OocoError(f"{section.label('harmonics')} must be a list of [cosine, sine]")
    return DiurnalArrivals(
        mean_rate_per_s=section.positive("mean_rate_per_s"),
        harmonics=harmonics,
        residual_sigma=section.not_negative("residual_sigma"),
        residual_ar1=section.number("residual_ar1"),
        block_s=section.positive("block_s"),
        state_multiplier=section.array("state_multiplier", 1),
        transition_per_bin=section.array("transition_per_bin", 2),
        bin_s=section.positive("bin_s"),
        gamma_shape=section.positive("gamma_shape"),
        compress=section.positive("compress"),
    )


def _lengths(section: Section, data_dir: DataDir) -> Lengths:
    model = section.choice("model", ("mixture", "table", "fixed"))
    result: Lengths
    if model == "table":
        result = TableLengths(*read_lengths(find_data(section.text("file"), data_dir)))
    elif model == "fixed":
        result = FixedLengths(section.whole("prompt_tokens"), section.whole("output_tokens"))
    else:
        result = _mixture(section)
    section.close()
    return result


def _mixture(section: Section) -> Lengths:
    support = section.section("support")
    components = []
    for part in section.sections("components"):
        keys = ("mu_prompt", "mu_output", "sigma_prompt", "sigma_output", "rho")
        try:
            components.append(Component(part.positive("weight"), *(part.number(key) for key in keys)))
        except OocoError as error:
            raise _placed(error, part) from None
        part.close()
    try:
        result = MixtureLengths(
            components,
            cast(tuple[int, int], support.pair("prompt_tokens")),
            cast(tuple[int, int], support.pair("output_tokens")),
        )
    except OocoError as error:
        raise _placed(error, section) from None
    support.close()
    return result


def _placed(error: OocoError, section: Section) -> OocoError:
    """The error of a constructor, which does not know where in the file its values stood."""
    text = str(error)
    return error if text.startswith(section.where) else OocoError(f"{section.where}: {text}")
