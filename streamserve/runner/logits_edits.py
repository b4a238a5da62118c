"""What a request changes in its logits before anything is drawn: penalties, bias, bans.

The state is the request's own history, kept incrementally, so an edit costs what the number of
*distinct* tokens costs and never the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from streamserve.core.plan import NewRequest
from streamserve.runner.bad_words import BadWords, split_bad_words

Float32Array: TypeAlias = NDArray[np.float32]
Int64Array: TypeAlias = NDArray[np.int64]


class TokenCounts:
    """Distinct tokens of one request, and how often each was *generated* (0: prompt only)."""

    __slots__ = ("_counts", "_ids", "_index", "_vocab_size", "num_tokens")

    def __init__(self, token_ids: Sequence[int], num_prompt_tokens: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        prompt = np.unique(np.asarray(token_ids[:num_prompt_tokens], dtype=np.int64))
        prompt = prompt[(prompt >= 0) & (prompt < vocab_size)]
        capacity = max(64, 2 * len(prompt))
        self._ids: Int64Array = np.zeros(capacity, dtype=np.int64)
        self._counts: Float32Array = np.zeros(capacity, dtype=np.float32)
        self._ids[: len(prompt)] = prompt
        self._index: dict[int, int] = {token: i for i, token in enumerate(prompt.tolist())}
        self.num_tokens = num_prompt_tokens
        self.extend(num_prompt_tokens, token_ids[num_prompt_tokens:])

    @property
    def ids(self) -> Int64Array:
        """Distinct ids ``[N]``, in the order first seen."""
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> Float32Array:
        """Occurrences among the generated tokens ``[N]``."""
        return self._counts[: len(self._index)]

    def with_tokens(self, token_ids: Sequence[int]) -> tuple[Int64Array, Float32Array]:
        """``ids`` and ``counts`` as they would be after these were generated."""
        new = [t for t in dict.fromkeys(token_ids) if t not in self._index]
        new = [t for t in new if 0 <= t < self._vocab_size]
        ids = np.append(self.ids, np.array(new, dtype=np.int64))
        counts = np.append(self.counts, np.zeros(len(new), dtype=np.float32))
        slots = {token: len(self._index) + i for i, token in enumerate(new)}
        for token in token_ids:
            slot = slots.get(token, self._index.get(token))
            if slot is not None:
                counts[slot] += 1.0
        return ids, counts

    def extend(self, position: int, token_ids: Sequence[int]) -> None:
        """Counts generated ``token_ids`` that stand at ``position, position + 1, …``.

        Positions that were counted before are skipped: a chunk that is computed again after
        preemption is not generated again.
        """
        for token in token_ids[max(self.num_tokens - position, 0) :]:
            self.num_tokens += 1
            if not 0 <= token < self._vocab_size:
                continue
            slot = self._index.get(token)
            if slot is None:
                slot = self._index[token] = len(self._index)
                if slot == len(self._ids):
                    self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
                    self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
                self._ids[slot] = token
            self._counts[slot] += 1.0


class Penalties(NamedTuple):
    """Neutral: 1, 0, 0."""

    repetition: float
    presence: float
    frequency: float


class LogitsEdits:
    """The edits of one request. ``history`` and ``bad_words`` are kept only when they are read.

    ``allowed_mask``, if there is one, is a mask as a grammar's: one bit per token.
    """

    __slots__ = (
        "_bad_ids",
        "_banned_ids",
        "_bias_ids",
        "_bias_values",
        "_frequency_penalty",
        "_min_tokens",
        "_presence_penalty",
        "_repetition_penalty",
        "allowed_mask",
        "bad_sequences",
        "bad_words",
        "history",
    )

    def __init__(self, request: NewRequest, vocab_size: int, *, keeps_history: bool = True) -> None:
        """Without ``keeps_history`` somebody else applies the penalties and ``bad_sequences``.

        The biases of tokens that end one of these are then theirs too.
        """
        params = request.sampling_params
        self.history = (
            TokenCounts(request.token_ids, request.num_prompt_tokens, vocab_size)
            if keeps_history and params.has_penalties
            else None
        )
        self._repetition_penalty = np.float32(params.repetition_penalty)
        self._presence_penalty = np.float32(params.presence_penalty)
        self._frequency_penalty = np.float32(params.frequency_penalty)
        self._bad_ids, self.bad_sequences = split_bad_words(params.bad_word_ids, vocab_size)
        """Words of several tokens; those of one are always banned."""
        self.bad_words = (
            BadWords(self.bad_sequences, request) if keeps_history and self.bad_sequences else None
        )
        bias = {token: value for token, value in params.logit_bias.items() if token < vocab_size}
        if not keeps_history:
            for word in self.bad_sequences:
                bias.pop(word[-1], None)
        self._bias_ids: Int64Array = np.array(list(bias), dtype=np.int64)
        self._bias_values: Float32Array = np.array(list(bias.values()), dtype=np.float32)
        ends = sorted(request.eos_token_ids | frozenset(params.stop_token_ids))
        self._banned_ids: Int64Array = np.array(
            [token for token in ends if 0 <= token < vocab_size], dtype=np.int64
        )
        # A grammar's masks see to it: they let an end through where nothing else is left.
        self._min_tokens = 0 if params.structured_output is not None else params.min_tokens
        self.allowed_mask = _packed(params.allowed_token_ids, vocab_size)

    def extend(self, position: int, token_ids: Sequence[int]) -> None:
        """Takes generated ``token_ids`` that stand at ``position, position + 1, …``."""
        if self.history is not None:
            self.history.extend(position, token_ids)
        if self.bad_words is not None:
            self.bad_words.extend(position, token_ids)

    @property
    def penalties(self) -> Penalties:
        """What `apply` does with the history, for a device that does it by itself."""
        return Penalties(
            float(self._repetition_penalty),
            float(self._presence_penalty),
            float(self._frequency_penalty),
        )

    def added(self, output_position: int) -> tuple[Int64Array, Float32Array]:
        """Ids, and what is added to their logits at a position: the bias, then bans as -inf."""
        banned = self._bad_ids
        if output_position < self._min_tokens:
            banned = np.concatenate((banned, self._banned_ids))
        if not len(banned):
            return self._bias_ids, self._bias_values
        bans = np.full(len(banned), -np.inf, dtype=np.float32)
        return np.concatenate((self._bias_ids, banned)), np.concatenate((self._bias_values, bans))

    @staticmethod
    def are_needed(request: NewRequest) -> bool:
        """Whether the request's logits are ever changed before the draw."""
        params = request.sampling_params
        return (
            params.has_penalties
            or bool(params.logit_bias)
            or params.min_tokens > 0
            or bool(params.bad_word_ids)
            or params.allowed_token_ids is not None
        )

    def changed_ids(self, output_position: int, drafts: Sequence[int] = ()) -> Int64Array:
        """The tokens whose logits ``apply`` changes, some of them twice."""
        parts = [self._bias_ids, self._bad_ids]
        if self.history is not None:
            parts.append(self.history.with_tokens(drafts)[0] if drafts else self.history.ids)
        if output_position < self._min_tokens:
            parts.append(self._banned_ids)
        if self.bad_words is not None:
            parts.append(np.array(self.bad_words.banned(), dtype=np.int64))
        return np.concatenate(parts)

    def apply(self, logits: Float32Array, output_position: int, drafts: Sequence[int] = ()) -> None:
        """Changes one row ``[V]`` in place. ``drafts`` were generated behind the history.

        The order is penalties, then bias, then bans: a bias is added exactly as given, and no bias
        can let an end through before ``min_tokens``. The repetition penalty (Keskar et al. 2019,
        CTRL) divides positive logits and multiplies negative ones, as transformers and vLLM do;
        presence and frequency penalties are OpenAI's and read generated tokens only. What
        ``allowed_mask`` forbids is left to ``apply_mask``.
        """
        if self.history is not None:
            history = self.history
            ids, counts = history.with_tokens(drafts) if drafts else (history.ids, history.counts)
            self._apply_penalties(logits, ids, counts)
        if len(self._bias_ids):
            logits[self._bias_ids] += self._bias_values
        if output_position < self._min_tokens:
            logits[self._banned_ids] = -np.inf
        if len(self._bad_ids):
            logits[self._bad_ids] = -np.inf
        if self.bad_words is not None:
            logits[self.bad_words.banned()] = -np.inf

    def _apply_penalties(self, logits: Float32Array, ids: Int64Array, counts: Float32Array) -> None:
        values = logits[ids]
        if self._repetition_penalty != 1.0:
            values = np.where(
                values < 0, values * self._repetition_penalty, values / self._repetition_penalty
            )
        if self._frequency_penalty != 0.0:
            values -= self._frequency_penalty * counts
        if self._presence_penalty != 0.0:
            values -= self._presence_penalty * (counts > 0)
        logits[ids] = values


def unpack_mask(mask: bytes, vocab_size: int) -> NDArray[np.bool_]:
    """Which of ``vocab_size`` tokens a packed bit mask allows."""
    packed = np.frombuffer(mask.ljust(-(-vocab_size // 8), b"\0"), dtype=np.uint8)
    return np.unpackbits(packed, count=vocab_size, bitorder="little").view(np.bool_)


def joint_mask(grammar_mask: bytes | None, edits: LogitsEdits | None) -> bytes | None:
    """What a grammar's mask and a request's list of allowed tokens allow together; None: all."""
    allowed_mask = None if edits is None else edits.allowed_mask
    if grammar_mask is None or allowed_mask is None:
        return allowed_mask if grammar_mask is None else grammar_mask
    size = min(len(grammar_mask), len(allowed_mask))
    first, second = (np.frombuffer(m, np.uint8, size) for m in (grammar_mask, allowed_mask))
    return (first & second).tobytes()


def apply_mask(logits: Float32Array, mask: bytes) -> None:
    """Forbids in one row ``[V]`` what a packed bit mask does not allow."""
    np.copyto(logits, -np.inf, where=~unpack_mask(mask, len(logits)))


def _packed(token_ids: Sequence[int] | None, vocab_size: int) -> bytes | None:
    if token_ids is None:
        return None
    allowed = np.zeros(vocab_size, dtype=np.bool_)
    allowed[[token_id for token_id in token_ids if token_id < vocab_size]] = True
    return np.packbits(allowed, bitorder="little").tobytes()
