"""From records to figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from streamserve_loadtest.records import Record, Run
from streamserve_loadtest.workloads import WORKLOADS, Limits

_SETTLE_S = 2.0  # of a steady group, before its undisturbed pace is taken
_MIN_INTERFERENCE_S = 3.0
GOOD_SHARE = 0.95


def percentile(weighted: Iterable[tuple[float, float]], share: float) -> float | None:
    """The smallest value that at least ``share`` of the weight does not exceed; None of nothing.

    ``weighted`` holds (value, weight).
    """
    ordered = sorted(weighted)
    target = share * sum(weight for _, weight in ordered)
    seen = 0.0
    for value, weight in ordered:
        seen += weight
        if seen >= target * (1 - 1e-12):
            return value
    return None


def quantiles(values: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """The percentiles that every report shows."""
    return {
        name: percentile(values, share)
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999))
    }


def summarize_gaps(
    records: Sequence[Record], window: tuple[float, float] | None = None
) -> dict[str, float | None]:
    """Inter-token latency over tokens; ``max`` is the longest pause between two chunks, unsplit.

    Only gaps that end within ``window``, if one is given.
    """
    start, end = window or (float("-inf"), float("inf"))
    gaps = []
    longest: float | None = None
    for record in records:
        for (ended, per_token, weight), pause in zip(
            record.token_gaps(), record.pauses(), strict=True
        ):
            if start <= ended <= end:
                gaps.append((per_token, weight))
                longest = pause if longest is None else max(longest, pause)
    return {**quantiles(gaps), "max": longest}


def summarize_records(records: Sequence[Record]) -> dict[str, Any]:
    """Figures of some requests of one run."""
    complete = [r for r in records if not r.error and not r.is_cancelled]
    firsts = [r.first_token_s for r in records if r.first_token_s is not None and not r.error]
    cached = [r.cached_tokens for r in complete if r.cached_tokens is not None]
    rates = [rate for r in complete if (rate := stream_rate(r)) is not None]
    begin = min((r.due_at for r in records), default=0.0)
    end = max((r.chunk_times[-1] for r in records if r.chunk_times), default=begin)
    num_tokens = sum(r.num_tokens for r in records)
    return {
        "requests": len(records),
        "errors": sum(1 for r in records if r.error),
        "cancelled": sum(1 for r in records if r.is_cancelled),
        "first_error": next((r.error for r in records if r.error), None),
        "tokens": num_tokens,
        "tokens_per_s": num_tokens / (end - begin) if end > begin else None,
        "stream_tokens_per_s": statistics.median(rates) if rates else None,
        "first_token_s": {
            **quantiles([(value, 1.0) for value in firsts]),
            "max": max(firsts, default=None),
        },
        "itl_s": summarize_gaps(records),
        "cached_tokens": statistics.median(cached) if cached else None,
        "prompt_tokens": _median([r.prompt_tokens for r in complete if r.prompt_tokens]),
        "short_answers": sum(1 for r in complete if r.num_tokens != r.planned_output_tokens),
        "merged_chunks": sum(
            1 for r in complete if r.completion_tokens and len(r.chunk_times) < r.completion_tokens
        ),
    }


def stream_rate(record: Record) -> float | None:
    """Tokens per second of one stream, from its first content byte to its last."""
    if len(record.chunk_times) < 2:
        return None
    seconds = record.chunk_times[-1] - record.chunk_times[0]
    tokens = sum(record.tokens_per_chunk()[1:])
    return tokens / seconds if seconds > 0 else None


def is_good(record: Record, limits: Limits) -> bool:
    """Whether a request kept to the limits. One that failed did not; one that left early may."""
    first = record.first_token_s
    if record.error or first is None or first > limits.first_token_s:
        return False
    itl = percentile([(gap, weight) for _, gap, weight in record.token_gaps()], 0.99)
    return itl is None or itl <= limits.itl_p99_s


def summarize(run: Run, limits: Limits | None = None) -> dict[str, Any]:
    """Figures of a run, in seconds: of all its requests, of each group, and what is its own."""
    groups: dict[str, list[Record]] = {}
    for record in run.records:
        groups.setdefault(record.group, []).append(record)
    summary = {
        "server": run.server,
        "workload": run.workload,
        "round": run.round_number,
        "rate": run.rate,
        "seconds": run.seconds,
        "generator_cpu_share": run.generator_cpu_share,
        **summarize_records(run.records),
        "groups": {name: summarize_records(records) for name, records in groups.items()},
    }
    known = WORKLOADS.get(run.workload)
    background = [g.name for g in known.groups if g.is_background] if known else []
    if background and len(groups) > len(background):
        summary["interference"] = _interference(groups, background)
    if any(record.turn for record in run.records):
        later = [record for record in run.records if record.turn]
        summary["later_turns"] = summarize_records(later)
    limits = limits or (known.limits if known else None)
    if limits is not None and run.records:
        good = sum(1 for record in run.records if is_good(record, limits))
        summary["good_share"] = good / len(run.records)
    return summary


def _interference(groups: dict[str, list[Record]], background: list[str]) -> dict[str, Any]:
    """The steady streams' pauses before the others came, and while they were there."""
    steady = [r for name in background for r in groups.get(name, [])]
    others = [r for name, records in groups.items() if name not in background for r in records]
    first_arrival = min(record.due_at for record in others)
    last_arrival = max(record.due_at for record in others)
    end = max(last_arrival + _MIN_INTERFERENCE_S, *(record.ended_at for record in others))
    undisturbed = summarize_gaps(steady, (_SETTLE_S, first_arrival))
    disturbed = summarize_gaps(steady, (first_arrival, end))
    return {
        "undisturbed_itl_s": undisturbed,
        "steady_itl_s": disturbed,
        "other_first_token_s": summarize_records(others)["first_token_s"],
    }


def goodput(summaries: Sequence[dict[str, Any]]) -> float | None:
    """The highest rate at which at least 95% are good; 0 if none is, None without rates.

    A rate counts by the mean over its rounds, and only if all lower ones hold too.
    """
    shares: dict[float, list[float]] = {}
    for summary in summaries:
        if summary["rate"] is not None and "good_share" in summary:
            shares.setdefault(summary["rate"], []).append(summary["good_share"])
    if not shares:
        return None
    best = 0.0
    for rate in sorted(shares):
        if statistics.fmean(shares[rate]) < GOOD_SHARE:
            break
        best = rate
    return best


def median_of(summaries: Sequence[dict[str, Any]], path: str) -> float | None:
    """The median over rounds of a figure by its dotted path (``/`` between names)."""
    values = [value for s in summaries if (value := _at(s, path)) is not None]
    return statistics.median(values) if values else None


def _at(content: dict[str, Any], path: str) -> float | None:
    value: Any = content
    for name in path.split("/"):
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else None


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
