"""From the host's memory to a device's, through a little pinned memory and nothing larger.

    file (mapped)   | piece 1 | piece 2 | piece 3 | …
    pinned buffers      [ A ]     [ B ]     [ A ]         filled by the host, one after the other
    device                  piece 1   piece 2   …         copied while the host fills the other

A copy out of pageable memory waits for its pages and for the driver's own small buffers; out of
pinned memory it takes what the bus gives, and the host reads the next piece meanwhile.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

_BUFFER_BYTES = 32 * 2**20


class Staging:
    """Two buffers in turn; pinned for a CUDA device."""

    def __init__(self, device: torch.device, buffer_bytes: int = _BUFFER_BYTES) -> None:
        self._device = device
        is_cuda = device.type == "cuda"
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)
        ]
        # torch.cuda.Event has no annotations.
        self._events: list[Any] = [cast(Any, torch.cuda).Event() for _ in range(2 * is_cuda)]
        self._turn = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copies contiguous ``source`` into ``target``, contiguous and of its shape and dtype.

        When it returns, ``source`` was read and may go; ``target`` is written in the order of the
        device's current stream.
        """
        into, out_of = _as_bytes(target), _as_bytes(source)
        size = self._buffers[0].numel()
        for start in range(0, out_of.numel(), size):
            piece = out_of[start : start + size]
            buffer = self._buffers[self._turn][: piece.numel()]
            if self._events:  # what was in the buffer may still be on its way
                self._events[self._turn].synchronize()
            buffer.copy_(piece)
            into[start : start + size].copy_(buffer, non_blocking=True)
            if self._events:
                self._events[self._turn].record(torch.cuda.current_stream(self._device))
            self._turn = 1 - self._turn


class Uploader:
    """Copies tensors of the host to where they are wanted; on a CPU that is one plain copy."""

    def __init__(self) -> None:
        self._stagings: dict[torch.device, Staging] = {}

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copies ``source`` into ``target`` of the same shape, on any device."""
        same = target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous()
        same = same and source.device.type == "cpu"
        if target.device.type == "cuda" and same:
            self._staging(target.device).copy(target, source)
        elif target.device.type == "cuda":
            target.copy_(self.on_device(source, target.device))
        else:
            target.copy_(source)

    def on_device(self, source: Tensor, device: torch.device) -> Tensor:
        """``source`` as it is, on ``device``: itself and no copy where it is there already."""
        if device.type != "cuda" or source.device == device:
            return source
        landed = torch.empty(source.shape, dtype=source.dtype, device=device)
        self._staging(device).copy(landed, source.contiguous())
        return landed

    def _staging(self, device: torch.device) -> Staging:
        if device not in self._stagings:
            self._stagings[device] = Staging(device)
        return self._stagings[device]


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
