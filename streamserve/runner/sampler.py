"""From logits to token ids: batched over requests that each ask for something else.

One row goes through, in this order:

    penalties, bias, bans      logits_edits
    grammar mask
    temperature                below MIN_TEMPERATURE it is greedy
    min-p, top-k, top-p        truncation; each on what the one before left
    inverse CDF                in token id order, at the row's one uniform

It is the order of vLLM's v1 sampler (``vllm/v1/sample/sampler.py``), with transformers' meaning of
each filter. A greedy row is an arg-max and never sees a softmax.

Every operation works on one row alone in a fixed order, so the same logits and the same uniform
give the same token in any company. Rows are drawn in C, several at a time
(`streamserve_kernels.native.sampling`), where that was built and the CPU can run it. Else, and for
what is rare, this is numpy: its loops do not split a row by the number of threads, and on a CPU
they are several times faster here than torch's.

A bad row never stops the others: a NaN counts as minus infinity, and a row in which everything is
minus infinity yields the arg-max of the raw logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from streamserve.core.plan import TokenLogprobs
from streamserve.runner.logits_edits import LogitsEdits, apply_mask, joint_mask
from streamserve.runner.truncation import restricted_draw

if TYPE_CHECKING:
    from streamserve_kernels.native.sampling import RowDraws

Float32Array: TypeAlias = NDArray[np.float32]
Float64Array: TypeAlias = NDArray[np.float64]
Int64Array: TypeAlias = NDArray[np.int64]

MIN_TEMPERATURE = 1e-5  # vLLM's bound: below it a float32 division overflows
MIN_LOGPROB = -9999.0  # what OpenAI and vLLM report for minus infinity, which JSON cannot hold

_BLOCK = 256  # weights per partial sum of the CDF
_WORK_BYTES = 2 * 2**20  # rows of the working copy: about what stays in a core's cache


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """What L rows ask for; every array is ``[L]``.

    ``temperature == 0`` is greedy, ``top_k == 0`` no limit, ``num_logprobs == -1`` none. ``edits``
    and ``masks`` go by row; a mask is one bit per token, lowest bit first, 1 where it is allowed,
    and tokens past its end are not. ``drafts``, by row too, stand behind the history that its edits
    read.
    """

    temperature: Float32Array
    top_k: Int64Array
    top_p: Float64Array
    min_p: Float32Array
    uniforms: Float64Array
    output_positions: Int64Array
    num_logprobs: Int64Array
    edits: dict[int, LogitsEdits] = field(default_factory=dict)
    masks: dict[int, bytes] = field(default_factory=dict)
    drafts: dict[int, list[int]] = field(default_factory=dict)

    def all_masks(self) -> dict[int, bytes]:
        """By row, what a grammar and the request's list of allowed tokens allow together."""
        found = dict(self.masks)
        for row, edits in self.edits.items():
            if (mask := joint_mask(found.get(row), edits)) is not None:
                found[row] = mask
        return found


class Sampler:
    """Samples rows of ``vocab_size`` logits. Holds work space and nothing else; one thread."""

    def __init__(self, vocab_size: int, max_rows: int, draws: RowDraws | None = None) -> None:
        """``draws`` are for rows of this vocabulary; without them all is numpy's."""
        self._draws = draws
        self._vocab_size = vocab_size
        padded = -(-vocab_size // _BLOCK) * _BLOCK
        # With `draws` this is for rare rows, one at a time.
        self._chunk_rows = (
            1 if draws is not None else max(1, min(max_rows, _WORK_BYTES // (4 * padded)))
        )
        self._work = np.full((self._chunk_rows, padded), -np.inf, dtype=np.float32)
        self._keep = np.zeros((self._chunk_rows, padded), dtype=np.bool_)
        self._row_numbers = np.arange(max_rows, dtype=np.int64)

    @staticmethod
    def work_bytes(vocab_size: int, max_rows: int) -> int:
        """Bytes of work space that ``Sampler(vocab_size, max_rows)`` holds; no more with draws."""
        padded = -(-vocab_size // _BLOCK) * _BLOCK
        return 5 * padded * max(1, min(max_rows, _WORK_BYTES // (4 * padded)))

    def greedy(self, logits: Float32Array) -> Int64Array:
        """Arg-max ids ``[L]`` of logits ``[L, V]``; the lowest id wins a tie."""
        ids: Int64Array = np.argmax(logits, axis=1)
        best = logits[self._row_numbers[: len(ids)], ids]
        if np.isnan(best).any():
            for row in np.flatnonzero(np.isnan(best)):
                ids[row] = np.argmax(np.where(np.isnan(logits[row]), -np.inf, logits[row]))
        return ids

    def sample(self, logits: Float32Array, batch: SamplingBatch) -> Int64Array:
        """Token ids ``[L]`` for logits ``[L, V]``, which are as they were when this returns."""
        masks = batch.all_masks()
        # A model's infinities and NaNs are handled below; they are not worth a warning per step.
        with np.errstate(all="ignore"):
            if self._draws is not None:
                return self._sample_rows(self._draws, logits, batch, masks)
            ids = np.empty(len(logits), dtype=np.int64)
            for start in range(0, len(logits), self._chunk_rows):
                end = min(start + self._chunk_rows, len(logits))
                ids[start:end] = self._sample_chunk(logits, batch, masks, start, end)
        return ids

    def _sample_rows(
        self,
        draws: RowDraws,
        logits: Float32Array,
        batch: SamplingBatch,
        masks: dict[int, bytes],
    ) -> Int64Array:
        """In C; edits are made in the logits themselves, and undone."""
        originals = []
        try:
            for row, edits in batch.edits.items():
                at = int(batch.output_positions[row]), batch.drafts.get(row, ())
                places = edits.changed_ids(*at)
                originals.append((row, places, logits[row, places]))
                edits.apply(logits[row], *at)
            ids = draws.draw(
                logits,
                temperature=np.where(
                    batch.temperature < MIN_TEMPERATURE, np.float32(0.0), batch.temperature
                ),
                min_p=batch.min_p,
                top_k=batch.top_k,
                top_p=batch.top_p,
                uniforms=batch.uniforms,
                masks=masks,
            )
        finally:
            for row, places, values in originals:
                logits[row, places] = values
        for row in np.flatnonzero(ids < 0).tolist():
            ids[row : row + 1] = self._sample_chunk(logits, batch, masks, row, row + 1)
        return ids

    def _sample_chunk(
        self,
        logits: Float32Array,
        batch: SamplingBatch,
        masks: dict[int, bytes],
        start: int,
        end: int,
    ) -> Int64Array:
        work = self._copy(logits[start:end])
        for row, edits in batch.edits.items():
            if start <= row < end:
                values = work[row - start, : self._vocab_size]
                edits.apply(values, int(batch.output_positions[row]), batch.drafts.get(row, ()))
        for row, mask in masks.items():
            if start <= row < end:
                apply_mask(work[row - start, : self._vocab_size], mask)
        best = work.max(axis=1)
        if not np.isfinite(best).all():
            self._repair(work, best, logits[start:end])
        temperature = batch.temperature[start:end]
        greedy = temperature < MIN_TEMPERATURE
        ids: Int64Array = np.empty(end - start, dtype=np.int64)
        if greedy.all():
            return np.argmax(work, axis=1, out=ids)
        if greedy.any():
            ids[greedy] = np.argmax(work[greedy], axis=1)
            temperature = np.where(greedy, np.float32(1.0), temperature)
        _weights_in_place(work, best, temperature)
        sampled = np.flatnonzero(~greedy)
        self._draw(work, batch, start, sampled, ids)
        return ids

    def _copy(self, logits: Float32Array) -> Float32Array:
        """A working copy ``[C, Vp]`` of whole blocks; past the vocabulary nothing has weight."""
        work = self._work[: len(logits)]
        work[:, : self._vocab_size] = logits
        work[:, self._vocab_size :] = -np.inf
        return work

    def _draw(
        self,
        weights: Float32Array,
        batch: SamplingBatch,
        start: int,
        sampled: Int64Array,
        ids: Int64Array,
    ) -> None:
        """Fills ``ids[sampled]`` by the uniforms; min-p zeroes tails of ``weights`` [C, Vp]."""
        end = start + len(weights)
        min_p = batch.min_p[start:end]
        if min_p.any():
            # A weight is the token's probability over that of the likeliest: min-p's own scale.
            keep = np.greater_equal(weights, min_p[:, None], out=self._keep[: len(weights)])
            np.multiply(weights, keep, out=weights)
        cumulative = _block_sums(weights).cumsum(axis=1)
        uniforms = batch.uniforms[start:end]
        top_k, top_p = batch.top_k[start:end], batch.top_p[start:end]
        restricted = (top_k[sampled] > 0) | (top_p[sampled] < 1.0)
        for row in sampled[restricted].tolist():
            ids[row] = restricted_draw(
                weights[row],
                float(cumulative[row, -1]),
                int(top_k[row]),
                float(top_p[row]),
                float(uniforms[row]),
            )
        free = sampled[~restricted]
        if len(free):
            ids[free] = inverse_cdf(weights, cumulative, free, uniforms)

    def _repair(self, work: Float32Array, best: Float32Array, raw: Float32Array) -> None:
        """Makes rows whose maximum is not finite drawable, in place."""
        for row in np.flatnonzero(~np.isfinite(best)):
            values = work[row]
            values[np.isnan(values)] = -np.inf
            top = values.max()
            if top == -np.inf:  # all is forbidden: the model's own first choice is left
                first = np.argmax(np.where(np.isnan(raw[row]), -np.inf, raw[row]))
                values[first] = top = np.float32(0.0)
            elif top == np.inf:
                values[:] = np.where(values == np.inf, np.float32(0.0), np.float32(-np.inf))
                top = np.float32(0.0)
            best[row] = top

    def logprobs(
        self, logits: Float32Array, token_ids: Int64Array, num_logprobs: Int64Array
    ) -> list[list[TokenLogprobs]]:
        """Logprobs of ``token_ids`` ``[L]`` under the raw logits ``[L, V]``, row by row.

        ``num_logprobs`` ``[L]`` is the number of alternatives; rows with -1 get an empty list.
        """
        found: list[list[TokenLogprobs]] = [[] for _ in logits]
        with np.errstate(all="ignore"):
            rows = np.flatnonzero(num_logprobs >= 0)
            if self._draws is not None:
                few = np.where(num_logprobs <= self._draws.many, num_logprobs, -1)
                likeliest, normalisers = self._draws.top(logits, few)
                known = np.flatnonzero(~np.isnan(normalisers))
                ids = np.column_stack((token_ids, likeliest))[known]
                values = np.fmax(
                    logits[known[:, None], ids] - normalisers[known, None], MIN_LOGPROB
                )
                for row, tokens, logprobs in zip(
                    known.tolist(), ids.tolist(), values.tolist(), strict=True
                ):
                    top = tuple(zip(tokens[1:], logprobs[1:], strict=True))[: num_logprobs[row]]
                    found[row] = [TokenLogprobs(tokens[0], logprobs[0], top)]
                rows = rows[np.isnan(normalisers[rows])]
            for row in rows.tolist():
                token, count = int(token_ids[row]), int(num_logprobs[row])
                found[row] = [self._row_logprobs(logits[row], token, count)]
        return found

    def _row_logprobs(self, logits: Float32Array, token: int, count: int) -> TokenLogprobs:
        work = self._copy(logits[None])
        row = work[0, : self._vocab_size]
        best = work.max(axis=1)
        if not np.isfinite(best).all():
            self._repair(work, best, logits[None])
        top = top_ids(row, count)
        values = row[np.append(top, token)].astype(np.float64)
        _weights_in_place(work, best, np.ones(1, dtype=np.float32))
        normaliser = float(best[0]) + float(np.log(_block_sums(work).sum()))
        found = np.maximum(values - normaliser, MIN_LOGPROB).tolist()
        return TokenLogprobs(token, found[-1], tuple(zip(top.tolist(), found[:-1], strict=True)))


def top_ids(values: Float32Array, count: int) -> Int64Array:
    """Ids of the ``count`` largest values of a row, by falling value, then by rising id."""
    count = min(count, len(values))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    ids = np.flatnonzero(values >= threshold)
    return ids[np.argsort(-values[ids], kind="stable")[:count]]


def inverse_cdf(
    weights: Float32Array, cumulative: Float64Array, rows: Int64Array, uniforms: Float64Array
) -> Int64Array:
    """For each of ``rows``, the first id at which the CDF exceeds the row's uniform.

    ``weights`` ``[C, nb·256]`` need not sum to 1, ``cumulative`` ``[C, nb]`` are running sums of
    their blocks, ``uniforms`` ``[C]`` lie in [0, 1). Only one block of each row is looked into.
    """
    targets = uniforms[rows] * cumulative[rows, -1]
    row_cumulative = cumulative[rows]
    # Rounding may lift a target to the total; the last block with any weight then has it.
    block = np.minimum(
        (row_cumulative <= targets[:, None]).sum(axis=1),
        (row_cumulative < row_cumulative[:, -1:]).sum(axis=1),
    )
    before = np.where(block > 0, cumulative[rows, block - 1], 0.0)
    inside = weights.reshape(len(weights), -1, _BLOCK)[rows, block].cumsum(axis=1, dtype=np.float64)
    offset = np.minimum(
        (inside <= (targets - before)[:, None]).sum(axis=1),
        (inside < inside[:, -1:]).sum(axis=1),
    )
    found: Int64Array = block * _BLOCK + offset
    return found


def _weights_in_place(logits: Float32Array, best: Float32Array, temperature: Float32Array) -> None:
    """exp((logits - best) / temperature) in place: the likeliest token weighs exactly 1."""
    np.subtract(logits, best[:, None], out=logits)
    if (temperature != 1.0).any():
        np.divide(logits, temperature[:, None], out=logits)
    np.exp(logits, out=logits)


def _block_sums(weights: Float32Array) -> Float64Array:
    """Sums of 256 neighbours, ``[C, nb]`` float64."""
    blocks = weights.reshape(len(weights), -1, _BLOCK)
    sums: Float64Array = np.add.reduce(blocks, axis=2).astype(np.float64)
    return sums
