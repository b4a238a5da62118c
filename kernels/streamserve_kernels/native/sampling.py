"""Draws of tokens, and the likeliest ones, of rows of float32 logits.

The C side is `src/sampling.c`. What a draw means is `streamserve.runner.sampler`'s; penalties and
bans are in the logits already.
L rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from streamserve_kernels.native.execute import Executable, pack_step
from streamserve_kernels.pool import pool
from streamserve_kernels.sampling import pack_mask

Float32Array: TypeAlias = NDArray[np.float32]
Float64Array: TypeAlias = NDArray[np.float64]
Int64Array: TypeAlias = NDArray[np.int64]

_BLOCK = 256
_MANY = 32


def work_bytes(vocab_size: int) -> int:
    """Bytes that each thread needs for a row: `scratch` of the C side."""
    num_blocks = _whole_vectors(-(-vocab_size // _BLOCK))
    return 16 * num_blocks + 12 * _whole_vectors(vocab_size)


class RowDraws:
    """Draws from rows of `vocab_size` logits on the pool's threads. For one thread at a time."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._row_bytes = work_bytes(vocab_size)
        self._scratch = np.empty((0, self._row_bytes), dtype=np.uint8)
        self._executable = Executable(1)

    @property
    def many(self) -> int:
        """Up to so many of the largest logits are found quickly."""
        return max(_MANY, -(-self._vocab_size // _BLOCK))

    def draw(
        self,
        logits: Float32Array,
        *,
        temperature: Float32Array,
        min_p: Float32Array,
        top_k: Int64Array,
        top_p: Float64Array,
        uniforms: Float64Array,
        masks: Mapping[int, bytes] | None = None,
    ) -> Int64Array:
        """Ids [L] of logits [L, V], whose rows may lie at any distance.

        What the rows ask for is [L]: temperature 0 is greedy, top_k 0 no limit. `masks` are rows
        and the tokens they allow, one bit each, lowest first; what lies past the end is forbidden.
        Of rows without a finite maximum the id is -1.
        """
        ids = np.empty(len(logits), dtype=np.int64)
        packed = {row: pack_mask(mask, self._vocab_size) for row, mask in (masks or {}).items()}
        mask_addresses = np.zeros(len(logits), dtype=np.int64)
        for row, words in packed.items():
            mask_addresses[row] = words.data_ptr()
        wishes = (temperature, min_p, top_k, top_p, uniforms)
        types = (np.float32, np.float32, np.int64, np.float64, np.float64)
        arrays: list[Any] = [
            np.ascontiguousarray(wish, dtype=dtype)
            for wish, dtype in zip(wishes, types, strict=True)
        ]
        self._run(
            "draw",
            logits,
            _address(mask_addresses),
            self._vocab_size,
            *map(_address, arrays),
            _address(ids),
        )
        return ids

    def top(self, logits: Float32Array, counts: Int64Array) -> tuple[Int64Array, Float64Array]:
        """Of logits [L, V] the `counts` [L] largest, and the log of the sum of all exponentials.

        Ids are [L, K], K being the largest count: by falling logit, then by rising id; a row's
        places past its count are 0. The sums are [L], NaN of rows without a finite maximum and of
        those whose count is -1. Meant for counts up to `many`.
        """
        counts = np.minimum(counts, self._vocab_size).astype(np.int64)
        ids = np.zeros((len(logits), max(int(counts.max(initial=0)), 0)), dtype=np.int64)
        normalisers = np.empty(len(logits), dtype=np.float64)
        self._run(
            "top_logits",
            logits,
            self._vocab_size,
            _address(counts),
            ids.shape[1],
            _address(ids),
            _address(normalisers),
        )
        return ids, normalisers

    def _run(self, operation: str, logits: Float32Array, *args: int) -> None:
        if logits.dtype != np.float32 or logits.strides[1] != 4:
            raise TypeError("a row of logits must be adjacent float32")
        threads = min(pool().threads(), len(logits))
        if threads > len(self._scratch):
            self._scratch = np.empty((threads, self._row_bytes), dtype=np.uint8)
        rows = _address(logits) + logits.strides[0] * np.arange(len(logits), dtype=np.int64)
        args = (_address(rows), *args, _address(self._scratch), self._row_bytes)
        self._executable.set([(operation, args)])
        self._executable.run(pack_step(len(logits)), threads)


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _whole_vectors(count: int) -> int:
    return -(-count // 16) * 16
