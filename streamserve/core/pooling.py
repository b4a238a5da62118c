"""What is made of a prompt's hidden states, in an answer's place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from streamserve.errors import InvalidParameterError

PoolingKind = Literal["last", "mean"]
POOLING_KINDS: tuple[PoolingKind, ...] = get_args(PoolingKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """One vector of a prompt's final normed hidden states: its last token's, or the mean of all.

    Its first ``dimensions`` (``None``: all) are kept, then it is scaled to length 1 if
    ``normalize``. Raises ``InvalidParameterError``.
    """

    kind: PoolingKind = "last"
    dimensions: int | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.kind not in POOLING_KINDS:
            raise InvalidParameterError(
                f"pooling must be one of {', '.join(POOLING_KINDS)}, got {self.kind!r}",
                param="pooling",
            )
        if self.dimensions is not None and self.dimensions < 1:
            raise InvalidParameterError(
                f"dimensions must be at least 1, got {self.dimensions}", param="dimensions"
            )

    @property
    def needs_every_row(self) -> bool:
        """Whether all of the prompt must be computed, though it may be cached."""
        return self.kind == "mean"
