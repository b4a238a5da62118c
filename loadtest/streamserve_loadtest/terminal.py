"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamserve_loadtest.columns import columns_of, written
from streamserve_loadtest.stats import goodput, median_of


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, the first to the left, a rule below the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        first, *others = row
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def servers_of(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """The servers in the order of their first run."""
    return list(dict.fromkeys(summary["server"] for summary in summaries))


def select(
    summaries: Sequence[dict[str, Any]],
    *,
    server: str | None = None,
    workload: str | None = None,
    rate: float | None = None,
) -> list[dict[str, Any]]:
    """The summaries that match."""
    return [
        summary
        for summary in summaries
        if (server is None or summary["server"] == server)
        and (workload is None or summary["workload"] == workload)
        and (rate is None or summary["rate"] == rate)
    ]


def rows_of(summaries: Sequence[dict[str, Any]], workload: str) -> list[list[str]]:
    """A head and a line for each server (and rate): medians over the rounds."""
    columns = columns_of(workload)
    of_workload = select(summaries, workload=workload)
    rates = sorted({summary["rate"] for summary in of_workload if summary["rate"] is not None})
    rows = [["server", *(column.title for column in columns), "errors"]]
    for server in servers_of(of_workload):
        for rate in rates or [None]:
            own = select(of_workload, server=server, rate=rate)
            if not own:
                continue
            name = server if rate is None else f"{server} @ {rate:g}/s"
            cells = [written(median_of(own, c.path), c.unit) for c in columns]
            errors = sum(summary["errors"] for summary in own)
            requests = sum(summary["requests"] for summary in own)
            rows.append([name, *cells, f"{errors}/{requests}"])
    return rows


def workload_report(summaries: Sequence[dict[str, Any]], workload: str, title: str) -> str:
    """A workload's table with what a reader should know about it."""
    own = select(summaries, workload=workload)
    num_rounds = len({summary["round"] for summary in own})
    cpu = max(summary["generator_cpu_share"] for summary in own)
    lines = [
        f"{workload}: {title} ({num_rounds} round{'s' * (num_rounds > 1)}, medians; "
        f"the generator took {cpu:.0%} of a core)",
        table(rows_of(summaries, workload)),
    ]
    for server in servers_of(own):
        of_server = select(own, server=server)
        best = goodput(of_server)
        name = server or "goodput"
        if best is not None:
            lines.append(f"{name}: {best:g} conversations/s with at least 95% good")
        if error := next((s["first_error"] for s in of_server if s["first_error"]), None):
            lines.append(f"{name}: first error: {error[:300]}")
        if short := sum(s["short_answers"] for s in of_server):
            lines.append(f"{name}: {short} answers had another length than asked for")
        if merged := sum(s["merged_chunks"] for s in of_server):
            lines.append(f"{name}: {merged} streams had chunks of several tokens")
    return "\n".join(lines)
