"""What of a GPU the KV cache gets: whatever is left when the rest was seen at its largest.

|<--------------------------------------- total --------------------------------------->|
|<-- others, context -->|<- weights ->|<- largest step ->|<- graphs ->|<-- KV -->| unused |
|<----------------------------- utilization × total ---------------------------->|

Nothing of it is estimated but the graphs: the weights are there, the largest step has run once with
a cache of a few blocks, and the driver says what is in use.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from streamserve.models import (
    ForwardBatch,
    KVCache,
    LanguageModel,
    allocate_kv_cache,
    state_bytes,
)
from streamserve.runner.cuda.step_key import StepKey, StepLadder
from streamserve.runner.memory import MIB, AvailableMemory, MemoryPlan, plan_memory
from streamserve_kernels import PrefixGroups
from streamserve_kernels.adapters import AdapterRows, StepAdapters
from streamserve_kernels.recurrent import StepStates

# The process's, whose graphs use cuBLAS's work spaces; torch has those once for the process.
open_runners: WeakSet[object] = WeakSet()
# The fewest blocks that a step can run on; all sequences of the profile share them.
_NUM_BLOCKS = 4
# Attention over more keys than these needs no more memory, only time.
_LONGEST_CONTEXT = 8192
# As large as the logits, in float32, of all rows that a step may sample: these, an edited copy, the
# penalties' table of two rows for each seat, the smaller one that it was before, and the sampler's
# lists of candidates.
_LOGITS_COPIES = 6
# What a captured graph of some hundred kernels takes beside the tensors that it works on.
_GRAPH_BYTES = 8 * MIB
# Work spaces of cuBLAS on further streams, kernels that are loaded at their first call.
_SLACK_BYTES = 192 * MIB


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One look at a GPU, in bytes; ``reserved`` is what torch holds of it in this process."""

    total: int
    free: int
    reserved: int

    @property
    def others(self) -> int:
        """In use by other processes, and by this one's context and its loaded kernels."""
        return self.total - self.free - self.reserved


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What steps took at their largest, beside weights and KV."""

    largest: int
    graphed: int  # the largest that is captured: graphs have memory of their own, and share it

    def reserve(self, *, max_num_sampled: int, logits_row_bytes: int, graphs: list[StepKey]) -> int:
        """All that steps may hold: the largest, sampling of so many rows, and ``graphs``.

        A row of logits has ``logits_row_bytes`` in float32.
        """
        sampling = _LOGITS_COPIES * max_num_sampled * logits_row_bytes
        captured = self.graphed + _GRAPH_BYTES * len(graphs)
        return self.largest + sampling + captured + _SLACK_BYTES


def read_gpu(device: torch.device) -> GpuReading:
    """Looks at ``device`` when all that was queued on it is done and torch keeps nothing spare."""
    free_spare(device)
    free, total = torch.cuda.mem_get_info(device)
    return GpuReading(total, free, torch.cuda.memory_reserved(device))


def free_spare(device: torch.device) -> None:
    """Waits for all that was queued on a GPU; what torch keeps spare of it then is the driver's."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


def free_work_spaces() -> None:
    """Has torch let go of cuBLAS's work spaces, where no runner of the process is open.

    It keeps one for each stream that has multiplied, which captured graphs go on using.
    """
    if not open_runners:
        torch._C._cuda_clearCublasWorkspaces()


def free_all_spare(device: torch.device) -> None:
    """What torch and cuBLAS keep spare of a GPU is the driver's, where nothing uses it any more."""
    if device.type == "cuda":
        gc.collect()  # modules of transformers refer to each other
        free_work_spaces()
        with suppress(torch.AcceleratorError):  # a device that is lost
            free_spare(device)


def profile_step_bytes(
    model: LanguageModel,
    *,
    ladder: StepLadder,
    graphs: list[StepKey],
    max_model_len: int,
    block_size: int,
    kv_dtype: torch.dtype,
) -> StepBytes:
    """Runs the largest steps of a ladder, on the calling thread, and says what they took.

    ``graphs`` are the shapes that will be captured. Compiles what the steps need. Raises what torch
    raises when one does not fit.
    """
    device, has_states = model.device, state_bytes(model.spec, model.dtype) > 0
    caches = allocate_kv_cache(
        model.spec,
        _NUM_BLOCKS,
        block_size,
        kv_dtype,
        device,
        model.kernels,
        num_state_slots=1,
        state_dtype=model.dtype,
    )
    shape = ProfileShape(ladder.largest.num_seqs, max_model_len, block_size)

    seats = (ladder.largest.num_seqs, model.spec.vocab_size)
    logits = torch.empty(seats, dtype=model.logits_dtype, device=device)  # `reserve` counts them

    def peak(num_tokens: int) -> int:
        batches = profile_batches(shape, num_tokens, device)
        if num_adapters := ladder.largest.num_adapters:
            batches = (_with_adapters(batch, num_adapters) for batch in batches)
        if has_states:
            batches = map(_with_states, batches)
        return max(_peak_bytes(model, batch, caches, logits) for batch in batches)

    graphed = max((key.num_tokens for key in graphs), default=0)
    return StepBytes(peak(ladder.largest.num_tokens), peak(graphed) if graphed else 0)


def _peak_bytes(model: LanguageModel, batch: ForwardBatch, caches: KVCache, logits: Tensor) -> int:
    """What a step takes at its peak, the pieces that torch's allocator makes of it included."""
    device, logits = model.device, logits[: len(batch.logits_indices)]
    with torch.inference_mode():
        model.forward(batch, caches, logits)  # compiling and tuning take memory of their own
        free_spare(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated, reserved = (
            torch.cuda.memory_allocated(device),
            torch.cuda.memory_reserved(device),
        )
        model.forward(batch, caches, logits)
        torch.cuda.synchronize(device)
    return max(
        torch.cuda.max_memory_allocated(device) - allocated,
        torch.cuda.max_memory_reserved(device) - reserved,
    )


@dataclass(frozen=True, slots=True)
class ProfileShape:
    """What bounds the sequences of a step."""

    max_num_seqs: int
    max_model_len: int
    block_size: int


def profile_batches(
    shape: ProfileShape, num_tokens: int, device: torch.device
) -> Iterator[ForwardBatch]:
    """Steps of ``num_tokens`` on as many seats as they fill, for a cache of `_NUM_BLOCKS` blocks.

    One in which nothing is shared, and one in which all that decode share what they can. They are
    as wide as a runner makes them: rows of padding behind the tokens, a block table for the longest
    sequence, room for as many groups as there can be.
    """
    lengths = _lengths(shape, num_tokens)
    context = min(shape.max_model_len, _LONGEST_CONTEXT)
    ends = [max(context, length) for length in lengths]
    positions = [p for end, n in zip(ends, lengths, strict=True) for p in range(end - n, end)]
    slots = [i % (_NUM_BLOCKS * shape.block_size) for i in range(len(positions))]
    padding = num_tokens - len(positions)
    width = -(-shape.max_model_len // shape.block_size) + 1
    table = torch.arange(width, dtype=torch.int32, device=device) % _NUM_BLOCKS
    bounds = [0, *accumulate(lengths)]

    def tensor(values: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    batch = ForwardBatch(
        input_ids=tensor([0] * num_tokens, torch.int64),
        positions=tensor(positions + [0] * padding, torch.int64),
        slot_mapping=tensor(slots + [-1] * padding, torch.int64),
        query_start_loc=tensor(bounds, torch.int32),
        seq_lens=tensor(ends, torch.int32),
        block_table=table.expand(len(lengths), -1).contiguous(),
        logits_indices=tensor([end - 1 for end in bounds[1:]], torch.int64),
        max_query_len=1 if max(lengths) == 1 else num_tokens,
    )
    yield batch
    members = [i for i, length in enumerate(lengths) if length == 1]
    num_shared = (context - 1) // shape.block_size
    if len(members) > 1 and num_shared:
        num_groups = len(lengths) // 2
        groups = PrefixGroups(
            members=tensor(members, torch.int32),
            starts=tensor([0] + [len(members)] * num_groups, torch.int32),
            num_blocks=tensor([num_shared] + [0] * (num_groups - 1), torch.int32),
        )
        yield replace(batch, prefix_groups=groups)


def hidden_states_bytes(width: int, dtype: torch.dtype, max_num_batched_tokens: int) -> int:
    """What steps in flight keep for a draft head, ``width`` elements a token.

    A step's own, the copies that two in flight have, and where the head reads them.
    """
    return 4 * max_num_batched_tokens * width * dtype.itemsize


def _with_adapters(batch: ForwardBatch, num_adapters: int) -> ForwardBatch:
    """The batch, every row of which has the first adapter."""
    device = batch.input_ids.device
    tokens, of_logits = (
        AdapterRows.of(np.zeros(part.shape[0], np.int32), device, num_adapters)
        for part in (batch.input_ids, batch.logits_indices)
    )
    return replace(batch, adapters=StepAdapters(tokens, of_logits))


def _with_states(batch: ForwardBatch) -> ForwardBatch:
    """The batch, whose sequences' states nobody keeps."""
    slots, saves = torch.full_like(batch.seq_lens, -1), torch.full_like(batch.positions, -1)
    return replace(batch, states=StepStates(slots, saves.int()))


def _lengths(shape: ProfileShape, num_tokens: int) -> list[int]:
    """Tokens of each sequence: one each, and what is left in as few as can hold it."""
    lengths = [1] * min(shape.max_num_seqs, num_tokens)
    rest = num_tokens - len(lengths)
    for i in reversed(range(len(lengths))):
        more = min(rest, shape.max_model_len - 1)
        lengths[i] += more
        rest -= more
    return lengths


def plan_gpu_memory(
    reading: GpuReading,
    *,
    name: str,
    utilization: float,
    step_bytes: int,
    kv_bytes_per_block: int,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    kv_cache_memory: int | None = None,
    state_bytes: int = 0,
    num_drafts: int = 0,
) -> MemoryPlan:
    """Gives the KV cache what is left within ``utilization`` of the GPU called ``name``.

    ``reading`` was taken with the weights loaded and nothing else. Raises KVCacheMemoryError when
    that holds no sequence of ``max_model_len``, or not ``kv_cache_memory`` bytes.
    """
    usable = int(reading.total * utilization) - reading.others
    return plan_memory(
        available=AvailableMemory(
            max(usable, 0), f"{utilization:.0%} of {name} less what others use"
        ),
        weight_bytes=reading.reserved,
        step_buffer_bytes=step_bytes,
        kv_bytes_per_block=kv_bytes_per_block,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_memory=kv_cache_memory,
        use_all=True,
        state_bytes=state_bytes,
        num_drafts=num_drafts,
    )
