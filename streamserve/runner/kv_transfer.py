"""Copies blocks between the device's KV caches and host memory, beside the steps.

A host block is one row: a block of every layer's cache, one after the other, so that it crosses
the bus in one piece, and neighbouring rows together. On the device a staging buffer stands between
the two, since a block of the caches is in as many places as there are caches::

    caches [B, ...]  ── pack ──>  staging [S, W]  ── runs of rows ──>  host rows [H, W], pinned
                     <─ unpack ──                 <── runs of rows ───

On a GPU each direction has a stream of its own, beside the one that computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from streamserve.core.clock import Clock, monotonic
from streamserve.core.plan import BlockTransfer, SchedulerOutput
from streamserve.errors import KVCacheMemoryError
from streamserve.models.batch import KVCache
from streamserve.runner.memory import MIB, format_bytes
from streamserve_kernels import huge_pages
from streamserve_kernels.block_rows import BlockRows, block_rows

STAGING_BYTES = 64 * MIB
"""Of device memory for each direction; at least two blocks."""
COPY_S_PER_STEP = 0.004
"""What a step may copy in each direction: a part of most steps on a GPU, and no more than the
pause that prompts may add to any."""
_NUM_INDEX_ROWS = 4  # steps whose indices may be on their way before the host waits for one
_NUM_MEASUREMENTS = 3


class KVTransfer:
    """Owns the host blocks. Called from the device thread only.

    ``beside`` is all that a runner needs. What a plan stores and loads is copied while the work
    queued inside it runs: not before what was queued earlier on the current stream is done, and
    before anything that is queued later. Nothing waits on the host.
    """

    def __init__(
        self, kv_caches: KVCache, num_host_blocks: int, *, staging_bytes: int = STAGING_BYTES
    ) -> None:
        """Allocates ``num_host_blocks`` blocks and pins them, seconds for many gigabytes.

        The caches must be contiguous with the block as first dimension. Raises KVCacheMemoryError
        when the memory is not there or cannot be pinned.
        """
        self.num_host_blocks = num_host_blocks
        self._blocks = block_rows([cache for pair in kv_caches for cache in pair])
        self._host = _host_rows(num_host_blocks, self._blocks)
        self._is_pinned = self._blocks.device.type == "cuda"
        # Even: a piece's indices then begin at 16 bytes, and the kernel is compiled only once.
        num_rows = max(staging_bytes // self._host[0].nbytes // 2, 1) * 2
        try:
            self._stores = _Lane(self._blocks, num_rows)
            self._loads = _Lane(self._blocks, num_rows)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def device_bytes(kv_bytes_per_block: int, staging_bytes: int = STAGING_BYTES) -> int:
        """What it takes of the device's memory, about."""
        return 2 * max(staging_bytes, 2 * kv_bytes_per_block)

    @contextmanager
    def beside(self, plan: SchedulerOutput) -> Iterator[None]:
        """Do the plan's transfers beside what is queued on the current stream inside.

        Not inside a graph capture. The forward raising changes nothing.
        """
        if not (plan.stores or plan.loads):
            yield
            return
        try:
            if plan.loads:
                with self._loads.opened():
                    self._load(plan.loads)
            if plan.stores:
                with self._stores.opened():
                    self._store(plan.stores)
            yield
        finally:
            self._loads.join()
            self._stores.join()

    def blocks_per_step(self, clock: Clock = monotonic) -> int:
        """``CacheConfig.max_transfers_per_step`` for this bus, measured.

        Overwrites blocks: to be called before the first step, on the thread that runs the steps.
        """
        num_blocks = min(self.num_host_blocks, self._blocks.num_blocks)
        count = min(max(num_blocks // 2, 1), self._loads.num_rows)
        pairs = [BlockTransfer(i % num_blocks, i % num_blocks) for i in range(2 * count)]
        plan = SchedulerOutput(-1, stores=pairs[:count], loads=pairs[count:])
        seconds = min(self._seconds(plan, clock) for _ in range(_NUM_MEASUREMENTS))
        return max(int(COPY_S_PER_STEP * count / seconds), 1)

    def close(self) -> None:
        """Wait for what is being copied, and unpin the host's memory. Idempotent."""
        with suppress(torch.AcceleratorError):  # a device that is lost copies nothing any more
            self._synchronize()
        if self._is_pinned:
            self._is_pinned = False
            _cudart().cudaHostUnregister(self._host.data_ptr())

    def _seconds(self, plan: SchedulerOutput, clock: Clock) -> float:
        self._synchronize()
        started = clock()
        with self.beside(plan):
            pass
        self._synchronize()
        return clock() - started

    def _synchronize(self) -> None:
        if self._blocks.device.type == "cuda":
            torch.cuda.synchronize(self._blocks.device)

    def _store(self, transfers: Sequence[BlockTransfer]) -> None:
        for rows, block_ids, host_ids in self._stores.pieces(transfers):
            self._blocks.pack(block_ids, rows)
            for low, high, first in _runs(host_ids):
                self._host[first : first + high - low].copy_(rows[low:high], non_blocking=True)

    def _load(self, transfers: Sequence[BlockTransfer]) -> None:
        for rows, block_ids, host_ids in self._loads.pieces(transfers):
            for low, high, first in _runs(host_ids):
                rows[low:high].copy_(self._host[first : first + high - low], non_blocking=True)
            self._blocks.unpack(rows, block_ids)


class _Lane:
    """One direction: its stream, its staging rows, and the indices on their way to the device.

    A step's indices lie in a pinned row that is written again some steps later, when it has been
    read.
    """

    def __init__(self, blocks: BlockRows, num_rows: int) -> None:
        self.num_rows = num_rows
        self._device = blocks.device
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._staging = torch.empty(num_rows, blocks.width, dtype=blocks.dtype, device=self._device)
        self._indices = torch.empty(
            _NUM_INDEX_ROWS,
            blocks.num_blocks,
            dtype=torch.int64,
            pin_memory=self._stream is not None,
        )
        self._next_index_row = 0
        self._read: list[torch.cuda.Event | None] = [None] * _NUM_INDEX_ROWS
        self._is_open = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Queue on this lane's stream, behind what the current one has been given so far."""
        self._is_open = True
        stream: AbstractContextManager[object] = nullcontext()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            stream = torch.cuda.stream(self._stream)
        with stream:
            yield

    def join(self) -> None:
        """Let what the current stream is given from here on wait for this lane."""
        if self._is_open and self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._is_open = False

    def pieces(
        self, transfers: Sequence[BlockTransfer]
    ) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """Staging rows ``[n, W]``, block ids ``[n]`` and host ids, in the order of the latter."""
        ordered = sorted(transfers, key=lambda transfer: transfer.host_block_id)
        block_ids = self._upload([transfer.block_id for transfer in ordered])
        for low in range(0, len(ordered), self.num_rows):
            piece = ordered[low : low + self.num_rows]
            host_ids = [transfer.host_block_id for transfer in piece]
            yield self._staging[: len(piece)], block_ids[low : low + len(piece)], host_ids

    def _upload(self, block_ids: list[int]) -> Tensor:
        row = self._next_index_row
        self._next_index_row = (row + 1) % _NUM_INDEX_ROWS
        if (read := self._read[row]) is not None:
            read.synchronize()
        on_host = self._indices[row, : len(block_ids)]
        on_host.copy_(torch.tensor(block_ids))
        on_device = on_host.to(self._device, non_blocking=True)
        if self._stream is not None:
            self._read[row] = self._stream.record_event()
        return on_device


def _runs(host_ids: list[int]) -> Iterator[tuple[int, int, int]]:
    """``(low, high, first)``: positions ``low`` to ``high`` of rising ids are ``first, ...``."""
    low = 0
    for i in range(1, len(host_ids) + 1):
        if i == len(host_ids) or host_ids[i] != host_ids[i - 1] + 1:
            yield low, i, host_ids[low]
            low = i


def _host_rows(num_rows: int, blocks: BlockRows) -> Tensor:
    """Zeros ``[H, W]`` that a GPU can copy from and to by itself.

    Registered rather than asked of torch, which rounds pinned memory up to a power of two.
    """
    size = format_bytes(num_rows * blocks.width * blocks.dtype.itemsize)
    try:
        rows = huge_pages.zeros((num_rows, blocks.width), blocks.dtype)
    except (MemoryError, RuntimeError) as error:
        raise KVCacheMemoryError(f"the host has no {size} of memory for KV blocks") from error
    if (
        blocks.device.type == "cuda"
        and (result := _cudart().cudaHostRegister(rows.data_ptr(), rows.nbytes, 0)) != 0
    ):
        raise KVCacheMemoryError(
            f"{size} of host memory for KV blocks could not be pinned (CUDA error {result}): lower "
            "--swap-space, or raise the limit of locked memory"
        )
    return rows


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
