"""Which figures of a workload are shown, and how they are written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Column:
    """One figure: where ``summarize`` puts it, its unit, and which way is better.

    ``is_rated`` columns are compared with the others' best.
    """

    title: str
    path: str
    unit: str = "ms"
    is_higher_better: bool = False
    is_rated: bool = False


TOKENS_PER_S = Column("tok/s", "tokens_per_s", "rate", is_higher_better=True, is_rated=True)
FIRST_P50 = Column("first p50", "first_token_s/p50")
FIRST_P99 = Column("first p99", "first_token_s/p99", is_rated=True)
ITL_P50 = Column("ITL p50", "itl_s/p50")
ITL_P99 = Column("ITL p99", "itl_s/p99", is_rated=True)
CACHED = Column("cached", "cached_tokens", "count")

GENERAL = (TOKENS_PER_S, FIRST_P50, FIRST_P99, ITL_P50, ITL_P99, CACHED)
COLUMNS: dict[str, tuple[Column, ...]] = {
    "W1": (
        Column("tok/s", "stream_tokens_per_s", "rate", is_higher_better=True, is_rated=True),
        FIRST_P50,
        ITL_P50,
        ITL_P99,
    ),
    "W2": GENERAL,
    "W3": (
        Column("alone p50", "interference/undisturbed_itl_s/p50"),
        Column("steady p50", "interference/steady_itl_s/p50"),
        Column("p99", "interference/steady_itl_s/p99", is_rated=True),
        Column("p99.9", "interference/steady_itl_s/p99.9"),
        Column("max", "interference/steady_itl_s/max"),
        Column("long first", "interference/other_first_token_s/p50", is_rated=True),
    ),
    "W4": (
        Column("turn 2 first", "later_turns/first_token_s/p50", is_rated=True),
        Column("cached", "later_turns/cached_tokens", "count"),
        Column("prompt", "later_turns/prompt_tokens", "count"),
    ),
    "W5": (TOKENS_PER_S, FIRST_P50, FIRST_P99, ITL_P50, ITL_P99),
    "W6": (
        Column("good", "good_share", "percent", is_higher_better=True),
        FIRST_P50,
        FIRST_P99,
        ITL_P50,
        ITL_P99,
        TOKENS_PER_S,
    ),
}


def columns_of(workload: str) -> tuple[Column, ...]:
    """The columns of a known workload, or those that fit any."""
    return COLUMNS.get(workload, GENERAL)


def written(value: float | None, unit: str) -> str:
    """A figure as people read it: seconds as milliseconds, three digits or so."""
    if value is None:
        return "–"
    if unit == "percent":
        return f"{value:.0%}"
    if unit == "count":
        return f"{value:,.0f}"
    scaled = value * 1000 if unit == "ms" else value
    digits = 1 if abs(scaled) < 100 else 0
    return f"{scaled:,.{digits}f}" + (" ms" if unit == "ms" else "")
