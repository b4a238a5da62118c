"""What of a GPU the KV cache gets: whatever is left when the rest was seen at its largest.

|<--------------------------------------- total --------------------------------------->|
|<-- others, context -->|<- weights ->|<- largest step ->|<- graphs ->|<-- KV -->| unused |
|<----------------------------- utilization × total ---------------------------->|

Nothing of it is estimated but the graphs: the weights are there, the largest step has run once with
a cache of a few blocks, and the driver says what is in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from streamserve.models import Decoder, ForwardBatch, KVCache, allocate_kv_cache
from streamserve.runner.memory import MIB, AvailableMemory, MemoryPlan, plan_memory
from streamserve_kernels import PrefixGroups

# The fewest blocks that a step can run on; all sequences of the profile share them.
_NUM_BLOCKS = 4
# Attention over more keys than these needs no more memory, only time.
_LONGEST_CONTEXT = 8192
# Penalties, probabilities and a copy, each as large as the logits in float32.
_LOGITS_COPIES = 3
# What a recorded graph of some hundred kernels takes beside the tensors that it works on.
_GRAPH_BYTES = 8 * MIB
_DEFAULT_NUM_GRAPHS = 48
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
    decodes: int  # a step of nothing but decodes, on all seats

    def with_sampling(self, logits_bytes: int, num_graphs: int) -> int:
        """All that steps may hold: the largest one, sampling, graphs and their own memory."""
        graphs = num_graphs * _GRAPH_BYTES + (self.decodes if num_graphs else 0)
        return self.largest + _LOGITS_COPIES * logits_bytes + graphs + _SLACK_BYTES


def read_gpu(device: torch.device) -> GpuReading:
    """Looks at ``device`` when all that was queued on it is done and torch keeps nothing spare."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return GpuReading(total, free, torch.cuda.memory_reserved(device))


def num_graphs(graph_sizes: list[int] | None, *, enforce_eager: bool) -> int:
    """CUDA graphs to keep room for."""
    if enforce_eager:
        return 0
    return _DEFAULT_NUM_GRAPHS if graph_sizes is None else len(graph_sizes)


def profile_step_bytes(
    model: Decoder,
    *,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int,
    block_size: int,
    kv_dtype: torch.dtype,
) -> StepBytes:
    """Runs the largest steps once, on the calling thread, and says what they took.

    Compiles what they need. Raises what torch raises when a step does not fit.
    """
    device = model.device
    caches = allocate_kv_cache(model.spec, _NUM_BLOCKS, block_size, kv_dtype, device, model.kernels)
    shape = ProfileShape(max_num_seqs, max_model_len, block_size)

    def peak(num_tokens: int) -> int:
        batches = profile_batches(shape, num_tokens, device)
        return max(_peak_bytes(model, batch, caches) for batch in batches)

    decodes = peak(min(max_num_seqs, max_num_batched_tokens))
    largest = peak(max_num_batched_tokens)
    return StepBytes(max(largest, decodes), decodes)


def _peak_bytes(model: Decoder, batch: ForwardBatch, caches: KVCache) -> int:
    """What a step takes at its peak, the pieces that torch's allocator makes of it included."""
    device = model.device
    with torch.inference_mode():
        model.forward(batch, caches)  # compiling and tuning take memory of their own
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        allocated, reserved = (
            torch.cuda.memory_allocated(device),
            torch.cuda.memory_reserved(device),
        )
        model.forward(batch, caches)
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

    One in which nothing is shared, and one in which all that decode share what they can.
    """
    lengths = _lengths(shape, num_tokens)
    context = min(shape.max_model_len, _LONGEST_CONTEXT)
    ends = [max(context, length) for length in lengths]
    starts = [end - length for end, length in zip(ends, lengths, strict=True)]
    positions = [p for start, end in zip(starts, ends, strict=True) for p in range(start, end)]
    num_slots = _NUM_BLOCKS * shape.block_size
    width = -(-max(ends) // shape.block_size)
    table = torch.arange(width, dtype=torch.int32) % _NUM_BLOCKS
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    batch = ForwardBatch(
        input_ids=torch.zeros(len(positions), dtype=torch.int64, device=device),
        positions=torch.tensor(positions, dtype=torch.int64, device=device),
        slot_mapping=(torch.arange(len(positions)) % num_slots).to(device),
        query_start_loc=bounds.to(device, torch.int32),
        seq_lens=torch.tensor(ends, dtype=torch.int32, device=device),
        block_table=table.expand(len(lengths), -1).contiguous().to(device),
        logits_indices=(bounds[1:] - 1).to(device),
        max_query_len=max(lengths),
        max_seq_len=max(ends),
    )
    yield batch
    members = [i for i, length in enumerate(lengths) if length == 1]
    num_shared = (context - 1) // shape.block_size
    if len(members) > 1 and num_shared:
        groups = PrefixGroups(
            members=torch.tensor(members, dtype=torch.int32, device=device),
            starts=torch.tensor([0, len(members)], dtype=torch.int32, device=device),
            num_blocks=torch.tensor([num_shared], dtype=torch.int32, device=device),
        )
        yield replace(batch, prefix_groups=groups)


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
    )
