"""What the gateway predicts with: seconds by the scenario's scheduler cost, and prompt lengths before anyone tokenised.

The cost is the same record that the simulated scheduler reads, so live Telemetry has the units of the simulated one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ooco_gym.bridge.gateway.correction import Correction
from ooco_gym.roofline import causal_pairs, decode_affine, decode_s, iteration_s, prefill_s
from ooco_gym.scenario import Scenario

DECAY = 0.98  # of what was learned about lengths, per answer


class Prediction:
    """Predicted seconds on each instance, by its row in the scenario; iterations that decode are corrected."""

    def __init__(self, scenario: Scenario) -> None:
        self._costs = [scenario.scheduler_cost[row] for row in range(scenario.instances)]
        self._alone_s = [float(decode_s(cost, 1.0, 1.0)) for cost in self._costs]
        self.corrections = [Correction() for _ in self._costs]
        self.prefill_s(0, 1)  # compiled or loaded before the first request waits for it
        self.affine_s(0, 1)
        self.mixed_s(0, 1, 1, 1)

    def prefill_s(self, instance: int, tokens: float) -> float:
        """A prompt of ``tokens``, alone in its iteration."""
        return float(prefill_s(self._costs[instance], float(max(tokens, 1))))

    def decode_s(self, instance: int, batch: float, context_tokens: float) -> float:
        """A decode iteration of ``batch`` sequences with ``context_tokens`` in total; 0 for none."""
        if batch <= 0:
            return 0.0
        return self._corrected(instance, decode_s(self._costs[instance], float(batch), float(context_tokens)), batch)

    def affine_s(self, instance: int, batch: float) -> tuple[float, float]:
        """(c0, c1) of a decode iteration of ``batch`` sequences, c0 + c1 * context."""
        c0, c1 = decode_affine(self._costs[instance], float(batch))
        return self._corrected(instance, c0, batch), self.corrections[instance].a * float(c1)

    def mixed_s(self, instance: int, tokens: int, batch: int, context_tokens: int) -> float:
        """An iteration that decodes ``batch`` sequences and computes the first ``tokens`` of a prompt besides."""
        new, longest = float(tokens), context_tokens / max(batch, 1)
        cost, pairs = self._costs[instance], float(causal_pairs(float(tokens), 0.0))
        seconds = iteration_s(cost, new, pairs, new * new, new, 1.0, float(batch), float(context_tokens), longest)
        return self._corrected(instance, seconds, batch + 1)

    def _corrected(self, instance: int, predicted_s: float, batch: float) -> float:
        return self.corrections[instance].corrected_s(float(predicted_s), batch, self._alone_s[instance])

    def observed(self, instance: int, gap_s: float, tokens: float, batch: float, context_tokens: float) -> None:
        """An engine left ``gap_s`` between ``tokens`` pairs of tokens, in the mean, at this mean load."""
        if batch > 0:
            batch = max(batch, 1.0)
            predicted_s = float(decode_s(self._costs[instance], batch, context_tokens))
            self.corrections[instance].observe(gap_s, tokens, predicted_s, batch, self._alone_s[instance])


class PromptLengths:
    """Tokens of a prompt: counted where it is token ids, else its characters over a ratio learned from ``usage``."""

    def __init__(self, characters_per_token: float) -> None:
        self._sums: dict[str, list[float]] = {}
        self._start = characters_per_token

    def estimate(self, path: str, payload: Mapping[str, Any]) -> int:
        """Prompt tokens of a request body, at least 1."""
        characters, tokens = measure(payload)
        return max(int(tokens + characters / self.ratio(path)), 1)

    def ratio(self, path: str) -> float:
        """Characters per token."""
        sums = self._sums.get(path)
        return sums[0] / sums[1] if sums else self._start

    def learn(self, path: str, payload: Mapping[str, Any], prompt_tokens: int) -> None:
        """An engine counted the tokens of this body."""
        characters, tokens = measure(payload)
        if characters == 0 or prompt_tokens <= tokens:
            return
        sums = self._sums.setdefault(path, [0.0, 0.0])
        sums[0] = sums[0] * DECAY + characters
        sums[1] = sums[1] * DECAY + prompt_tokens - tokens


def measure(payload: Mapping[str, Any]) -> tuple[int, int]:
    """(characters, token ids) of the prompt or the messages of a body."""
    if "messages" in payload:
        messages = payload["messages"]
        return sum(_characters(message) for message in messages) if isinstance(messages, list) else 0, 0
    return _measure_prompt(payload.get("prompt"))


def _measure_prompt(prompt: Any) -> tuple[int, int]:
    if isinstance(prompt, str):
        return len(prompt), 0
    if not isinstance(prompt, list) or not prompt:
        return 0, 0
    if isinstance(prompt[0], int):
        return 0, len(prompt)
    parts = [_measure_prompt(part) for part in prompt]
    return sum(part[0] for part in parts), sum(part[1] for part in parts)


def _characters(message: Any) -> int:
    content = message.get("content") if isinstance(message, Mapping) else None
    if isinstance(content, str):
        return len(content)
    if isinstance(content, list):
        return sum(len(part["text"]) for part in content
                   if isinstance(part, Mapping) and isinstance(part.get("text"), str))  # fmt: skip
    return 0
