"""The memory floor: what a decode step must read, and how fast this machine reads."""

from __future__ import annotations

import json
import math
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np

# Of a weight, scales included; the quantised ones as llama.cpp's Q8_0 and Q4_0 store them.
BITS_PER_WEIGHT = {"float32": 32.0, "bf16": 16.0, "int8": 8.5, "int4": 4.5}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_BUFFER_ELEMENTS = 2**27  # half a gigabyte: far more than the caches hold


def read_bandwidth(buffer: np.ndarray | None = None, num_threads: int = 2) -> float:
    """GB/s that ``num_threads`` threads together read, the better of three passes."""
    if buffer is None:
        buffer = np.ones(_BUFFER_ELEMENTS, dtype=np.float32)
    parts = np.array_split(buffer, num_threads)
    best = 0.0
    for _ in range(3):
        # max is vectorised and lets go of the interpreter lock; its one result per part is free.
        threads = [threading.Thread(target=np.max, args=(part,)) for part in parts]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, buffer.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def num_weights(checkpoint: Path) -> int:
    """Elements of what a step of one token reads.

    An untied embedding is left out, and so are the experts of a mixture that it does not go to.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    num_experts = next((config[key] for key in _EXPERTS if key in config), 0)
    used, total = Fraction(config.get("num_experts_per_tok", 1), num_experts or 1), Fraction(0)
    for file in sorted(checkpoint.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        tied = "lm_head.weight" not in header
        for name, entry in header.items():
            if name == "__metadata__" or (not tied and "embed_tokens" in name):
                continue
            shape = entry["shape"]
            # One by one under their numbers, or all of a layer as one tensor.
            is_expert = ".experts." in name or (len(shape) == 3 and shape[0] == num_experts)
            total += math.prod(shape) * (used if is_expert else 1)
    return round(total)


def floor_tokens_per_s(weights: int, precision: str, bandwidth_gb_s: float) -> float:
    """The most tokens per second that one stream can have."""
    return bandwidth_gb_s * 1e9 / (weights * BITS_PER_WEIGHT[precision] / 8)
