"""Python in a process of its own, on the code of this checkout."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PATHS = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "kernels/bench", "loadtest"))


def run_python(
    *arguments: str, timeout_s: float | None = None, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """What it printed, having ended well. A variable of the ``environment`` may be left out: None.

    Raises subprocess.TimeoutExpired.
    """
    variables = {**os.environ, "PYTHONPATH": _PATHS, **environment}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={name: value for name, value in variables.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done
