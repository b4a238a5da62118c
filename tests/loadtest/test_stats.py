"""From records to figures, by hand-made records."""

import pytest

from streamserve_loadtest.ratios import ratio_lines
from streamserve_loadtest.stats import (
    goodput,
    is_good,
    median_of,
    percentile,
    summarize,
    summarize_gaps,
)
from streamserve_loadtest.workloads import SMALL_MODEL
from tests.loadtest.canned import record, run


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1.0), (0.5, 5.0), (0.9, 9.0), (0.99, 10.0), (1.0, 10.0)]
)
def test_percentiles_are_nearest_ranks(share, expected):
    assert percentile([(float(n), 1.0) for n in range(10, 0, -1)], share) == expected


def test_percentiles_follow_the_weight():
    assert percentile([(1.0, 1.0), (2.0, 98.0), (3.0, 1.0)], 0.5) == 2.0
    assert percentile([(1.0, 9.0), (5.0, 1.0)], 0.9) == 1.0
    assert percentile([], 0.5) is None


def test_a_chunk_of_several_tokens_counts_as_several_gaps():
    merged = record(gaps=(0.01, 0.03), chunk_chars=[3, 3, 9], completion_tokens=8)
    assert merged.tokens_per_chunk() == [2.0, 2.0, 4.0]
    [(_, first, first_weight), (_, second, second_weight)] = merged.token_gaps()
    assert (first_weight, second_weight) == (2.0, 4.0)
    assert (first, second) == (pytest.approx(0.005), pytest.approx(0.0075))
    assert summarize_gaps([merged])["max"] == pytest.approx(0.03)


def test_a_cancelled_answer_counts_its_chunks():
    cut = record(gaps=(0.01,) * 7, completion_tokens=None, is_cancelled=True)
    assert cut.num_tokens == 8
    assert cut.tokens_per_chunk() == [1.0] * 8


def test_tokens_are_counted_by_usage_over_the_whole_run():
    summary = summarize(run([record(), record(due_at=1.0)]))
    assert summary["tokens"] == 20
    assert summary["tokens_per_s"] == pytest.approx(20 / 1.19)
    assert summary["stream_tokens_per_s"] == pytest.approx(100.0)
    assert summary["first_token_s"]["p50"] == pytest.approx(0.1)
    assert summary["errors"] == summary["short_answers"] == summary["merged_chunks"] == 0


def test_errors_are_counted_and_the_first_is_named():
    summary = summarize(run([record(), record(error="HTTP 500: no"), record(error="later")]))
    assert (summary["errors"], summary["first_error"]) == (2, "HTTP 500: no")


def test_interference_is_taken_from_the_first_arrival_on():
    steady = record(
        group="steady", first=0.5, gaps=(0.02,) * 300 + (0.5,) + (0.02,) * 100, is_cancelled=True
    )
    long = record(group="long", due_at=6.5, first=0.6)
    other = summarize(run([steady, long], workload="W3"))["interference"]
    assert other["undisturbed_itl_s"]["max"] == pytest.approx(0.02)
    assert other["steady_itl_s"]["max"] == pytest.approx(0.5)
    assert other["other_first_token_s"]["p50"] == pytest.approx(0.6)


def test_second_turns_are_reported_apart():
    turns = [record(first=0.5), record(due_at=1.0, first=0.05, turn=1, cached_tokens=990)]
    later = summarize(run(turns, workload="W4"))["later_turns"]
    assert later["first_token_s"]["p50"] == pytest.approx(0.05)
    assert later["cached_tokens"] == 990


def test_when_a_request_is_good():
    assert is_good(record(), SMALL_MODEL)
    assert is_good(record(is_cancelled=True), SMALL_MODEL)
    assert not is_good(record(first=0.51), SMALL_MODEL)
    assert not is_good(record(gaps=(0.01,) * 20 + (0.11,)), SMALL_MODEL)
    assert not is_good(record(error="HTTP 503"), SMALL_MODEL)
    assert not is_good(record(chunk_times=[]), SMALL_MODEL)


def curve(shares: dict[float, float], server: str = "ours") -> list[dict]:
    summaries = []
    for rate, share in shares.items():
        num_good = round(20 * share)
        records = [record() for _ in range(num_good)]
        records += [record(first=2.0) for _ in range(20 - num_good)]
        summaries.append(summarize(run(records, workload="W6", rate=rate, server=server)))
    return summaries


def test_goodput_ends_at_the_first_rate_that_does_not_hold():
    assert goodput(curve({1.0: 1.0, 2.0: 0.95, 3.0: 0.9, 4.0: 1.0})) == 2.0
    assert goodput(curve({1.0: 0.5})) == 0.0
    assert goodput([summarize(run([record()]))]) is None


def test_medians_over_rounds():
    runs = [run([record(first=f)], round_number=n) for n, f in enumerate((0.3, 0.1, 0.2))]
    summaries = [summarize(r) for r in runs]
    assert median_of(summaries, "first_token_s/p50") == pytest.approx(0.2)
    assert median_of(summaries, "later_turns/first_token_s/p50") is None


def test_ratios_are_to_the_best_other_of_the_same_precision():
    servers = {
        "ours": {"precision": "bf16", "is_ours": True},
        "slow": {"precision": "bf16", "is_ours": False},
        "fast": {"precision": "bf16", "is_ours": False},
        "small": {"precision": "int8", "is_ours": False},
    }
    gaps = {"ours": 0.01, "slow": 0.05, "fast": 0.02, "small": 0.001}
    summaries = [
        summarize(run([record(gaps=(gap,) * 9)], server=name, workload="W1"))
        for name, gap in gaps.items()
    ]
    floors = [{"bf16": 200.0, "int8": 2000.0}]
    lines = ratio_lines(summaries, "W1", servers, floors)
    assert lines[0].startswith("ours against the best other: tok/s 2.00× (fast: 50.0)")
    assert lines[1] == "memory floor bf16: 200 tok/s; of it ours 50%, slow 10%, fast 25%"
    assert lines[2] == "memory floor int8: 2000 tok/s; of it small 50%"


def test_ratio_of_goodput():
    servers = {
        "ours": {"precision": "bf16", "is_ours": True},
        "other": {"precision": "bf16", "is_ours": False},
    }
    summaries = curve({1.0: 1.0, 2.0: 1.0, 3.0: 1.0}) + curve({1.0: 1.0, 2.0: 0.5}, "other")
    [line] = ratio_lines(summaries, "W6", servers, [])
    assert "goodput 3.00× (other: 1/s)" in line
