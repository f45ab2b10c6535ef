"""Correction of predicted iterations by what an engine shows: two factors, learned while it serves.

The scenario's cost model knows the device, not what an engine spends on each sequence outside the device, nor a machine
that it shares. The paper's system corrects its constants from observed steps; so does this, from the mean gap between
two tokens of a request that vLLM reports (``vllm:inter_token_latency_seconds``). With t the predicted iteration of a
batch of B sequences and t1 that of a lone one, the observed gap is taken to be

    a t + b B t1

and (a, b) is the least-squares fit to the relative errors, weighted by tokens, old observations fading, and drawn
towards (1, 0) by PRIOR_TOKENS of belief in the model.
"""

from __future__ import annotations

import math

PRIOR_TOKENS = 200.0
MEMORY_TOKENS = 5000.0  # gaps between tokens after which an observation has faded to 1/e
LARGEST = 50.0  # of both factors; a scenario that is further off is one of another device


class Correction:
    """One instance's factors ``a`` and ``b``; nothing is corrected before there was an observation."""

    def __init__(self) -> None:
        self.a, self.b = 1.0, 0.0
        self._xx = self._xy = self._yy = self._xt = self._yt = 0.0

    def corrected_s(self, predicted_s: float, batch: float, alone_s: float) -> float:
        """Seconds of an iteration of ``batch`` sequences, of which the model says ``predicted_s``."""
        return self.a * predicted_s + self.b * batch * alone_s

    def observe(self, gap_s: float, tokens: float, predicted_s: float, batch: float, alone_s: float) -> None:
        """An engine left ``gap_s`` between ``tokens`` pairs of tokens, in the mean, at a load of ``batch``."""
        if not (gap_s > 0.0 and tokens > 0.0 and predicted_s > 0.0):
            return
        keep, y, target = math.exp(-tokens / MEMORY_TOKENS), batch * alone_s / predicted_s, gap_s / predicted_s
        self._xx = keep * self._xx + tokens
        self._xy = keep * self._xy + tokens * y
        self._yy = keep * self._yy + tokens * y * y
        self._xt = keep * self._xt + tokens * target
        self._yt = keep * self._yt + tokens * y * target
        xx, yy, xt = self._xx + PRIOR_TOKENS, self._yy + PRIOR_TOKENS, self._xt + PRIOR_TOKENS
        b = (xx * self._yt - self._xy * xt) / (xx * yy - self._xy * self._xy)
        self.b = min(max(b, 0.0), LARGEST)
        self.a = min(max((xt - self.b * self._xy) / xx, 1.0 / LARGEST), LARGEST)
