"""The report as one page that needs nothing else: no script, no font, nothing from the network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from streamserve_loadtest.ratios import ratio_lines
from streamserve_loadtest.records import Record, Run
from streamserve_loadtest.stats import GOOD_SHARE
from streamserve_loadtest.svg import Axis, Series, line_plot, log_axis, timeline
from streamserve_loadtest.terminal import rows_of, select, servers_of

_MAX_POINTS = 400
_MAX_ROWS = 80

_STYLE = """
:root{--bg:#fff;--fg:#1c1e21;--dim:#666b73;--line:#dfe2e6;--wait:#c3c8cf;
--c0:#1f6feb;--c1:#d9730d;--c2:#2a9d5c;--c3:#b4419b;--c4:#8a6d1b;--c5:#0f8b8d;--c6:#c0392b;--c7:#6b5bd2}
@media(prefers-color-scheme:dark){:root{--bg:#15171a;--fg:#e7e9ec;--dim:#9aa0a8;--line:#31353b;
--wait:#4a5058;--c0:#6ea8ff;--c1:#f0a35e;--c2:#63c98f;--c3:#e08ccb;--c4:#d3b861;--c5:#5cc7c9;
--c6:#f08a7e;--c7:#a79bf5}}
body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;margin:2rem auto;
max-width:1360px;padding:0 1.2rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin:2.2rem 0 .6rem}
h3{font-size:.95rem;font-weight:600;margin:.4rem 0}
.dim,.legend{color:var(--dim);font-size:.87rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.28rem .8rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600}th:first-child,td:first-child{text-align:left;padding-left:0}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:1.4rem}
figure{margin:0}svg{width:100%;height:auto;display:block}
svg text{fill:var(--dim);font-size:11px}.x,.label{text-anchor:middle}.y{text-anchor:end}
.grid{stroke:var(--line)}.line{fill:none;stroke-width:1.8}.tick{fill:none;stroke-width:1}
.wait{stroke:var(--wait);stroke-width:1.5}
.legend span{margin-right:1rem;white-space:nowrap}
.legend i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.35em}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.8rem}
""" + "".join(
    f".c{n}{{stroke:var(--c{n})}}.dot.c{n}{{fill:var(--c{n})}}.k{n}{{background:var(--c{n})}}"
    for n in range(8)
)


def html_report(content: dict[str, Any]) -> str:
    """The page for what ``cli.write_reports`` writes as JSON."""
    runs = [Run.from_json(run) for run in content["runs"]]
    sections = [
        _workload_section(content, name, title, [run for run in runs if run.workload == name])
        for name, title in content["workloads"].items()
        if select(content["summaries"], workload=name)
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(content['title'])}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(content['title'])}</h1>"
        f'<p class="dim">{escape(content["written_at"])}. Latencies are a reader’s: first token '
        "from the moment a request was due to its first content byte, inter-token latency over "
        "tokens (a chunk of n tokens after a pause g counts as n gaps of g/n), its maximum over "
        "whole pauses. Figures are medians over rounds.</p>"
        + "".join(sections)
        + _appendix(content)
        + "</body></html>\n"
    )


def _workload_section(content: dict[str, Any], name: str, title: str, runs: Sequence[Run]) -> str:
    summaries = content["summaries"]
    head, *rows = rows_of(summaries, name)
    table = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"
    table += "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    ratios = ""
    if "servers" in content:
        lines = ratio_lines(summaries, name, content["servers"], content["floors_tokens_per_s"])
        ratios = "".join(f'<p class="dim">{escape(line)}</p>' for line in lines)
    colours = {server: n for n, server in enumerate(servers_of(content["summaries"]))}
    plots = [_first_token_cdf(runs, colours), _gap_cdf(runs, colours)]
    if any(run.rate is not None for run in runs):
        plots.append(_goodput_curve(select(summaries, workload=name), colours))
    plots += _timelines(runs)
    figures = "".join(
        f"<figure><h3>{escape(caption)}</h3>{plot}</figure>" for caption, plot in plots if plot
    )
    return (
        f'<h2>{escape(name)}: {escape(title)}</h2><div class="wide"><table>{table}</table></div>'
        f'{ratios}<div class="plots">{figures}</div>'
    )


def _first_token_cdf(runs: Sequence[Run], colours: dict[str, int]) -> tuple[str, str]:
    values: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        found = [(r.first_token_s, 1.0) for r in run.records if r.first_token_s is not None]
        values.setdefault(run.server, []).extend(found)
    return "First token: share of requests", _cdf(values, colours, "requests")


def _gap_cdf(runs: Sequence[Run], colours: dict[str, int]) -> tuple[str, str]:
    values: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        gaps = [(gap, weight) for r in run.records for _, gap, weight in r.token_gaps()]
        values.setdefault(run.server, []).extend(gaps)
    return "Inter-token latency: share of tokens", _cdf(values, colours, "tokens")


def _cdf(values: dict[str, list[tuple[float, float]]], colours: dict[str, int], what: str) -> str:
    series = [
        Series(server, cumulative(weighted), colours[server])
        for server, weighted in values.items()
        if weighted
    ]
    if not series:
        return ""
    x = log_axis("ms", [1000 * v for w in values.values() for v, _ in w], "{:g}".format)
    scaled = [Series(s.name, [(1000 * px, py) for px, py in s.points], s.colour) for s in series]
    y = Axis(f"share of {what}", 0.0, 1.0, unit="{:.0%}".format)
    return line_plot(scaled, x, y, f"cumulative share of {what}")


def cumulative(weighted: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(value, share of the weight up to it), thinned out but with the tail in full."""
    ordered = sorted(weighted)
    total = sum(weight for _, weight in ordered)
    points = []
    seen = 0.0
    every = max(1, len(ordered) // _MAX_POINTS)
    for index, (value, weight) in enumerate(ordered):
        seen += weight
        if index % every == 0 or index >= len(ordered) - 50:
            points.append((value, seen / total))
    return points


def _goodput_curve(summaries: Sequence[dict[str, Any]], colours: dict[str, int]) -> tuple[str, str]:
    series = []
    for server in servers_of(summaries):
        shares: dict[float, list[float]] = {}
        for summary in select(summaries, server=server):
            if summary["rate"] is not None and "good_share" in summary:
                shares.setdefault(summary["rate"], []).append(summary["good_share"])
        points = [(rate, sum(s) / len(s)) for rate, s in sorted(shares.items())]
        if points:
            series.append(Series(server, points, colours[server], has_markers=True))
    caption = f"Good requests over the rate (goodput: the last rate at {GOOD_SHARE:.0%})"
    if not series:
        return caption, ""
    high = max(rate for line in series for rate, _ in line.points)
    x = Axis("conversations per second", 0.0, high * 1.05)
    y = Axis("share that is good", 0.0, 1.0, unit="{:.0%}".format)
    return caption, line_plot(series, x, y, "good requests over the rate")


def _timelines(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Every stream of each server's last run (of the highest rate)."""
    last = {run.server: run for run in runs}
    plots = []
    for server, run in last.items():
        records = sorted(run.records, key=lambda record: (record.group, record.due_at))
        shown = records[:_MAX_ROWS]
        groups = list(dict.fromkeys(record.group for record in records))
        rows = [_row(record, groups.index(record.group)) for record in shown]
        at_rate = "" if run.rate is None else f" at {run.rate:g}/s"
        left_out = len(records) - len(shown)
        more = f", the first {_MAX_ROWS} of {len(records)}" if left_out else ""
        caption = f"{server or 'Streams'}{at_rate}: every stream{more}, a tick for a chunk"
        high = max((record.ended_at for record in shown), default=1.0)
        axis = Axis("seconds", 0.0, max(high, 0.01))
        plots.append((caption, timeline(rows, axis, caption)))
    return plots


def _row(record: Record, colour: int) -> tuple[str, int, float, list[float], float]:
    label = f"{record.conversation} turn {record.turn + 1}: {record.num_tokens} tokens"
    return label, colour, record.due_at, record.chunk_times, record.ended_at


def _appendix(content: dict[str, Any]) -> str:
    parts = []
    if ready := content.get("ready_s"):
        items = ", ".join(f"{escape(name)} {seconds:.1f} s" for name, seconds in ready.items())
        parts.append(f"<p>Ready after: {items}.</p>")
    left_out = {**content.get("missing", {}), **content.get("failures", {})}
    parts += [
        f"<p>{escape(name)} is left out:</p><pre>{escape(reason)}</pre>"
        for name, reason in left_out.items()
    ]
    if commands := content.get("commands"):
        lines = "\n".join(f"{name}: {' '.join(argv)}" for name, argv in commands.items())
        parts.append(f"<details><summary>Commands</summary><pre>{escape(lines)}</pre></details>")
    shares = [summary["generator_cpu_share"] for summary in content["summaries"]]
    if shares:
        parts.append(f"<p>The generator took {max(shares):.0%} of a core at most.</p>")
    return "<h2>How it was measured</h2>" + "".join(parts)
