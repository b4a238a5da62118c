"""What holds for every test: nothing spins for long, nothing reaches the network."""

import gc
import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Generator, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

# Read by libgomp when torch is imported. Its default lets each process of a busy machine spin for
# milliseconds at every barrier: the suite takes six times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ["HF_HUB_OFFLINE"] = "1"
# The tests ask for deterministic algorithms; cuBLAS has them with this work space only.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest

from tests.hypothesis_profiles import load_profile

load_profile()

ROOT = Path(__file__).parents[1]
IS_PRETENDED = os.environ.get("STREAMSERVE_PRETEND_GPU") == "1"  # tests/kernels/pretended_gpu.py


@cache
def has_gpu() -> bool:
    """Not asked by the process that only tells workers what to run: torch takes two seconds."""
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True, scope="session")
def interpreter() -> Iterator[None]:
    """What Triton's interpreter needs, where there is no GPU."""
    from device_bench.interpreted import mended_interpreter

    with mended_interpreter():
        yield


@pytest.fixture(autouse=True, scope="module")
def frozen_past() -> None:
    """Engines collect garbage when they are idle: without what other files have left, in no time.

    What has been frozen is not looked at here either, so this is as short.
    """
    with warnings.catch_warnings():
        # A client that another file has left half open must not fail the first test of this one.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """What is imported stays: looking for garbage in it was a third of the time."""
    gc.disable()
    try:
        if "PYTEST_XDIST_WORKER" in os.environ:
            _import_in_turn(session.config.args)
        return (yield)
    finally:
        gc.enable()


def _import_in_turn(arguments: list[str]) -> None:
    """Each worker begins at another file of the folders that are collected.

    In a fresh checkout the assertions of a file are so rewritten by one worker, which takes half as
    long as to import everything, and the others find it in the cache.
    """
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    folders = [Path(argument).resolve() for argument in arguments if Path(argument).is_dir()]
    files = sorted(
        path
        for folder in folders
        if folder.is_relative_to(ROOT)
        for path in folder.rglob("test_*.py")
    )
    first = len(files) * worker // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    for path in files[first:] + files[:first]:
        # Whatever is wrong with it is told when it is collected.
        with suppress(Exception, pytest.skip.Exception):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the GPU need one."""
    for item in items:
        if not (has_gpu() or IS_PRETENDED) and item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """A CPU's tests can be run as those of an older one."""
    parser.addoption("--native-build", help="the build of the native kernels to load")


@pytest.fixture(autouse=True, scope="session")
def build(request: pytest.FixtureRequest) -> Iterator[None]:
    """The build of the native kernels that was asked for."""
    from tests.native_builds import native_build

    with native_build(request.config.getoption("--native-build")):
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Builds the C extensions beside their sources: the tests run on the checkout's own code.

    Once, before the workers of a parallel run start; nothing happens when they are up to date.
    Where they cannot be built, their tests are skipped.
    """
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    has_workers = not is_worker and bool(config.getoption("numprocesses", None))
    if not has_workers and not has_gpu():
        # Triton decides when a kernel is defined: without a GPU its interpreter runs them.
        os.environ["TRITON_INTERPRET"] = "1"
    if is_worker:
        return
    if has_workers:
        # In the order of their names: files of many tests first would leave to the end those of
        # few, which take longest and wait most.
        config.option.loadscopereorder = False
        # Workers share the cores, as do the servers that they start: they inherit this.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if importlib.util.find_spec("setuptools") is not None:
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=ROOT,
            check=False,
            capture_output=True,
        )
