"""What holds for every test: nothing spins for long, nothing reaches the network."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

# Read by libgomp when torch is imported. Its default lets each process of a busy machine spin for
# milliseconds at every barrier: the suite takes six times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ["HF_HUB_OFFLINE"] = "1"


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
