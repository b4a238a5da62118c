"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass

from streamserve.core.pacing_stats import PacingStats
from streamserve.core.speculation import SpeculationStats


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot; from ``prefix_query_tokens`` on since the start. The usages are 0 to 1."""

    num_running: int
    num_waiting: int
    kv_usage: float
    kv_host_usage: float
    prefix_query_tokens: int
    prefix_hit_tokens: int
    prefix_host_hit_tokens: int  # copied back from host memory to be hits
    kv_stored_tokens: int  # copied to host memory
    num_steps: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    kv_tokens_saved: int  # not read again, as requests of a step share them
    num_compilations: int  # of kernels, by this process
    pacing: PacingStats
    speculation: SpeculationStats
