"""What holds for every test: nothing spins for long, nothing reaches the network."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read by libgomp when torch is imported. Its default lets each process of a busy machine spin for
# milliseconds at every barrier: the suite takes six times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ["HF_HUB_OFFLINE"] = "1"
# The tests ask for deterministic algorithms; cuBLAS has them with this work space only.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton decides when a kernel is defined: without a GPU its interpreter runs them.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def interpreted_bounds() -> Iterator[None]:
    """Lets a kernel's argument bound a loop under the interpreter beside NumPy 2.4.

    The interpreter holds a scalar as an array of one element, which NumPy no longer makes an int.
    """
    if HAS_GPU or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: object, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the GPU need one."""
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_configure() -> None:
    """Builds the C extension beside its sources: the tests run on the checkout's own code.

    Nothing happens when it is up to date. Where it cannot be built, its tests are skipped.
    """
    if importlib.util.find_spec("setuptools") is not None:
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=Path(__file__).parents[1],
            check=False,
            capture_output=True,
        )
