"""What was seen of one request, and of one run. Times are seconds from the run's start."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Record:
    """One request. A chunk is an event that carries text of the answer.

    ``due_at`` is when it should have been sent: in an open loop latencies count from there, so a
    generator that falls behind cannot hide what a reader would have waited.
    """

    group: str
    kind: str
    conversation: str
    turn: int
    planned_prompt_tokens: int
    planned_output_tokens: int
    due_at: float = 0.0
    ended_at: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    chunk_chars: list[int] = field(default_factory=list)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    is_cancelled: bool = False
    error: str | None = None

    @property
    def first_token_s(self) -> float | None:
        """Seconds to the first content byte, ``None`` if none came."""
        return self.chunk_times[0] - self.due_at if self.chunk_times else None

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer by ``usage``; of one that was cut off, its chunks."""
        if self.completion_tokens is not None:
            return self.completion_tokens
        return len(self.chunk_times)

    def tokens_per_chunk(self) -> list[float]:
        """How many tokens each chunk stands for; the sum is ``num_tokens``.

        Every chunk has one, and what ``usage`` counts beyond is spread by the chunks' length in
        characters. A server that sends more chunks than tokens has fractions.
        """
        num_chunks, num_tokens = len(self.chunk_times), self.num_tokens
        if num_tokens <= num_chunks:
            return [num_tokens / num_chunks] * num_chunks if num_chunks else []
        surplus = num_tokens - num_chunks
        num_chars = sum(self.chunk_chars) or 1
        return [1 + surplus * chars / num_chars for chars in self.chunk_chars]

    def token_gaps(self) -> list[tuple[float, float, float]]:
        """(when it ended, seconds per token, tokens) of every pause after the first chunk.

        A chunk of ``n`` tokens that came ``g`` after the one before counts as ``n`` gaps of
        ``g / n``.
        """
        weights = self.tokens_per_chunk()
        return [
            (now, (now - before) / max(weight, 1.0), weight)
            for before, now, weight in zip(
                self.chunk_times, self.chunk_times[1:], weights[1:], strict=False
            )
        ]

    def pauses(self) -> list[float]:
        """Seconds between chunks, however many tokens they hold."""
        return [b - a for a, b in zip(self.chunk_times, self.chunk_times[1:], strict=False)]


@dataclass(slots=True)
class Run:
    """One run of a workload against one server."""

    server: str
    workload: str
    round_number: int
    rate: float | None
    records: list[Record]
    seconds: float
    generator_cpu_share: float

    def to_json(self) -> dict[str, Any]:
        """Plain data; times in tenths of a millisecond are enough."""
        content = asdict(self)
        for record in content["records"]:
            record["chunk_times"] = [round(t, 4) for t in record["chunk_times"]]
            record["due_at"] = round(record["due_at"], 4)
            record["ended_at"] = round(record["ended_at"], 4)
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Run:
        """The reverse of ``to_json``."""
        records = [Record(**record) for record in content["records"]]
        return cls(**{**content, "records": records})
