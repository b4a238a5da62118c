"""What an engine must know of an answer that begins with thoughts."""

from __future__ import annotations

from dataclasses import dataclass

from streamserve.errors import InvalidParameterError


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtText:
    """Where thoughts stand in an answer's text. ``is_open``: it begins inside of them; otherwise it
    has some if it begins with ``start``. They go up to ``end``.
    """

    is_open: bool
    start: str
    end: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """Where thoughts begin and end, for a grammar that holds behind them, and their budget.

    ``is_open``: the prompt has begun them. Otherwise the answer does if it begins with
    ``start_token_ids``, which it must where it follows a grammar, unless ``is_optional`` says that
    it may do without and that is one token. After ``budget`` tokens of thought (``None``: no limit)
    come ``end_token_ids``, whatever the model says.

    Thoughts begin and end where the text of ``start`` and ``end`` is met. Behind the end come
    ``next_token_ids``, if there are any, and then, where there is no grammar, not ``not_next``.
    """

    is_open: bool
    start_token_ids: tuple[int, ...]
    end_token_ids: tuple[int, ...]
    budget: int | None = None
    is_optional: bool = False
    start: bytes = b"<think>"
    end: bytes = b"</think>"
    next_token_ids: tuple[int, ...] = ()
    not_next: int | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 0:
            raise InvalidParameterError(
                f"thinking_token_budget must be at least 0, got {self.budget}",
                param="thinking_token_budget",
            )
