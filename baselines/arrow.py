"""Arrow-like role switching (Wu et al., arXiv 2505.11916): instances change pool as the load changes its mix.

Every interval the pressure on either pool is read from telemetry: predicted prefill ahead of a new online request, as a
share of the TTFT SLO, and predicted strict iteration of the online part, as a share of the TPOT SLO. The share of
strict instances leans towards the pool under more pressure. The simulator changes one role per 10 s and drains first,
where Arrow's instances are stateless and switch at once. Offline work fills as under online-priority.
"""

from collections.abc import Mapping

from ooco_gym.cluster.control import KNOB_NAMES, check_rules, ooco_knobs
from ooco_gym.policy import Knobs, Telemetry

_SHARE = KNOB_NAMES.index("strict_share")


class Arrow:
    """A policy that remembers how far it leans; 0 is the configured split."""

    name = "arrow"
    description = "pools that change size with the pressure on them"
    rules: Mapping[str, str] = check_rules({"preemption": "iteration", "offline_decode": "strict"})

    def __init__(self) -> None:
        self.lean = 0.0

    def reset(self) -> None:
        self.lean = 0.0

    def decide(self, telemetry: Telemetry) -> Knobs:
        prefill = telemetry["queued_prefill_max_s"] / telemetry["ttft_slo_s"]
        decode = telemetry["strict_online_s_max"] / telemetry["tpot_slo_s"]
        if max(prefill, decode) > 0.5:
            self.lean += 0.05 if decode > prefill else -0.05
        self.lean = min(max(0.98 * self.lean, -0.5), 0.5)  # back to the configured split when nothing presses
        knobs = ooco_knobs()
        knobs[_SHARE] = self.lean
        return knobs


POLICY = Arrow()
