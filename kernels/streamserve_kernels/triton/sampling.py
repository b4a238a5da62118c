"""Sampling on the device: from logits to token ids without a sort, the host never asked.

See `streamserve_kernels.sampling` for the contract and `naive_sampling` for the meaning. Launches:
`greedy` 2, `sample` 4, `logprobs` 2, `add_tokens` 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from streamserve_kernels.sampling import LogitsEditTensors, Logprobs, SamplingTensors
from streamserve_kernels.triton import logprobs_kernels, sampling_kernels

__all__ = ["add_tokens", "greedy", "logprobs", "sample", "work_bytes"]

_LEVELS = 8
_LIST_CHUNKS = 4  # chunks that a row's list of candidates may fill


class _Shape(NamedTuple):
    """How a row is cut. It follows from the vocabulary alone, and with it the order of sums."""

    vocab_size: int
    chunk: int
    num_chunks: int
    padded_chunks: int
    num_warps: int

    @classmethod
    def of(cls, vocab_size: int) -> _Shape:
        chunk = min(max(_power_of_2(triton.cdiv(vocab_size, 32)), 256), 4096)
        num_chunks = triton.cdiv(vocab_size, chunk)
        return cls(vocab_size, chunk, num_chunks, _power_of_2(num_chunks), max(chunk // 512, 1))


def greedy(logits: Tensor) -> Tensor:
    num_rows, shape, stride = _layout(logits)
    maxima = logits.new_empty((num_rows, shape.num_chunks), dtype=torch.float32)
    ids = logits.new_empty((num_rows, shape.num_chunks), dtype=torch.int32)
    tokens = logits.new_empty(num_rows, dtype=torch.int64)
    sampling_kernels.chunk_maximum_kernel[(shape.num_chunks, num_rows)](
        logits, stride, maxima, ids, shape.vocab_size, shape.chunk, shape.num_chunks,
        num_warps=max(shape.chunk // 1024, 1),
    )  # fmt: skip
    sampling_kernels.row_maximum_kernel[(num_rows,)](
        maxima, ids, tokens, shape.num_chunks, shape.padded_chunks, num_warps=1
    )
    return tokens


def sample(
    logits: Tensor, tensors: SamplingTensors, edits: LogitsEditTensors | None = None
) -> Tensor:
    num_rows, shape, stride = _layout(logits)
    vocab_size, chunk, num_chunks, padded_chunks, num_warps = shape
    list_size = _LIST_CHUNKS * chunk

    def empty(*row: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return logits.new_empty((num_rows, *row), dtype=dtype)

    maxima, ids = empty(num_chunks, 4), empty(num_chunks, 2, dtype=torch.int32)
    grid = (num_chunks, num_rows)
    source = logits
    if edits is not None:
        source = empty(vocab_size)
    sampling_kernels.edit_kernel[grid](
        logits, stride, source, maxima, ids, tensors.temperature,
        *((None,) * len(LogitsEditTensors._fields) if edits is None else edits),
        vocab_size, chunk, num_chunks,
        edits is not None, edits is not None and edits.drafts is not None,
        num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    if edits is not None:
        stride = vocab_size
    wishes = (tensors.temperature, tensors.top_k, tensors.top_p, tensors.min_p)
    masses = empty(num_chunks, dtype=torch.float64)
    levels = (
        empty(num_chunks, _LEVELS, dtype=torch.int32),
        empty(num_chunks, _LEVELS),
        empty(_LEVELS),
    )
    sampling_kernels.weigh_kernel[grid](
        source, stride, maxima, *wishes, masses, *levels,
        vocab_size, chunk, num_chunks, padded_chunks,
        num_warps=num_warps,
    )  # fmt: skip
    lists = (
        empty(4, dtype=torch.int32),
        empty(list_size, dtype=torch.int32),
        empty(list_size),
    )
    sampling_kernels.collect_kernel[grid](
        source, stride, maxima, *wishes, masses, *levels, *lists,
        vocab_size, chunk, num_chunks, padded_chunks, list_size,
        num_warps=num_warps, maxnreg=80,  # three programs to a processor
    )  # fmt: skip
    tokens = empty(dtype=torch.int64)
    sampling_kernels.draw_kernel[(num_rows,)](
        source, stride, maxima, ids, *wishes, tensors.uniforms, masses, *lists, tokens,
        vocab_size, chunk, num_chunks, padded_chunks, list_size, edits is not None,
        num_warps=num_warps,
    )  # fmt: skip
    return tokens


def logprobs(logits: Tensor, ids: Tensor, k: int) -> Logprobs:
    num_rows, shape, stride = _layout(logits)
    vocab_size, chunk, num_chunks, _, num_warps = shape
    k = min(k, vocab_size)
    chunk_tops = logits.new_empty((num_rows, num_chunks, k), dtype=torch.float32)
    chunk_ids = logits.new_empty((num_rows, num_chunks, k), dtype=torch.int32)
    chunk_stats = logits.new_empty((num_rows, num_chunks, 2), dtype=torch.float32)
    logprobs_kernels.chunk_kernel[(num_chunks, num_rows)](
        logits, stride, chunk_stats, chunk_tops, chunk_ids,
        vocab_size, chunk, num_chunks, k, num_warps=num_warps,
    )  # fmt: skip
    found = Logprobs(
        logits.new_empty(num_rows, dtype=torch.float32),
        logits.new_empty((num_rows, k), dtype=torch.int64),
        logits.new_empty((num_rows, k), dtype=torch.float32),
    )
    logprobs_kernels.row_kernel[(num_rows,)](
        logits, stride, ids, chunk_stats, chunk_tops, chunk_ids, *found,
        num_chunks, shape.padded_chunks, k, _power_of_2(max(num_chunks * k, 1)),
        num_warps=4,
    )  # fmt: skip
    return found


def add_tokens(
    counts: Tensor,
    rows: Tensor,
    ids: Tensor,
    drafts: Tensor | None = None,
    num_before: Tensor | None = None,
) -> None:
    logprobs_kernels.add_tokens_kernel[(len(rows),)](
        counts, rows, ids, drafts, num_before, counts.shape[1], drafts is not None, num_warps=1
    )


def work_bytes(num_rows: int, vocab_size: int, *, edits: bool) -> int:
    """Most device memory that a `sample` holds beside its arguments."""
    shape = _Shape.of(vocab_size)
    per_chunk = 4 * 4 + 2 * 4 + 8 + 2 * 4 * _LEVELS
    per_row = shape.num_chunks * per_chunk + 8 * _LIST_CHUNKS * shape.chunk + 4 * _LEVELS + 16
    return num_rows * (per_row + (4 * vocab_size if edits else 0))


def _layout(logits: Tensor) -> tuple[int, _Shape, int]:
    """Rows, how each is cut, and the distance between them."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1, "a row of logits must be contiguous"
    # A single row's stride means nothing and may be anything: it must not cost a compilation.
    return num_rows, _Shape.of(vocab_size), logits.stride(0) if num_rows > 1 else vocab_size


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()
