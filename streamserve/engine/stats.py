"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass

from streamserve.core.pacing_stats import PacingStats
from streamserve.core.scheduler import Scheduler
from streamserve.core.speculation import SpeculationStats


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot; from ``prefix_query_tokens`` on since the start. The usages are 0 to 1."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int  # to be computed for them
    num_paused: int
    kv_usage: float
    kv_host_usage: float
    num_kept_states: int  # of models whose layers keep some: for whoever has their prefix
    prefix_query_tokens: int
    prefix_hit_tokens: int
    prefix_host_hit_tokens: int  # copied back from host memory to be hits
    kv_stored_tokens: int  # copied to host memory
    num_state_evictions: int  # kept ones whose slots were taken
    num_steps: int
    num_failed_steps: int
    num_rolled_back: int  # times that a request was in one of them, and began it again
    num_preemptions: int
    num_pauses: int  # times that a reader took nothing and its request left its seat
    prompt_tokens: int
    generation_tokens: int
    kv_tokens_saved: int  # not read again, as requests of a step share them
    num_compilations: int  # of kernels, by this process
    pacing: PacingStats
    speculation: SpeculationStats


def stats_of(
    scheduler: Scheduler,
    *,
    num_steps: int,
    num_failed_steps: int,
    num_preemptions: int,
    prompt_tokens: int,
    generation_tokens: int,
    num_compilations: int,
) -> EngineStats:
    """What the engine has counted, and what its scheduler has."""
    cache = scheduler.kv_cache
    return EngineStats(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        num_waiting_tokens=scheduler.count_waiting_tokens(),
        num_paused=scheduler.num_paused,
        kv_usage=cache.usage,
        kv_host_usage=cache.host_usage,
        num_kept_states=cache.num_kept_states,
        prefix_query_tokens=cache.stats.num_queried_tokens,
        prefix_hit_tokens=cache.stats.num_hit_tokens,
        prefix_host_hit_tokens=cache.stats.num_host_hit_tokens,
        kv_stored_tokens=cache.stats.num_stored_tokens,
        num_state_evictions=cache.stats.num_state_evictions,
        num_steps=num_steps,
        num_failed_steps=num_failed_steps,
        num_rolled_back=scheduler.recovery.num_rolled_back,
        num_preemptions=num_preemptions,
        num_pauses=scheduler.num_pauses,
        prompt_tokens=prompt_tokens,
        generation_tokens=generation_tokens,
        kv_tokens_saved=scheduler.prefix_grouping.num_saved_tokens,
        num_compilations=num_compilations,
        pacing=scheduler.pacer.stats,
        speculation=scheduler.speculation_stats,
    )
