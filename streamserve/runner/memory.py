"""Is there room? Answered, with the numbers, before the model is loaded.

|<------------------------------- available ------------------------------->|
|<-- weights -->|<- step buffers ->|<- states ->|<---- KV blocks ---->| rest |
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from streamserve.errors import ConfigError, KVCacheMemoryError

GIB = 2**30
MIB = 2**20

DEFAULT_CPU_SHARE = 0.25
DEFAULT_CPU_LIMIT = 4 * GIB
# Of what all seats can use. Past it are prefixes that nobody comes back to, and blocks to count.
MAX_GPU_SHARE = 8
# Of what is given to the cache, the most that states take, and the most of these: all seats', and
# as many that are kept for whoever has their prefix. One request's drafts have slots besides, and
# find them, and one for a prefix, in however little memory.
STATE_SHARE = 0.5
MAX_STATES_PER_SEAT = 2

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, slots=True)
class AvailableMemory:
    """Bytes that may be used, and where the number comes from."""

    num_bytes: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What goes where, in bytes; ``kv_bytes`` is ``num_blocks`` blocks of ``block_size`` tokens.

    ``state_bytes`` is what the ``num_state_slots`` states take, of a model that keeps some.
    """

    available: AvailableMemory
    weight_bytes: int
    step_buffer_bytes: int
    kv_bytes: int
    kv_bytes_per_block: int
    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    state_bytes: int = 0
    num_state_slots: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that fit into the KV cache."""
        return self.num_blocks * self.block_size

    def chats(self) -> list[tuple[int, int]]:
        """``(how many chats, tokens of each)`` that fit at once: all seats, and the longest."""
        shared = min(self.max_model_len, self.num_blocks // self.max_num_seqs * self.block_size)
        whole = -(-self.max_model_len // self.block_size)
        longest = (min(self.max_num_seqs, self.num_blocks // whole), self.max_model_len)
        if shared == 0:
            seats = (self.num_blocks, min(self.block_size, self.max_model_len))
        else:
            seats = (self.max_num_seqs, shared)
        return [longest] if seats == longest else [seats, longest]

    def describe(self) -> str:
        """Several lines for a person, without a trailing newline."""
        per_token = self.kv_bytes_per_block / self.block_size
        chats = ", or ".join(
            f"{count:,} {'chat' if count == 1 else 'chats'} of {length:,}"
            for count, length in self.chats()
        )
        lines = [
            f"available     {format_bytes(self.available.num_bytes)} ({self.available.source})",
            f"weights       {format_bytes(self.weight_bytes)}",
            f"step buffers  {format_bytes(self.step_buffer_bytes)}",
            f"KV blocks     {self.num_blocks:,} of {self.block_size} tokens, "
            f"{format_bytes(self.kv_bytes)} ({format_bytes(per_token)} per token)",
            f"tokens        {self.num_tokens:,} fit: {chats} tokens",
        ]
        if self.num_state_slots:
            each = self.state_bytes / self.num_state_slots
            lines.append(
                f"states        {self.num_state_slots:,} of {format_bytes(each)}, "
                f"{format_bytes(self.state_bytes)}: a chat that runs has one, prefixes the others"
            )
        return "\n".join(lines)


def plan_memory(
    *,
    available: AvailableMemory,
    weight_bytes: int,
    step_buffer_bytes: int,
    kv_bytes_per_block: int,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    kv_cache_memory: int | None = None,
    use_all: bool = False,
    state_bytes: int = 0,
    num_drafts: int = 0,
) -> MemoryPlan:
    """Sizes the KV cache, states included, of which each takes ``state_bytes``.

    ``num_drafts`` of a request may be in a step; each needs a slot for the state before it.

    ``kv_cache_memory`` is what was asked for in bytes. Without it, ``use_all`` (a GPU, whose
    ``available`` is already a share) takes whatever the weights and buffers leave, up to eight
    times what ``max_num_seqs`` sequences of ``max_model_len`` can use; otherwise it is the least of
    a quarter of ``available``, 4 GiB, what those sequences can use, and what is left.

    Raises KVCacheMemoryError when weights, buffers and cache do not fit together, or when the
    cache cannot hold one sequence of ``max_model_len`` tokens.
    """
    room = available.num_bytes - weight_bytes - step_buffer_bytes
    blocks_per_sequence = -(-max_model_len // block_size)
    all_seats = max_num_seqs * blocks_per_sequence * kv_bytes_per_block
    all_states = (MAX_STATES_PER_SEAT * max_num_seqs + num_drafts) * state_bytes
    least_states = (2 + num_drafts if num_drafts else 1) * state_bytes
    all_seats += all_states
    if kv_cache_memory is not None:
        budget = kv_cache_memory
    elif use_all:
        budget = min(room, MAX_GPU_SHARE * all_seats)
    else:
        budget = min(
            int(DEFAULT_CPU_SHARE * available.num_bytes),
            DEFAULT_CPU_LIMIT,
            all_seats,
            room,
        )
    num_states = 0
    if state_bytes:
        num_states = max(min(int(STATE_SHARE * budget), all_states), least_states) // state_bytes
    num_blocks = max(budget - num_states * state_bytes, 0) // kv_bytes_per_block
    sizes = (
        f"weights {format_bytes(weight_bytes)} + step buffers {format_bytes(step_buffer_bytes)} + "
        f"KV cache {format_bytes(max(budget, 0))}; available: {format_bytes(available.num_bytes)} "
        f"({available.source})"
    )
    if room < 0 or budget > room:
        raise KVCacheMemoryError(
            f"the model and its KV cache do not fit into memory: {sizes}. "
            + (
                f"Lower --kv-cache-memory to {_size_flag(room)} or less"
                if room >= blocks_per_sequence * kv_bytes_per_block
                else "A smaller model or dtype, or more memory, is needed"
                + ("; --gpu-memory-utilization says how much may be used" if use_all else "")
            )
        )
    if num_blocks < blocks_per_sequence:
        shortest = num_blocks * block_size
        needed = blocks_per_sequence * kv_bytes_per_block
        needed += max(min(needed, all_states), least_states)  # as many states leave it so much
        advice = _advice(shortest, needed, room, on_gpu=use_all)
        raise KVCacheMemoryError(
            f"the KV cache holds {shortest} tokens, fewer than one sequence of --max-model-len "
            f"{max_model_len}: {advice}. {sizes}"
        )
    return MemoryPlan(
        available=available,
        weight_bytes=weight_bytes,
        step_buffer_bytes=step_buffer_bytes,
        kv_bytes=num_blocks * kv_bytes_per_block,
        kv_bytes_per_block=kv_bytes_per_block,
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        state_bytes=num_states * state_bytes,
        num_state_slots=num_states,
    )


def plan_host_blocks(swap_space: int, kv_bytes_per_block: int, available: AvailableMemory) -> int:
    """Blocks that ``swap_space`` bytes of host memory hold, each as large as one of the device.

    Raises KVCacheMemoryError when ``available``, of the host, is less, or not one block fits.
    """
    if swap_space > available.num_bytes:
        raise KVCacheMemoryError(
            f"--swap-space {format_bytes(swap_space)} is more than the host has: "
            f"{format_bytes(available.num_bytes)} ({available.source})"
        )
    if swap_space < kv_bytes_per_block:
        raise KVCacheMemoryError(
            f"--swap-space must hold at least one KV block, {format_bytes(kv_bytes_per_block)}, "
            f"got {format_bytes(swap_space)}"
        )
    return swap_space // kv_bytes_per_block


def parse_bytes(text: str) -> int:
    """Bytes of a size like ``4GiB``, ``512MiB``, ``2G``, ``1.5g`` or ``1073741824``.

    ``K``, ``M``, ``G``, ``T`` alone and with ``iB`` are powers of 1024, with ``B`` powers of 1000.
    Raises ConfigError for anything else, and for zero.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"a size must look like 4GiB, 512MiB or 2G, got {text!r}")
    number, prefix, binary = match.groups()
    is_decimal = prefix != "" and not binary and text.strip().lower().endswith("b")
    if binary and not prefix:
        raise ConfigError(f"a size must look like 4GiB, 512MiB or 2G, got {text!r}")
    size = int(float(number) * (1000 if is_decimal else 1024) ** _POWERS[prefix.lower()])
    if size < 1:
        raise ConfigError(f"a size must be at least one byte, got {text!r}")
    return size


def format_bytes(num_bytes: float) -> str:
    """``num_bytes`` with the largest binary unit that leaves at least 1."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def _advice(num_tokens: int, needed: int, room: int, *, on_gpu: bool) -> str:
    """What to do when the cache holds ``num_tokens`` and ``needed`` bytes would be enough."""
    lower = f"lower --max-model-len to {num_tokens} or " if num_tokens else ""
    if needed <= room:
        return f"{lower}raise --kv-cache-memory to {_size_flag(needed, round_up=True)}"
    more = "raise --gpu-memory-utilization or " if on_gpu else ""
    return (
        f"{lower}{more}free memory ({format_bytes(room)} are left for the cache, "
        f"{format_bytes(needed)} are needed)"
    )


def _size_flag(num_bytes: int, *, round_up: bool = False) -> str:
    """A value for ``--kv-cache-memory``, in whole MiB."""
    return f"{-(-num_bytes // MIB) if round_up else num_bytes // MIB}MiB"
