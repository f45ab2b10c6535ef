"""OOCO as the xLLM report describes it (arXiv 2510.14686, section 3.1), where that goes beyond the open implementation.

Added to ``ooco``: migration strict -> relaxed when a strict instance nears its KV limit, and a selection that stops
exactly at the bound instead of up to two sequences beyond it. Two of the report's ideas are not in the mechanism and
are left out: constants corrected online from observed steps (the scheduler's cost model is fixed in an episode), and a
choice of the mixed offline decodes by length (mix selection is first come, first served; only the pull chooses by
length).
"""

from ooco_gym.policy import ConstantPolicy

POLICY = ConstantPolicy(
    name="ooco-report",
    rules={"mix_selection": "exact"},
    knobs={"pushback": 0.95, "pull_kv": 0.9},
    description="the paper's scheduler as the report describes it",
)
