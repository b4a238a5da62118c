"""How many prompt tokens a step may carry besides the decodes."""

from __future__ import annotations

from streamserve.config import SchedulerConfig


def prefill_budget(config: SchedulerConfig, num_decodes: int) -> int:
    """Tokens of one step for everything but ``num_decodes`` requests that need one token each.

    This is the one place that sizes chunks: today by the token budget alone.
    """
    return max(config.max_num_batched_tokens - num_decodes, 0)
