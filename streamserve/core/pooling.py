"""What is made of a prompt's hidden states, in an answer's place."""

from __future__ import annotations

from dataclasses import dataclass, replace

from streamserve.config import POOLING_KINDS, EmbeddingConfig
from streamserve.errors import InvalidParameterError


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """One vector of a prompt's final normed hidden states: its last token's, or the mean of all.

    Its first ``dimensions`` (``None``: all) are kept, then it is scaled to length 1 if
    ``normalize``. Raises ``InvalidParameterError``.
    """

    kind: str = "last"
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

    def settled(self, config: EmbeddingConfig) -> Pooling:
        """Of the kind that the model has; raise unless it can have these ``dimensions``."""
        if self.dimensions is not None and self.dimensions != config.size:
            self._check_dimensions(self.dimensions, config)
        return replace(self, kind=config.pooling)

    def _check_dimensions(self, dimensions: int, config: EmbeddingConfig) -> None:
        if not config.matryoshka:
            raise InvalidParameterError(
                "dimensions is not supported: the checkpoint does not say that its vectors may be"
                f" cut (matryoshka), got {dimensions}",
                param="dimensions",
                code="unsupported_parameter",
            )
        if isinstance(config.matryoshka, tuple):
            if dimensions not in config.matryoshka:
                sizes = ", ".join(map(str, config.matryoshka))
                raise InvalidParameterError(
                    f"dimensions must be one of {sizes}, got {dimensions}", param="dimensions"
                )
        elif config.size is not None and dimensions > config.size:
            raise InvalidParameterError(
                f"dimensions must be at most {config.size}, got {dimensions}", param="dimensions"
            )
