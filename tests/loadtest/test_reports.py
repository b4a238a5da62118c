"""Reports from canned runs: what is shown, and that the page needs nothing else."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from streamserve_loadtest.html import cumulative, html_report
from streamserve_loadtest.records import Run
from streamserve_loadtest.stats import summarize
from streamserve_loadtest.svg import Axis, log_axis
from streamserve_loadtest.terminal import table, workload_report
from tests.loadtest.canned import record, run


def content() -> dict:
    runs = [
        run([record(), record(due_at=0.5)], server="ours"),
        run([record(first=0.2), record(error="<b>no</b>")], server="theirs"),
        run([record()], workload="W6", rate=1.0, server="ours"),
        run([record(first=3.0)], workload="W6", rate=2.0, server="ours"),
    ]
    return {
        "title": "a & b",
        "written_at": "2026-11-25",
        "workloads": {"W2": "chats", "W6": "open loop"},
        "servers": {
            "ours": {"precision": "bf16", "is_ours": True},
            "theirs": {"precision": "bf16", "is_ours": False},
        },
        "floors_tokens_per_s": [],
        "ready_s": {"ours": 3.0},
        "failures": {"dead": "ended with 1"},
        "commands": {"ours W2": ["streamserve", "serve"]},
        "summaries": [summarize(r) for r in runs],
        "runs": [r.to_json() for r in runs],
    }


def test_a_run_survives_json():
    before = run([record(first=0.5, gaps=(0.25,), cached_tokens=3)], rate=2.0)
    assert Run.from_json(json.loads(json.dumps(before.to_json()))) == before


def test_the_page_is_whole_and_needs_nothing_else():
    page = html_report(content())
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag not in {"script", "link", "img", "iframe"}
            assert not {"src", "href"} & {name for name, _ in attrs}
            if tag not in {"meta"}:
                opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Checker().feed(page)
    assert not opened
    assert "http" not in page
    assert "url(" not in page
    assert "prefers-color-scheme:dark" in page
    assert "a &amp; b" in page


def test_the_page_has_the_plots():
    page = html_report(content())
    plots = re.findall(r"<svg.*?</svg>", page)
    labels = [ElementTree.fromstring(plot).get("aria-label") for plot in plots]
    assert labels.count("cumulative share of requests") == 2
    assert labels.count("cumulative share of tokens") == 2
    assert labels.count("good requests over the rate") == 1
    assert sum("every stream" in (label or "") for label in labels) == 3
    timeline = next(p for p, label in zip(plots, labels, strict=True) if "ours" in (label or ""))
    assert timeline.count('class="tick') == 2
    assert "dead is left out" in page


def test_the_terminal_report():
    text = workload_report(content()["summaries"], "W2", "chats")
    assert "1/2" in text
    assert "theirs: first error: <b>no</b>" in text
    assert "the generator took 2% of a core" in text
    w6 = workload_report(content()["summaries"], "W6", "open loop")
    assert "ours @ 1/s" in w6
    assert "ours: 1 conversations/s with at least 95% good" in w6


def test_a_table_lines_up():
    assert table([["a", "bb"], ["ccc", "1"]]) == "a    bb\n---  --\nccc   1"


def test_a_cumulative_curve_keeps_the_tail():
    points = cumulative([(float(n), 1.0) for n in range(10_000)])
    assert len(points) < 1000
    assert points[-1] == (9999.0, 1.0)
    assert points[-2][0] == 9998.0


def test_axes():
    axis = log_axis("ms", [1.0, 10.0, 100.0], "{:g}".format)
    assert axis.place(axis.low) == 0.0
    assert axis.place(10.0) == pytest.approx(0.5)
    assert axis.ticks() == [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]
    assert log_axis("ms", [1e-3, 1e3], "{:g}".format).ticks() == pytest.approx(
        [1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0]
    )
    assert Axis("s", 0.0, 30.0).ticks() == [0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0]
