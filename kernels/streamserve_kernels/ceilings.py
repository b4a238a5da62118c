"""What a device can do at best, measured: the floors of every benchmark are made of these."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ROUNDS = 7
_QUEUED = 5
_BYTES = {"cuda": 2**30, "cpu": 2**28}
_PRODUCT = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes and operations per second. ``copy`` counts what is read and what is written."""

    copy: float
    read: float
    product: float  # bfloat16 multiplications and additions, two for each pair
    product_fp8: float | None = None
    product_float32: float | None = None  # of a CPU, which may multiply bfloat16 far slower

    @property
    def best_product(self) -> tuple[float, str]:
        """The faster of bfloat16 and float32, and its name: what a floor of products is divided by.

        bfloat16 can be computed in float32, so that no CPU multiplies it at less than this.
        """
        if self.product_float32 is None or self.product_float32 <= self.product:
            return self.product, "bfloat16"
        return self.product_float32, "float32"

    @property
    def bandwidth(self) -> float:
        """The faster of the two: what a floor of bytes is divided by."""
        return max(self.copy, self.read)


def measure_ceilings(device: torch.device, scale: float = 1.0) -> Ceilings:
    """Measures a device that does nothing else; a second at most. `scale` shrinks the buffers.

    It becomes the calling thread's current device.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events are of the current one
    num_bytes = max(2**12, int(scale * _BYTES[device.type]))
    size = max(64, int(scale**0.5 * _PRODUCT[device.type]))
    wide = [torch.randn(size, size, device=device) for _ in range(2)]
    a, b = (matrix.bfloat16() for matrix in wide)
    return Ceilings(
        copy=copy_bandwidth(device, num_bytes),
        read=read_bandwidth(device, num_bytes),
        product=_product(a, b),
        product_fp8=_fp8_product(a, b),
        product_float32=_product(*wide) if device.type == "cpu" else None,
    )


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per second, read and written, of copying a buffer of so many bytes."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), device)


def read_bandwidth(device: torch.device, num_bytes: int | None = None) -> float:
    """Bytes per second of summing a buffer that no cache holds."""
    data = torch.ones((_BYTES[device.type] if num_bytes is None else num_bytes) // 4, device=device)
    return data.nbytes / fastest(data.sum, device)


def _product(a: Tensor, b: Tensor) -> float:
    """The rate of torch's product of two square matrices."""
    return 2 * len(a) ** 3 / fastest(lambda: a @ b, a.device)


def _fp8_product(a: Tensor, b: Tensor) -> float | None:
    """The rate of torch's own product in 8 bits; None where the device has none."""
    if a.device.type != "cuda" or torch.cuda.get_device_capability(a.device) < (8, 9):
        return None
    one = torch.ones((), device=a.device)
    left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T
    try:
        seconds = fastest(
            lambda: torch._scaled_mm(
                left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16
            ),
            a.device,
        )
    except (RuntimeError, TypeError):
        return None
    return 2 * len(a) ** 3 / seconds


def fastest(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, the best of a few."""
    function()
    return min(_seconds(function, device) for _ in range(_ROUNDS))


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    new_event: Callable[..., torch.cuda.Event] = torch.cuda.Event
    begin, end = (new_event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(_QUEUED):  # or the launch of the only one would count
        function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / _QUEUED
