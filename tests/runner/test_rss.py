"""Memory is taken before "ready": steps after it take no more."""

from __future__ import annotations

import json

import pytest

from streamserve_kernels.native.library import why_not
from tests.interpreter import run_python

MIB = 2**20


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_200_mixed_steps_grow_the_process_by_at_most_16_mib(dtype):
    if dtype == "bfloat16" and why_not() is not None:
        pytest.skip("not what this CPU would serve")
    probe = run_python("-m", "tests.runner.rss_probe", dtype, "200", timeout_s=300)
    found = json.loads(probe.stdout)
    assert found["ready"] - found["before"] >= found["kv"]  # touched, not only promised
    assert found["largest"] - found["ready"] <= 16 * MIB, found
