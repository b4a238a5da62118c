"""Memory is taken before "ready": steps after it take no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from streamserve_kernels.native.library import why_not

ROOT = Path(__file__).parents[2]
MIB = 2**20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_200_mixed_steps_grow_the_process_by_at_most_16_mib(dtype):
    if dtype == "bfloat16" and why_not() is not None:
        pytest.skip("not what this CPU would serve")
    probe = subprocess.run(
        [sys.executable, "-m", "tests.runner.rss_probe", dtype, "200"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert probe.returncode == 0, probe.stderr
    found = json.loads(probe.stdout)
    assert found["ready"] - found["before"] >= found["kv"]  # touched, not only promised
    assert found["largest"] - found["ready"] <= 16 * MIB, found
