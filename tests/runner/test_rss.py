"""Memory is taken before "ready": steps after it take no more."""

from __future__ import annotations

import json

import pytest

from streamserve_kernels.native.library import why_not
from tests.interpreter import run_python

MIB = 2**20


DTYPES = ["float32", "bfloat16"] if why_not() is None else ["float32"]


@pytest.fixture(scope="module")
def probes() -> dict[str, dict]:
    said = run_python("-m", "tests.runner.rss_probe", "200", *DTYPES, timeout_s=300).stdout
    return dict(zip(DTYPES, map(json.loads, said.splitlines()), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_200_mixed_steps_grow_the_process_by_at_most_16_mib(dtype, probes):
    if dtype not in probes:
        pytest.skip("not what this CPU would serve")
    found = probes[dtype]
    assert found["ready"] - found["before"] >= found["kv"]  # touched, not only promised
    assert found["largest"] - found["ready"] <= 16 * MIB, found
