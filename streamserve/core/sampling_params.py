"""What a request asks of the sampler and of the end of its answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from streamserve.core.pooling import Pooling
from streamserve.core.structured_output import StructuredOutput
from streamserve.core.thinking import Thinking, ThoughtText
from streamserve.errors import InvalidParameterError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARACTERS = 256
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is drawn and when the answer ends. Immutable; checked on construction.

    ``temperature == 0`` is greedy: top-k, top-p, min-p and the seed then have no effect.
    ``top_k == 0`` means no limit (``-1``, vLLM's spelling, is accepted for the same).
    ``max_tokens is None`` means up to the end of the context; with 0 there is no answer, and the
    request ends when its prompt is computed.
    ``logprobs`` is the number of alternatives reported per position (0: only the sampled token's
    own logprob; ``None``: none); ``prompt_logprobs`` is the same for the prompt's tokens.
    ``seed is None`` draws one when the request is admitted.
    ``allowed_token_ids`` (``None``: all) are the only ones drawn. ``bad_words`` never complete in
    the answer; ``bad_word_ids`` are their spellings as token ids, which the engine fills in.
    ``structured_output`` is the grammar that the answer follows, ``None`` for free text.
    ``thinking`` says where its thoughts end if a grammar or a budget depends on it,
    ``thought_text`` where no stop string is looked for.
    With ``pooling`` there is no answer, and nothing else here has a meaning: the request ends with
    one vector, when its prompt is computed.
    Penalties follow OpenAI (presence, frequency: generated tokens only) and CTRL (repetition:
    prompt and generated tokens), in transformers' and vLLM's meaning.

    Raises ``InvalidParameterError`` naming the field, the limit and the value.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    structured_output: StructuredOutput | None = None
    thinking: Thinking | None = None
    thought_text: ThoughtText | None = None
    pooling: Pooling | None = None

    def __post_init__(self) -> None:
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if self.max_tokens is not None:
            _require(self.max_tokens >= 0, "max_tokens", "at least 0", self.max_tokens)
            _require(
                0 <= self.min_tokens <= self.max_tokens,
                "min_tokens",
                f"between 0 and max_tokens ({self.max_tokens})",
                self.min_tokens,
            )
        _require(self.min_tokens >= 0, "min_tokens", "at least 0", self.min_tokens)
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("min_p", self.min_p, 0.0, 1.0)
        _require(
            math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0,
            "top_p",
            "above 0 and at most 1",
            self.top_p,
        )
        _require(self.top_k >= 0, "top_k", "at least 1, or 0 or -1 for no limit", self.top_k)
        # Beyond, a logit times it, or divided by it, may be no number.
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        for token_id, bias in self.logit_bias.items():
            _require(token_id >= 0, "logit_bias", "keyed by token ids of at least 0", token_id)
            _within("logit_bias", bias, -100.0, 100.0)
        if self.seed == -1:  # llama.cpp's and vLLM's word for none
            object.__setattr__(self, "seed", None)
        if self.seed is not None:
            _require(-MAX_SEED - 1 <= self.seed <= MAX_SEED, "seed", "a 64-bit integer", self.seed)
        self._check_stops()
        self._check_words()
        for name, count in (
            ("logprobs", self.logprobs),
            ("prompt_logprobs", self.prompt_logprobs),
        ):
            if count is not None:
                _require(0 <= count <= MAX_LOGPROBS, name, f"between 0 and {MAX_LOGPROBS}", count)

    def _check_stops(self) -> None:
        _require(
            len(self.stop) <= MAX_STOP_STRINGS,
            "stop",
            f"at most {MAX_STOP_STRINGS} strings",
            len(self.stop),
        )
        for stop in self.stop:
            _require(stop != "", "stop", "made of non-empty strings", stop)
            _require(
                len(stop) <= MAX_STOP_CHARACTERS,
                "stop",
                f"made of strings of at most {MAX_STOP_CHARACTERS} characters",
                f"one of {len(stop)}",
            )
        for token_id in self.stop_token_ids:
            _require(token_id >= 0, "stop_token_ids", "token ids of at least 0", token_id)

    def _check_words(self) -> None:
        if self.allowed_token_ids is not None:
            ids = self.allowed_token_ids
            _require(len(ids) > 0, "allowed_token_ids", "at least one token id", "none")
            _require(min(ids) >= 0, "allowed_token_ids", "token ids of at least 0", min(ids))
        words = self.bad_words
        _require(
            len(words) <= MAX_BAD_WORDS, "bad_words", f"at most {MAX_BAD_WORDS} words", len(words)
        )
        for word in words:
            _require(word.strip() != "", "bad_words", "made of words that are not blank", word)
            _require(
                len(word) <= MAX_BAD_WORD_CHARACTERS,
                "bad_words",
                f"made of words of at most {MAX_BAD_WORD_CHARACTERS} characters",
                f"{word[:20]}…",
            )

    @property
    def ends_with_prompt(self) -> bool:
        """Whether nothing is generated: the prompt's own figures are all that is asked for."""
        return self.max_tokens == 0 or self.pooling is not None

    @property
    def is_greedy(self) -> bool:
        """Whether the sampler takes the arg-max."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether the sampler must see the tokens that came before."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """A beam search: the ``beam_width`` best sequences, kept side by side; nothing is drawn.

    A finished sequence scores the sum of its logprobs over its length to the power of
    ``length_penalty``. ``early_stopping`` is transformers': ``True`` stops when ``beam_width``
    sequences have finished, ``False`` when the best running one would not beat them if it ended
    now, ``"never"`` when it could not at any length up to ``max_tokens``.

    Raises ``InvalidParameterError`` naming the field, the limit and the value.
    """

    beam_width: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        _require(self.beam_width >= 1, "beam_width", "at least 1", self.beam_width)
        _within("length_penalty", self.length_penalty, -10.0, 10.0)
        _require(
            self.early_stopping in (True, False, "never"),
            "early_stopping",
            'true, false or "never"',
            self.early_stopping,
        )


def _require(ok: bool, name: str, limit: str, value: object) -> None:
    if not ok:
        raise InvalidParameterError(f"{name} must be {limit}, got {value!r}", param=name)


def _within(name: str, value: float, low: float, high: float) -> None:
    _require(
        math.isfinite(value) and low <= value <= high, name, f"between {low} and {high}", value
    )
