"""Products with quantised weights, timed: `python kernels/bench/cpu.py --only quantised`.

Beside ours stand, in the same interleaved rounds, ours and `F.linear` in bfloat16, and torch's own
`_weight_int8pack_mm`. The floor is the bytes of the packed weight at the bandwidth measured first;
weights take turns, so that a round over them does not fit the last-level cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from stored_weights import STORED
from streamserve_kernels import QUANTIZATIONS, Kernels, QuantLinear

Timed = Callable[[list[Callable[[], object]], float], list[float]]

# What the weights of a round take together, at least: twice a server's last-level cache.
ROUND_BYTES = 64 << 20
MOST_COPIES = 64


def copies(weight: Tensor) -> int:
    """Copies of a weight in a round, by its bytes in int8."""
    return min(MOST_COPIES, max(1, -(-ROUND_BYTES // weight.numel())))


OURS = (*QUANTIZATIONS, *STORED)


def prepared(kernels: Kernels, weight: Tensor, kind: str) -> QuantLinear:
    """A weight quantised here, or a random one of a checkpoint's kind and the same shape."""
    if kind in STORED:
        return kernels.prepare_stored(STORED[kind](*weight.shape), None, weight.dtype)
    return kernels.prepare_quantised(weight, None, kind)


def products(
    kernels: Kernels, weight: Tensor, quantization: str
) -> tuple[Callable[[Tensor], list[Tensor]], int]:
    """A function that multiplies x by every copy of a weight, and the bytes of one."""
    count = copies(weight)
    if quantization in OURS:
        packed = [prepared(kernels, weight, quantization) for _ in range(count)]
        return lambda x: [kernels.linear(x, one) for one in packed], packed[0].nbytes
    if quantization == "torch int8":
        scale = weight.abs().amax(1) / 127
        codes = (weight / scale[:, None]).round().to(torch.int8)
        clones = [codes.clone() for _ in range(count)]
        multiply = torch._weight_int8pack_mm
        return lambda x: [multiply(x, one, scale) for one in clones], codes.nbytes
    if quantization == "bfloat16":
        plain = [kernels.prepare_linear(weight) for _ in range(count)]
        return lambda x: [kernels.linear(x, one) for one in plain], weight.nbytes
    clones = [weight.clone() for _ in range(count)]
    return lambda x: [functional.linear(x, one) for one in clones], weight.nbytes


def check(kernels: Kernels, weight: Tensor, rows: int) -> None:
    """Ours against the float64 product with the very weight that the codes stand for."""
    x = torch.randn(rows, weight.shape[1]).bfloat16()
    for quantization in OURS:
        packed = prepared(kernels, weight, quantization)
        expected = x.double() @ packed.unpack().double().T
        error = (kernels.linear(x, packed) - expected).norm() / expected.norm()
        assert error < 0.01, f"{quantization}, {rows} rows: an error of {error:.2%}"


def bench_quantised(
    kernels: Kernels,
    linears: dict[str, tuple[int, int]],
    rows: list[int],
    bandwidth: float,
    timed: Timed,
) -> None:
    """`linears` are (outputs, inputs); `timed` is cpu.py's."""
    if (reason := kernels.slow_quantisation()) is not None:
        print(f"the naive twin is what is timed: {reason}")
    against = ("bfloat16", "F.linear", "torch int8")
    print(
        f"\n{'':<10}{'N x K':>15}{'rows':>6}{'weights':>9}{'µs':>9}{'floor':>8}{'share':>7}", end=""
    )
    print(f"{'GOP/s':>8}" + "".join(f"{'vs ' + other:>15}" for other in against))
    for name, (n, k) in linears.items():
        weight = (torch.randn(n, k) / k**0.5).bfloat16()
        kinds = {kind: products(kernels, weight, kind) for kind in (*OURS, *against)}
        for count in rows:
            if name == "lm_head" and count > 64:
                continue  # only sampled rows reach the vocabulary
            check(kernels, weight[:4096], min(count, 64))
            x = torch.randn(count, k).bfloat16()
            calls = [lambda x=x, f=f: f(x) for f, _ in kinds.values()]
            each = dict(zip(kinds, (t / copies(weight) for t in timed(calls, 0.15)), strict=True))
            for quantization in OURS:
                ours = each[quantization]
                floor = kinds[quantization][1] / bandwidth
                print(
                    f"{name:<10}{f'{n} x {k}':>15}{count:>6}{quantization:>9}{1e6 * ours:>9.1f}"
                    f"{1e6 * floor:>8.1f}{floor / ours:>7.0%}{2 * count * n * k / ours / 1e9:>8.0f}"
                    + "".join(f"{each[other] / ours:>14.2f}x" for other in against),
                    flush=True,
                )
