"""Checks, then times, the CPU kernels at the shapes of real models: `python kernels/bench/cpu.py`.

Every row has a floor, the bytes it must read at the bandwidth measured first, and the share of the
floor that it reaches (100% is a kernel that only waits for memory). Times are the lower quartile of
interleaved rounds: on a shared machine the median measures the neighbours.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# What the server sets, and like it before torch loads libgomp: see "Waiting" in kernels/README.md.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from draws import bench_draws
from quantised import bench_quantised
from states import bench_states
from streamserve_kernels import Kernels, PackedLinear, load


@dataclass(frozen=True)
class Shape:
    """What a step of one model multiplies."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the products of one layer."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_size
        return {
            "qkv": (qkv, self.hidden),
            "out": (self.hidden, self.heads * self.head_size),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    def weight_bytes(self, itemsize: int) -> int:
        per_layer = sum(n * k for n, k in self.linears().values())
        return itemsize * (self.layers * per_layer + self.vocab * self.hidden)


SHAPES = {
    "smollm-135m": Shape(576, 30, 9, 3, 64, 1536, 49152),
    "qwen-0.5b": Shape(896, 24, 14, 2, 64, 4864, 151936),
    "llama-1b": Shape(2048, 16, 32, 8, 64, 8192, 128256),
}
BLOCK_SIZE = 16
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def timed(functions: list[Callable[[], object]], seconds: float) -> list[float]:
    """Lower quartile of each function's time in seconds, the functions taking turns."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or len(times[0]) < 4:
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [sorted(taken)[len(taken) // 4] for taken in times]


def read_bandwidth(seconds: float) -> float:
    """Bytes per second of summing 512 MiB with torch's threads: the best of the rounds."""
    data = torch.ones(2**27)
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def rotating(make: Callable[[], PackedLinear], nbytes: int, least: int) -> list[PackedLinear]:
    """Enough copies of a weight that a round over them does not fit a core's own cache."""
    return [make() for _ in range(max(1, -(-least // nbytes)))]


def bench_linear(
    kernels: Kernels, shape: Shape, dtype: torch.dtype, rows: list[int], bandwidth: float
) -> None:
    print(
        f"\n{'linear':<10}{'N x K':>15}{'rows':>6}{'µs':>10}{'floor':>9}{'share':>7}"
        f"{'GFLOP/s':>9}{'vs F.linear':>13}"
    )
    for name, (n, k) in {**shape.linears(), "lm_head": (shape.vocab, shape.hidden)}.items():
        weight = torch.randn(n, k).to(dtype)
        packed = rotating(lambda w=weight: kernels.prepare_linear(w), weight.nbytes, 64 << 20)
        plain = [weight.clone() for _ in packed]
        for count in rows:
            if name == "lm_head" and count > 64:
                continue  # only sampled rows reach the vocabulary
            x = torch.randn(count, k).to(dtype)
            expected = torch.nn.functional.linear(x, weight)
            torch.testing.assert_close(
                kernels.linear(x, packed[0]), expected, atol=0.1 * k**0.5 / 8, rtol=2e-2
            )
            ours, theirs = timed(
                [
                    lambda x=x, p=packed: [kernels.linear(x, one) for one in p],
                    lambda x=x, p=plain: [torch.nn.functional.linear(x, one) for one in p],
                ],
                0.3,
            )
            each, floor = ours / len(packed), weight.nbytes / bandwidth
            print(
                f"{name:<10}{f'{n} x {k}':>15}{count:>6}{1e6 * each:>10.1f}{1e6 * floor:>9.1f}"
                f"{floor / each:>7.0%}{2 * count * n * k / each / 1e9:>9.0f}{theirs / ours:>12.2f}x"
            )


def paged(
    shape: Shape, dtype: torch.dtype, requests: list[tuple[int, int]]
) -> tuple[torch.Tensor, ...]:
    """Arguments of `paged_attention` for requests of (length, queries)."""
    most = max(-(-length // BLOCK_SIZE) for length, _ in requests)
    num_blocks = most * len(requests)
    size = (num_blocks, shape.kv_heads, BLOCK_SIZE, shape.head_size)
    tokens = sum(count for _, count in requests)
    return (
        torch.randn(tokens, shape.heads, shape.head_size).to(dtype),
        torch.randn(size).to(dtype),
        torch.randn(size).to(dtype),
        torch.randperm(num_blocks).view(len(requests), most).int(),
        torch.tensor([length for length, _ in requests], dtype=torch.int32),
        torch.tensor([0] + [count for _, count in requests]).cumsum(0).int(),
    )


def bench_attention(
    kernels: Kernels, naive: Kernels, shape: Shape, dtype: torch.dtype, bandwidth: float
) -> None:
    print(f"\n{'attention':<24}{'µs':>10}{'floor':>9}{'share':>7}{'GFLOP/s':>9}{'vs naive':>10}")
    scale = shape.head_size**-0.5
    cases = {
        "1 x 600": [(600, 1)],
        "1 x 4096": [(4096, 1)],
        "4 x 600": [(600, 1)] * 4,
        "16 x 600": [(600, 1)] * 16,
        "16 of 50..1500": [(50 + 97 * i, 1) for i in range(16)],
        "64 x 300": [(300, 1)] * 64,
        "chunk 128 at 600": [(728, 128)],
        "chunk 512 at 0": [(512, 512)],
        "chunk 512 at 2048": [(2560, 512)],
        "8 x 600, chunk 64": [(600, 1)] * 8 + [(600, 64)],
    }
    for name, requests in cases.items():
        args = paged(shape, dtype, requests)
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(
            kernels.paged_attention(*args, scale=scale),
            naive.paged_attention(*args, scale=scale),
            atol=tolerance,
            rtol=tolerance,
        )
        ours, theirs = timed(
            [
                lambda a=args: kernels.paged_attention(*a, scale=scale),
                lambda a=args: naive.paged_attention(*a, scale=scale),
            ],
            0.3,
        )
        keys = sum(length for length, _ in requests)
        floor = 2 * keys * shape.kv_heads * shape.head_size * dtype.itemsize / bandwidth
        pairs = sum(q * (length - q) + q * (q + 1) // 2 for length, q in requests)
        flops = 4 * pairs * shape.heads * shape.head_size
        print(
            f"{name:<24}{1e6 * ours:>10.1f}{1e6 * floor:>9.1f}{floor / ours:>7.0%}"
            f"{flops / ours / 1e9:>9.0f}{theirs / ours:>9.1f}x"
        )


def decode_step(
    kernels: Kernels, shape: Shape, dtype: torch.dtype, rows: int, context: int
) -> tuple[Callable[[], torch.Tensor], int]:
    """One decode step of a Llama of this shape on random weights, and the bytes that it reads."""

    def weight(n: int, k: int) -> PackedLinear:
        return kernels.prepare_linear((torch.randn(n, k) / k**0.5).to(dtype))

    layers = [
        {name: weight(*s) for name, s in shape.linears().items()} for _ in range(shape.layers)
    ]
    head = weight(shape.vocab, shape.hidden)
    norm = torch.ones(shape.hidden, dtype=dtype)
    table = torch.randn(1000, shape.hidden).to(dtype)
    args = paged(shape, dtype, [(context, 1)] * rows)
    caches = [(args[1].clone(), args[2].clone()) for _ in range(shape.layers)]
    positions = torch.full((rows,), context - 1)
    slots = args[3][:, -1].long() * BLOCK_SIZE + (context - 1) % BLOCK_SIZE
    angles = torch.randn(context, shape.head_size)
    q_size, kv_size = shape.heads * shape.head_size, shape.kv_heads * shape.head_size

    def step() -> torch.Tensor:
        residual = kernels.embedding(torch.zeros(rows, dtype=torch.long), table)
        x = kernels.rms_norm(residual, norm, 1e-5)
        for layer, (key_cache, value_cache) in zip(layers, caches, strict=True):
            q, k, v = kernels.linear(x, layer["qkv"]).split([q_size, kv_size, kv_size], dim=1)
            q, k, v = (y.view(rows, -1, shape.head_size) for y in (q, k, v))
            kernels.rotary_write_kv(
                q, k, v, positions, angles, key_cache, value_cache, slots, interleaved=False
            )
            y = kernels.paged_attention(
                q, key_cache, value_cache, *args[3:], scale=shape.head_size**-0.5
            )
            x = kernels.linear(y.view(rows, -1), layer["out"])
            x, residual = kernels.rms_norm(x, norm, 1e-5, residual)
            x = kernels.gated_activation(kernels.linear(x, layer["gate_up"]), "silu")
            x, residual = kernels.rms_norm(kernels.linear(x, layer["down"]), norm, 1e-5, residual)
        return kernels.linear(x, head)

    kv_bytes = 2 * rows * context * kv_size * dtype.itemsize * shape.layers
    return step, shape.weight_bytes(dtype.itemsize) + kv_bytes


def bench_step(
    kernels: Kernels, naive: Kernels, shape: Shape, dtype: torch.dtype, bandwidth: float
) -> None:
    print(f"\n{'decode step, all layers':<24}{'ms':>10}{'floor':>9}{'share':>7}{'vs naive':>10}")
    for rows, context in ((1, 100), (1, 1000), (4, 300), (16, 600)):
        torch.manual_seed(0)
        ours, nbytes = decode_step(kernels, shape, dtype, rows, context)
        torch.manual_seed(0)
        theirs, _ = decode_step(naive, shape, dtype, rows, context)
        torch.testing.assert_close(ours(), theirs(), atol=0.3, rtol=0.1)
        ours_s, theirs_s = timed([ours, theirs], 1.0)
        floor = nbytes / bandwidth
        print(
            f"{f'{rows} x {context}':<24}{1e3 * ours_s:>10.2f}{1e3 * floor:>9.2f}"
            f"{floor / ours_s:>7.0%}{theirs_s / ours_s:>9.1f}x"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="smollm-135m")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument(
        "--only", choices=["linear", "attention", "step", "quantised", "draws", "states"]
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape, dtype = SHAPES[options.model], DTYPES[options.dtype]
    kernels, naive = load("cpu", "cpu"), load("cpu", "naive")
    start = time.perf_counter()
    kernels.warm_up(dtype, shape.head_size, block_size=BLOCK_SIZE)
    print(f"{options.model}, {options.dtype}, {options.threads} threads, torch {torch.__version__}")
    print(f"warm-up {time.perf_counter() - start:.2f} s, {kernels.compilations()} kernels")
    bandwidth = read_bandwidth(3.0)
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s")
    if options.only in (None, "step"):
        bench_step(kernels, naive, shape, dtype, bandwidth)
    if options.only in (None, "attention"):
        bench_attention(kernels, naive, shape, dtype, bandwidth)
    if options.only in (None, "quantised"):
        linears = {**shape.linears(), "lm_head": (shape.vocab, shape.hidden)}
        served = load("cpu", dtype=dtype)
        bench_quantised(served, linears, options.rows, bandwidth, timed)
    if options.only in (None, "draws"):
        bench_draws(shape.vocab, [rows for rows in options.rows if rows <= 64], bandwidth, timed)
    if options.only in (None, "states"):
        bench_states(load("cpu", dtype=dtype), naive, dtype, timed)
    if options.only in (None, "linear"):
        bench_linear(kernels, shape, dtype, options.rows, bandwidth)


if __name__ == "__main__":
    main()
