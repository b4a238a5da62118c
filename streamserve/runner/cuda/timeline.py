"""Points in a device's work: to wait for, and to tell how long it took from one to another."""

from __future__ import annotations

from typing import Protocol

import torch

from streamserve.core.clock import monotonic


class Mark(Protocol):
    """A point in the order of what was queued."""

    def wait(self) -> None:
        """Return when the device has come past it. Raises what the device failed with."""

    def seconds_since(self, earlier: Mark) -> float:
        """Device time between two marks that it has come past."""


class Timeline(Protocol):
    """Where marks are made, on the current stream."""

    def mark(self) -> Mark:
        """Mark the end of what is queued now."""


class _CudaMark:
    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _CudaMark)
        return float(earlier._event.elapsed_time(self._event)) / 1000.0


class CudaTimeline:
    """Events on the current CUDA stream."""

    def mark(self) -> Mark:
        return _CudaMark()


class _HostMark:
    __slots__ = ("_at",)

    def __init__(self) -> None:
        self._at = monotonic()

    def wait(self) -> None:
        """On a CPU what was queued is done."""

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, _HostMark)
        return self._at - earlier._at


class HostTimeline:
    """A device that works while it is told: a CPU."""

    def mark(self) -> Mark:
        return _HostMark()


def timeline_of(device: torch.device) -> Timeline:
    """The timeline of a device."""
    return CudaTimeline() if device.type == "cuda" else HostTimeline()
