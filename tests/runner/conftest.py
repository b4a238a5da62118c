from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from streamserve.core.plan import ModelRunner
from tests.runner.loop import forget

if TYPE_CHECKING:
    from tests.runner.against_transformers import Pair


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are not worth a second thread, which on a busy machine is waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["naive", "cpu", "naive on a device"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """transformers' model and ours, in each way of computing it."""
    from tests.runner.against_transformers import Pair  # transformers takes seconds to import

    return Pair(tmp_path_factory.mktemp("pair"), request.param)


@pytest.fixture(scope="module")
def runner(pair: Pair) -> Iterator[ModelRunner]:
    """A runner of our side of the pair. Modules with another model have one of their own."""
    runner = pair.runner()
    yield runner
    runner.close()


@pytest.fixture
def forget_requests(runner: ModelRunner) -> Iterator[None]:
    """Each test has a scheduler of its own, so the runner starts every test with no request."""
    yield
    forget(runner)
