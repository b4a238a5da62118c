"""`pytest -p tests.fake_cuda.count_compiled -m gpu tests/kernels`: what the GPU's tests compile.

On the fake device nothing is compiled and no kernel writes anything, so the tests fail; how many
specialisations of which kernels each file asks for is what they are run for.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from tests.fake_cuda import runtime

runtime.install(0)
_of_files: dict[str, Counter[str]] = defaultdict(Counter)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    before = set(runtime.compiled)
    yield
    for key in set(runtime.compiled) - before:
        _of_files[item.nodeid.partition("::")[0]][key.partition(" ")[0].rpartition(".")[2]] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for file, kernels in _of_files.items():
        terminalreporter.write_line(f"{file}: {kernels.total()} {dict(kernels)}")
    total = sum(kernels.total() for kernels in _of_files.values())
    terminalreporter.write_line(f"{total} specialisations")
