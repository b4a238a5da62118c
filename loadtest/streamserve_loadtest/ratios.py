"""Ours against the best of the others at the same precision, and against the memory floor."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from streamserve_loadtest.columns import Column, columns_of, written
from streamserve_loadtest.stats import goodput, median_of
from streamserve_loadtest.terminal import select, servers_of


def ratio_lines(
    summaries: Sequence[dict[str, Any]],
    workload: str,
    servers: Mapping[str, dict[str, Any]],
    floors: Sequence[dict[str, float]],
) -> list[str]:
    """A line for each of our servers.

    ``servers`` maps a name to its ``precision`` and ``is_ours``; ``floors`` holds the floor in
    tokens per second by precision, one for each time it was measured.
    """
    own = select(summaries, workload=workload)
    lines = []
    for server in servers_of(own):
        if not servers[server]["is_ours"]:
            continue
        precision = servers[server]["precision"]
        others = [
            name
            for name in servers_of(own)
            if servers[name]["precision"] == precision and not servers[name]["is_ours"]
        ]
        parts = [
            part
            for column in columns_of(workload)
            if column.is_rated and (part := _ratio(own, column, server, others))
        ]
        if rates := _goodput_ratio(own, server, others):
            parts.append(rates)
        if parts:
            lines.append(f"{server} against the best other: " + "; ".join(parts))
    if workload == "W1":
        lines += _floor_lines(own, servers, floors)
    return lines


def _ratio(
    summaries: Sequence[dict[str, Any]], column: Column, server: str, others: Sequence[str]
) -> str | None:
    ours = median_of(select(summaries, server=server), column.path)
    theirs = {
        name: value
        for name in others
        if (value := median_of(select(summaries, server=name), column.path))
    }
    if ours is None or not theirs:
        return None
    pick = max if column.is_higher_better else min
    best = pick(theirs, key=lambda name: theirs[name])
    shown = written(theirs[best], column.unit)
    return f"{column.title} {ours / theirs[best]:.2f}× ({best}: {shown})"


def _goodput_ratio(
    summaries: Sequence[dict[str, Any]], server: str, others: Sequence[str]
) -> str | None:
    ours = goodput(select(summaries, server=server))
    theirs = {name: goodput(select(summaries, server=name)) or 0.0 for name in others}
    if ours is None or not theirs:
        return None
    best = max(theirs, key=lambda name: theirs[name])
    ratio = f"{ours / theirs[best]:.2f}×" if theirs[best] else f"{ours:g}/s against none"
    return f"goodput {ratio} ({best}: {theirs[best]:g}/s)"


def _floor_lines(
    summaries: Sequence[dict[str, Any]],
    servers: Mapping[str, dict[str, Any]],
    floors: Sequence[dict[str, float]],
) -> list[str]:
    if not floors:
        return []
    lines = []
    for precision in dict.fromkeys(servers[name]["precision"] for name in servers_of(summaries)):
        floor = statistics.median(f[precision] for f in floors)
        shares = []
        for name in servers_of(summaries):
            rate = median_of(select(summaries, server=name), "stream_tokens_per_s")
            if servers[name]["precision"] == precision and rate is not None:
                shares.append(f"{name} {rate / floor:.0%}")
        lines.append(f"memory floor {precision}: {floor:.0f} tok/s; of it " + ", ".join(shares))
    return lines
