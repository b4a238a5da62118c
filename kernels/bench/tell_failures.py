"""A pytest plugin: a failure is told when it happens, and every test leaves a line in a file.

So does a file that could not be collected.

`pytest -p tell_failures --tell-to FILE --first PATH`. A run that is ended early has lost nothing
then, and what it was for has come first.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tell-to", type=Path, default=None, help="a JSON line for each test")
    parser.addoption("--first", action="append", default=[], help="tests that come before others")
    parser.addoption(
        "--together", action="append", default=[], help="files that one worker has alone"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if getattr(config.option, "loadgroup", False):  # in a worker of xdist
        together: list[str] = config.getoption("--together")
        for item in items:
            if any(path in item.nodeid for path in together):
                item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
    # Not by the order of arguments: pytest drops one that lies within another.
    first: list[str] = config.getoption("--first")

    def place(item: pytest.Item) -> int:
        return next((i for i, path in enumerate(first) if path in item.nodeid), len(first))

    items.sort(key=place)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's workers report to the process that is told
        config.pluginmanager.register(_Teller(config), "tell-failures")


class _Teller:
    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._file: Path | None = config.getoption("--tell-to")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self._keep(report.nodeid, report.outcome, s=round(report.duration, 2))
        if report.failed:
            self._say(f"FAILED {report.nodeid} ({report.when})", report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._keep(report.nodeid, "not collected")
            self._say(f"NOT COLLECTED {report.nodeid}", report.longreprtext)

    def _keep(self, test: str, outcome: str, **more: float) -> None:
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps({"test": test, "outcome": outcome, **more}) + "\n")

    def _say(self, *lines: str) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        terminal.ensure_newline()
        for line in lines:
            terminal.write_line(line)
        terminal.write_line("", flush=True)
