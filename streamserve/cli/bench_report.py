"""A bench's results, and how they read in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from streamserve.cli.bench_steps import DecodeSteps, Spread
from streamserve_loadtest.terminal import table

_HEAD = (
    "batch x input + output",
    "first token",
    "p99",
    "floor",
    "step",
    "p99",
    "device",
    "p99",
    "host gap",
    "p99",
    "floor",
    "share",
    "stream gap",
    "p99",
    "steps",
    "merged",
    "compiled",
)
_NONE = "-"


@dataclass(frozen=True, slots=True)
class LatencyResult:
    """Of one batch size and lengths, over all rounds; times in seconds.

    ``prompt_floor_s`` is of all prompts together, ``decode_floor_s`` of the average step.
    """

    batch_size: int
    input_len: int
    output_len: int
    first_token: Spread | None
    prompt_floor_s: float
    steps: DecodeSteps
    decode_floor_s: float
    gaps: Spread | None
    num_merged: int
    num_compilations: int  # while it was measured: after warm-up nothing should compile

    @property
    def share_of_floor(self) -> float | None:
        """Floor over the median step, host gap and all."""
        return None if self.steps.wall is None else self.decode_floor_s / self.steps.wall.median

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share_of_floor": self.share_of_floor}


@dataclass(frozen=True, slots=True)
class ThroughputResult:
    """Of all requests together; ``busy`` is the share of the time that the device worked."""

    num_requests: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    num_steps: int
    num_preemptions: int
    busy: float | None
    first_token: Spread | None


def latency_report(results: Sequence[LatencyResult]) -> str:
    """Milliseconds, medians unless the head says otherwise; the host gap in microseconds."""
    return table([_HEAD, *(_latency_row(result) for result in results)])


def _latency_row(result: LatencyResult) -> tuple[str, ...]:
    steps, share = result.steps, result.share_of_floor
    first = result.first_token
    return (
        f"{result.batch_size} x {result.input_len} + {result.output_len}",
        *((_NONE, _NONE) if first is None else (_ms(first.median), _ms(first.p99))),
        _ms(result.prompt_floor_s),
        *_spread(steps.wall),
        *_spread(steps.device),
        *(
            (_NONE, _NONE)
            if steps.host_gap is None
            else (f"{1e6 * steps.host_gap.median:.0f} µs", f"{1e6 * steps.host_gap.p99:.0f} µs")
        ),
        _ms(result.decode_floor_s),
        _NONE if share is None else f"{share:.0%}",
        *_spread(result.gaps),
        str(steps.num_steps),
        str(result.num_merged),
        str(result.num_compilations),
    )


def throughput_report(result: ThroughputResult) -> str:
    """A few lines."""
    seconds = result.seconds
    rows = max(1, result.num_steps)
    lines = [
        f"{result.num_requests} requests in {seconds:.2f} s: {result.num_requests / seconds:.2f}/s",
        f"output tokens {result.output_tokens}: {result.output_tokens / seconds:.1f}/s",
        f"prompt tokens {result.prompt_tokens}: {result.prompt_tokens / seconds:.1f}/s",
        f"steps {result.num_steps}, {result.output_tokens / rows:.1f} output tokens in each, "
        f"{result.num_preemptions} preemptions",
    ]
    if result.busy is not None:
        lines.append(f"device busy {result.busy:.0%} of the time")
    if (first := result.first_token) is not None:
        lines.append(f"first token {_ms(first.median)} ms, p99 {_ms(first.p99)} ms")
    return "\n".join(lines)


def _spread(spread: Spread | None) -> tuple[str, str]:
    return (_NONE, _NONE) if spread is None else (_ms(spread.median), _ms(spread.p99))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"
