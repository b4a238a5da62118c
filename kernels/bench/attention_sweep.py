"""Sizes of attention launches, compared on a GPU: `python kernels/bench/attention_sweep.py`.

What wins here goes into `streamserve_kernels/triton/attention_plan.py`. Each candidate changes some
of the plan's sizes; one that cannot be compiled, or is wrong, says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from device_bench.attention_rows import Shape, make_batch
from device_bench.row import LLAMA_8B, Bench
from device_bench.timing import num_copies, time_calls
from streamserve_kernels import load
from streamserve_kernels.triton import attention
from streamserve_kernels.triton.attention_plan import Plan, Tiles

DECODES = {
    "as planned": {},
    "2 stages on their way": {"stages": 3},
    "2 on their way, 3 programs": {"stages": 3, "programs_per_processor": 3},
    "4 shares a processor": {"programs_per_processor": 4},
    "8 warps": {"warps": 8},
    "8 warps, 1 program, 5 on their way": {"warps": 8, "stages": 6, "programs_per_processor": 1},
    "32 keys, 5 on their way": {"split": Tiles(16, 32), "stages": 6},
    "32 keys, 3 programs": {"split": Tiles(16, 32), "stages": 5, "programs_per_processor": 3},
    "128 keys, 1 program": {"split": Tiles(16, 128), "stages": 3, "programs_per_processor": 1},
}
CHUNKS = {
    "as planned": {},
    "stages 2": {"stages": 2},
    "stages 4": {"stages": 4},
    "128 x 128, stages 2": {"chunk": Tiles(128, 128), "stages": 2},
    "64 x 64, 4 warps, stages 2": {"chunk": Tiles(64, 64), "warps": 4, "stages": 2},
    "64 x 64, 4 warps, stages 3": {"chunk": Tiles(64, 64), "warps": 4},
    "64 x 128, 4 warps, stages 2": {"chunk": Tiles(64, 128), "warps": 4, "stages": 2},
    "128 x 32, stages 4": {"chunk": Tiles(128, 32), "stages": 4},
}
# A thread has 255 registers: eight warps, or two programs of four, fill a processor.
SHARED = {
    "as planned": {},
    "64 x 32": {"shared": Tiles(64, 32)},
    "64 x 128, stages 2": {"shared": Tiles(64, 128), "stages": 2},
    "stages 2": {"stages": 2},
    "stages 4": {"stages": 4},
}
CASES = {
    "decode 64 x 4k": (DECODES, Shape(((4096, 1),) * 64)),
    "decode 64 x 4k, blocks of 64": (DECODES, Shape(((4096, 1),) * 64, block_size=64)),
    "decode 1 x 32k": (DECODES, Shape(((32768, 1),))),
    "prompt 1 x 4k": (CHUNKS, Shape(((4096, 4096),))),
    "prompt 1 x 4k, blocks of 64": (CHUNKS, Shape(((4096, 4096),), block_size=64)),
    "shared 64 x 4k, own 128": (SHARED, Shape(((4224, 1),) * 64, shared=4096)),
}


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--only", default="", help="cases whose name has this in it")
    made.add_argument("--limit", type=float, default=120.0, metavar="S", help="no case after this")
    return made.parse_args()


def sweep(bench: Bench, candidates: dict[str, dict[str, object]], shape: Shape) -> None:
    sizes = bench.sizes
    kv_bytes = 4 * shape.num_keys() * sizes.kv_heads * sizes.head_size
    flops = 4 * shape.num_pairs() * sizes.heads * sizes.head_size
    batches = [make_batch(bench, shape) for _ in range(num_copies(kv_bytes))]
    calls: list[Callable[[], object]] = [lambda batch=batch: batch.call(bench) for batch in batches]
    plan = attention.plan
    expected = calls[0]()
    for name, changes in candidates.items():

        def changed(*args: object, changes: dict[str, object] = changes) -> Plan:
            return replace(plan(*args), **changes)

        attention.plan = changed
        started = time.perf_counter()
        try:
            torch.testing.assert_close(calls[0](), expected, atol=1e-2, rtol=2e-2)
            compiled = time.perf_counter() - started
            seconds = time_calls(calls, bench.device, 0.1).seconds
        except Exception as error:
            print(f"  {name:36} {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            continue
        finally:
            attention.plan = plan
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
