"""An upper bound on offline work: what no scheduler can exceed, however clairvoyant.

Every iteration pays, per operator, sqrt(compute^2 + memory^2) + fixed time (docs/roofline.md). Summed over all
iterations of an episode, Minkowski's inequality gives

    sum of sqrt(c_i^2 + m_i^2)  >=  sqrt((sum of c_i)^2 + (sum of m_i)^2)

whatever the batches were; where an operator costs the larger of the two, the larger of the sums bounds it the same way.
The sums are linear in the work: compute in tokens and attention pairs; memory in tokens, KV reads and, per iteration,
the weights. The number of iterations is at least the prompt tokens over the largest batch, and at least the KV read by
all decode steps over what one cache holds. So an episode with its online requests and x times the offline mix
takes no less than T(x) instance seconds, and x is bounded by T(x) = instances * horizon.

What makes it loose, in the order of its weight: latency objectives are ignored; the pools' roles are ignored (both
phases overlap freely on all instances, and every weight read serves a full batch); the warm-up's instance seconds are
all given to work that counts; padding, chaining and transfers are free; among different devices all count as the best.
It is an expectation over iteration noise and holds for the mean offline mix: a scheduler that could pick short jobs out
of the backlog is not covered. Requests that no instance can hold are rejected and cost nothing. Of the online requests
the share that may be late is left unserved, and the most expensive ones at that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq

from ooco_gym.cluster.outcome import FEASIBLE_VIOLATION_RATE
from ooco_gym.roofline import COST
from ooco_gym.scenario import Scenario

LM_HEAD = 4
Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Work:
    """Sums over requests: what any schedule has to compute and to read at least."""

    prompt_tokens: float
    decode_tokens: float  # every output token but the first, which prefill emits
    requests: float
    prefill_pairs: float  # (query, key) pairs of causal attention over whole prompts
    decode_context: float  # KV tokens read by all decode steps
    output_tokens: float

    @staticmethod
    def of(prompt: npt.ArrayLike, output: npt.ArrayLike) -> Work:
        """The work of requests with these lengths, tokens [N]."""
        p, o = np.asarray(prompt, float), np.asarray(output, float)
        steps = o - 1.0
        # Step j reads the prompt and j tokens generated before it, j = 1 .. o - 1.
        context = p * steps + 0.5 * steps * (steps + 1.0)
        return Work(p.sum(), steps.sum(), float(p.size), (p * (p + 1.0) / 2.0).sum(), context.sum(), o.sum())

    def plus(self, other: Work, times: float = 1.0) -> Work:
        mine, theirs = vars(self), vars(other)
        return Work(**{name: mine[name] + times * theirs[name] for name in mine})

    def times(self, share: float) -> Work:
        return Work(**{name: share * value for name, value in vars(self).items()})


@dataclass(frozen=True)
class Bound:
    """The most offline work per second of an episode; ``useful`` as in ``offline_ideal_s_per_instance_s``."""

    offline_requests_per_s: float
    offline_output_tokens_per_s: float
    useful: float


def instance_seconds(work: Work, cost: np.void, largest_batch_tokens: float, kv_tokens: float) -> float:
    """The least instance seconds that some work takes; ``cost`` is one record of dtype COST."""
    tokens = work.prompt_tokens + work.decode_tokens
    iterations = max(work.prompt_tokens / largest_batch_tokens, work.decode_context / kv_tokens)
    touched = np.ones(6)  # share of the weights that an iteration reads
    if cost["log_untouched"] != 0.0:
        # Experts touched grow concavely with the tokens: per token, an iteration of the largest batch touches fewest.
        all_tokens = largest_batch_tokens + kv_tokens
        per_token = -np.expm1(all_tokens * cost["log_untouched"]) / all_tokens
        touched[2:4] = min(1.0, per_token * tokens / max(iterations, 1e-12))
    rows = np.full(6, tokens)
    rows[LM_HEAD] = work.requests + work.decode_tokens
    compute = cost["gemm_row_compute_s"] * rows
    memory = cost["gemm_weight_s"] * touched * iterations + cost["gemm_row_memory_s"] * rows
    layers = np.full(6, cost["layers"])
    layers[LM_HEAD] = 1.0
    gemms = float((layers * (_operator_s(cost, compute, memory) + cost["gemm_fixed_s"] * iterations)).sum())
    read_s = cost["kv_s"] * (work.prompt_tokens + work.decode_context) + cost["query_s"] * tokens
    attention = float(_operator_s(cost, np.asarray(cost["pair_s"] * work.prefill_pairs), np.asarray(read_s)))
    rest = cost["token_s"] * tokens + cost["layer_fixed_s"] * iterations
    return float(gemms + cost["layers"] * (attention + rest) + cost["host_s"] * iterations)


def _operator_s(
    cost: np.void, compute_s: npt.NDArray[np.float64], memory_s: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    return np.maximum(compute_s, memory_s) if cost["hard_max"] > 0.5 else np.hypot(compute_s, memory_s)


def cheapest_cost(scenario: Scenario) -> np.void:
    """The smallest of each coefficient over the instances: one record that none of them undercuts."""
    costs, least = scenario.true_cost, np.zeros(1, COST)
    for name in COST.names or ():
        least[name] = costs[name].max(0) if name == "log_untouched" else costs[name].min(0)
    record: np.void = least[0]
    return record


def offline_bound(scenario: Scenario, seeds: Sequence[int], must_serve: float = 1.0 - FEASIBLE_VIOLATION_RATE) -> Bound:
    """The bound over the episodes of ``seeds``, with that share of each one's online requests served."""
    online = offline = Work(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    largest = scenario.cluster.max_batch_tokens  # or one longer prompt, which makes a batch of its own
    for seed in seeds:
        prompt, output = _due_and_served(scenario, seed, must_serve)
        online = online.plus(Work.of(prompt, output), 1.0 / len(seeds))
        jobs = scenario.offline.sample(seed, scenario.horizon_s)
        held = _fits(scenario, jobs.prompt_tokens, jobs.output_tokens)
        job_prompt, job_output = jobs.prompt_tokens[held], jobs.output_tokens[held]
        largest = max(largest, *(int(tokens.max()) for tokens in (prompt, job_prompt) if len(tokens)), 0)
        if len(job_prompt):
            offline = offline.plus(Work.of(job_prompt, job_output), 1.0 / len(job_prompt) / len(seeds))
    if offline.requests == 0.0:
        return Bound(0.0, 0.0, 0.0)
    cost = cheapest_cost(scenario)
    available_s = scenario.instances * scenario.horizon_s
    kv_tokens = float(max(scenario.instance_kv_blocks) * scenario.cluster.block_tokens)

    def left_s(jobs: float) -> float:
        return available_s - instance_seconds(online.plus(offline, jobs), cost, float(largest), kv_tokens)

    if left_s(0.0) <= 0.0:
        return Bound(0.0, 0.0, 0.0)
    most = available_s / instance_seconds(offline, cost, float(largest), kv_tokens)
    jobs_per_s = float(brentq(left_s, 0.0, most)) / scenario.episode_s
    useful = (
        offline.prompt_tokens * scenario.ideal_prompt_token_s + offline.output_tokens * scenario.ideal_output_token_s
    )
    return Bound(jobs_per_s, jobs_per_s * offline.output_tokens, jobs_per_s * useful / scenario.instances)


def _fits(scenario: Scenario, prompt: Tokens, output: Tokens) -> npt.NDArray[np.bool_]:
    """Whether requests are served at all: within the model's context and the smallest KV cache."""
    context = prompt.astype(np.int64) + output
    blocks = -(-context // scenario.cluster.block_tokens)
    fits: npt.NDArray[np.bool_] = (context <= scenario.model.max_context_tokens) & (
        blocks <= min(scenario.instance_kv_blocks)
    )
    return fits


def _due_and_served(scenario: Scenario, seed: int, must_serve: float) -> tuple[Tokens, Tokens]:
    """Prompts and outputs of the online requests of one episode that have to be served within it."""
    requests = scenario.online.sample(seed, scenario.horizon_s)
    prompt, output = requests.prompt_tokens, requests.output_tokens
    classes = scenario.slo.classes or (scenario.slo,)  # every request as if of the loosest
    ttft_s, tpot_s = max(one.ttft_s for one in classes), max(one.tpot_s for one in classes)
    deadline_s = requests.arrival_s + ttft_s + (output - 1) * tpot_s
    due = (deadline_s <= scenario.horizon_s) & _fits(scenario, prompt, output)  # others may be put off
    prompt, output = prompt[due], output[due]
    cost = cheapest_cost(scenario)
    prompts, outputs = prompt.astype(float), output.astype(float)
    pairs = prompts * (prompts + 1.0) / 2.0
    worth_s = (
        scenario.ideal_prompt_token_s * prompts
        + float(cost["layers"] * cost["pair_s"]) * pairs
        + scenario.ideal_output_token_s * outputs
    )
    cheapest = np.argsort(worth_s, kind="stable")[: int(np.floor(must_serve * len(worth_s)))]
    return prompt[cheapest], output[cheapest]
