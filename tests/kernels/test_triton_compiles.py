"""The Triton kernels compile for a GPU, and fit it, where there is none."""

from __future__ import annotations

import json

import pytest

from streamserve_kernels.triton.runtime import INTERPRETED
from tests.interpreter import run_python
from tests.kernels.absent_gpu import HEADS, KV_HEADS, PARTS

_SHARED_BYTES = 227 * 1024  # of a program on Hopper
# What stands between a layer's products: each begins while the one before it runs.
_BETWEEN = {
    "_rms_norm_kernel",
    "_heads_kernel",
    "attention_kernel",
    "merge_kernel",
    "_activation_kernel",
    "delta_parts_kernel",
    "delta_chunks_kernel",
    "conv_kernel",
    "delta_kernel",
    "gated_norm_kernel",
    "norm_of_gated_kernel",
    "sigmoid_gate_kernel",
    "state_space_kernel",
}
# A step begins with these: what was there before them may be read before a wait.
_FIRST = {"_resolve_kernel", "_gather_kernel"}


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    if not INTERPRETED:
        pytest.skip("beside a GPU the kernels are compiled anyway")
    done = run_python("-m", "tests.kernels.absent_gpu", TRITON_INTERPRET=None)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("part", PARTS)
def test_every_kernel_compiles_for_hopper_and_spills_little(part, compiled):
    kernels = [kernel for kernel in compiled if kernel["part"] == part]
    assert kernels
    for kernel in kernels:
        assert kernel["shared"] <= _SHARED_BYTES, kernel
        # Whoever begins while the kernel before it runs waits for what that writes.
        assert kernel["launch_pdl"] == kernel["waits_for_grid"], kernel
        name = kernel["kernel"].rpartition(".")[2]
        assert kernel["launch_pdl"] or name not in _BETWEEN, kernel
        assert not (kernel["launch_pdl"] and name in _FIRST), kernel
        assert kernel["stack"] <= (512 if kernel["limited"] else 256), kernel
        if name == "_heads_kernel":
            # A token's slot and position, cosines and sines.
            assert kernel["early"] >= 4, kernel
            if kernel["programs"] > HEADS + 2 * KV_HEADS:
                # Slot and position are 8 bytes, and so are eight numbers of a float8 cache.
                assert kernel["narrow"] <= 4, kernel
                assert kernel["shared"] == 0, kernel
        elif name in ("delta_kernel", "state_space_kernel"):
            # Where the sequence and its state are; that is read, kept and saved in whole lines.
            assert kernel["early"] >= 4, kernel
            assert (kernel["wide"], kernel["stack"]) == (3 * 8, 0), kernel
        elif name == "delta_chunks_kernel":
            # The state is there all the time.
            assert kernel["stack"] <= 64, kernel
            assert kernel["wgmma"], kernel
        elif name == "attention_kernel":
            assert kernel["slow_conversions"] == 0, kernel
        elif kernel["kernel"].endswith("stored_split_kernel"):
            # Sixteen places are two products, 32 four; what a table holds is looked up in between.
            assert kernel["wgmma"], kernel
            assert kernel["waits"] <= 3, kernel
        elif kernel["kernel"].endswith("split_kernel"):
            # Weights go from shared memory through registers, and products are not waited for.
            assert kernel["wgmma"], kernel
            assert (kernel["waits"], kernel["through"]) == (0, 0), kernel
