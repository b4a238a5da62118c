"""Hypothesis profiles, chosen by HYPOTHESIS_PROFILE; the default is quick and reproducible.

Without one an example that takes 0.2 s on a busy machine is a failure, in whichever folder.
"""

import os

from hypothesis import HealthCheck, Phase, settings

COMMON = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("quick", derandomize=True, **COMMON)
settings.register_profile("thorough", max_examples=3000, stateful_step_count=100, **COMMON)
settings.register_profile(  # for mutants: whether something fails, not the smallest example
    "unshrunk",
    derandomize=True,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.generate],
    **COMMON,
)


def load_profile() -> None:
    """For all tests of this process."""
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
