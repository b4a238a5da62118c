"""A row's results: checked, then timed. An error is a result too."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from device_bench import (
    adapter_rows,
    attention_rows,
    cache_rows,
    elementwise_rows,
    linear_rows,
    moe_rows,
    recurrent_rows,
    sampling_rows,
    stored_rows,
)
from device_bench.row import Bench, Case, CheckError, Row
from device_bench.timing import time_calls
from streamserve_kernels.ceilings import Ceilings

Status = Literal["OK", "FAIL", "ERROR", "SKIPPED"]
# The products are the most rows by far: if time is up, it is among them.
_GROUPS = (
    attention_rows,
    elementwise_rows,
    cache_rows,
    sampling_rows,
    recurrent_rows,
    moe_rows,
    adapter_rows,
    linear_rows,
    stored_rows,
)
_ERROR_LENGTH = 300


@dataclass(frozen=True, slots=True)
class Result:
    """Of one row; times in seconds. `peers` holds a time, or what went wrong, for each."""

    group: str
    name: str
    status: Status
    error: str | None = None
    seconds: float | None = None
    method: str | None = None
    floor: float | None = None
    floor_of: str | None = None
    num_bytes: float = 0.0
    flops: float = 0.0
    peers: dict[str, float | str] = field(default_factory=dict)
    took: float = 0.0  # with building, compiling and checking

    @property
    def share(self) -> float | None:
        """Of what the device can do at best: 1 is the floor itself."""
        return None if not self.seconds or self.floor is None else self.floor / self.seconds

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True, slots=True)
class Seconds:
    """How long a row may be timed, and a peer."""

    row: float = 0.15
    peer: float = 0.08


def all_rows(quick: bool, only: str = "", rest: bool = False) -> list[Row]:
    """The rows whose titles contain every word of `only`; `rest`: those that are not quick."""
    made = [row for group in _GROUPS for row in group.rows(quick and not rest)]
    if rest:
        known = {row.title for row in all_rows(True)}
        made = [row for row in made if row.title not in known]
    return [row for row in made if all(word in row.title for word in only.split())]


def measure(row: Row, bench: Bench, ceilings: Ceilings, seconds: Seconds) -> Result:
    """Builds, checks, times; what fails its check is not timed. Never raises."""
    started = time.monotonic()
    result = Result(row.group, row.name, "ERROR")
    try:
        with torch.inference_mode():
            result = _measure(row.build(bench), result, bench, ceilings, seconds)
    except CheckError as error:
        result = replace(result, status="FAIL", error=str(error))
    except Exception as error:
        result = replace(result, error=_line(error))
    return replace(result, took=time.monotonic() - started)


def _measure(
    case: Case, result: Result, bench: Bench, ceilings: Ceilings, seconds: Seconds
) -> Result:
    case.check()
    timing = time_calls(case.calls, bench.device, seconds.row)
    floor, floor_of = case.floor(ceilings)
    peers: dict[str, float | str] = {}
    for name, make in case.peers.items():
        try:
            peers[name] = time_calls(make(), bench.device, seconds.peer).seconds
        except Exception as error:
            peers[name] = _line(error)
    return replace(
        result,
        status="OK",
        seconds=timing.seconds,
        method=timing.method,
        floor=floor,
        floor_of=floor_of,
        num_bytes=case.num_bytes,
        flops=case.flops,
        peers=peers,
    )


def is_device_lost(device: torch.device) -> bool:
    """Whether an error has broken the device for this process, as an illegal address does."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False


def failures(results: Sequence[Result]) -> int:
    """Rows that failed their check or raised."""
    return sum(result.status in ("FAIL", "ERROR") for result in results)


def _line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[:_ERROR_LENGTH]
