"""Servers shared by a whole test session."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.e2e.servers import Run, Server, forked_commands, running_server


@pytest.fixture(scope="session")
def box() -> Iterator[Server]:
    """The model in the box in float32, where equal tokens can be asked for.

    It is told how calls are written: with tools in a request it may choose to call them.
    """
    # Its warm-up takes half as long with shorter steps.
    flags = ("--dtype", "float32", "--max-num-batched-tokens", "128")
    with running_server(*flags, "--tool-call-parser", "hermes") as server:
        yield server


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a command line to its end, as `streamserve` in a process of its own would."""
    with forked_commands(tmp_path_factory.mktemp("commands")) as run:
        yield run


@pytest.fixture(scope="session")
def start_server() -> Iterator[Callable[..., Server]]:
    """Start further servers; each is stopped when the test session ends."""
    with ExitStack() as stack:
        yield lambda *args: stack.enter_context(running_server(*args))
