"""Sizes of attention launches, compared on a GPU: `python kernels/bench/attention_sweep.py`.

What wins here goes into `streamserve_kernels/triton/attention_plan.py`. Each candidate changes some
of the plan's sizes; one that cannot be compiled, or is wrong, says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from device_bench.attention_plans import CHUNKS, DECODES, SHARED, Changes, changed
from device_bench.attention_rows import Shape, make_batch
from device_bench.row import LLAMA_8B, Bench, check_close, tolerance
from device_bench.timing import num_copies, time_calls
from streamserve_kernels import load

CASES = {
    "decode 64 x 4k": (DECODES, Shape(((4096, 1),) * 64)),
    "decode 64 x 4k, float8": (DECODES, Shape(((4096, 1),) * 64, float8=True)),
    "decode 1 x 32k": (DECODES, Shape(((32768, 1),))),
    "decode 1 x 32k, float8": (DECODES, Shape(((32768, 1),), float8=True)),
    "prompt 1 x 4k": (CHUNKS, Shape(((4096, 4096),))),
    "shared 64 x 4k, own 128": (SHARED, Shape(((4224, 1),) * 64, shared=4096)),
}


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--only", default="", help="cases whose name has this in it")
    made.add_argument("--limit", type=float, default=120.0, metavar="S", help="no case after this")
    return made.parse_args()


def sweep(bench: Bench, candidates: dict[str, Changes], shape: Shape) -> None:
    sizes = bench.sizes
    itemsize = 1 if shape.float8 else bench.dtype.itemsize
    kv_bytes = 2 * itemsize * shape.num_keys() * sizes.kv_heads * sizes.head_size
    flops = 4 * shape.num_pairs() * sizes.heads * sizes.head_size
    batches = [make_batch(bench, shape) for _ in range(num_copies(kv_bytes))]
    calls: list[Callable[[], object]] = [lambda batch=batch: batch.call(bench) for batch in batches]
    expected = calls[0]()
    for name, changes in candidates.items():
        started = time.perf_counter()
        try:
            with changed(changes):
                check_close(calls[0](), expected, tolerance(bench.dtype))
                compiled = time.perf_counter() - started
                seconds = time_calls(calls, bench.device, 0.1).seconds
        except Exception as error:
            print(f"  {name:36} {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        print(
            f"  {name:36} {seconds * 1e6:8.1f} µs {kv_bytes / seconds / 1e12:6.2f} TB/s "
            f"{flops / seconds / 1e12:6.0f} TFLOP/s   compiled in {compiled:.1f} s",
            flush=True,
        )


def main() -> None:
    args = parse()
    started = time.perf_counter()
    bench = Bench(
        kernels=load("cuda", "triton"),
        naive=load("cuda", "naive"),
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        sizes=LLAMA_8B,
    )
    for name, (candidates, shape) in CASES.items():
        if args.only in name and time.perf_counter() - started < args.limit:
            print(name, flush=True)
            sweep(bench, candidates, shape)


if __name__ == "__main__":
    main()
