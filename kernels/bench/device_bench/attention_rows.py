"""Rows of paged attention: decodes, prompts, both at once, and a prefix that many share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from device_bench.peers import attention_peers
from device_bench.row import Bench, Case, Row, check_close, tolerance
from streamserve_kernels import PrefixGroups

FLOAT8 = torch.float8_e4m3fn
_TOLERANCE_FLOAT8 = 5e-2  # a kernel may multiply in 8 bits


@dataclass(frozen=True, slots=True)
class Shape:
    """`requests` are (length, queries); all of them share the first `shared` tokens.

    With `latent` a token has one vector for all heads, as DeepSeek V2 has them.
    """

    requests: tuple[tuple[int, int], ...]
    block_size: int = 64
    float8: bool = False
    shared: int = 0
    window: int | None = None
    latent: bool = False

    def heads(self, bench: Bench) -> tuple[int, int, int, int]:
        """Query heads, key and value heads, the size of a key and that of a value."""
        sizes = bench.sizes
        size = sizes.head_size
        if self.latent:  # 576 and 512, of heads of 128
            return sizes.heads, 1, 4 * size + size // 2, 4 * size
        return sizes.heads, sizes.kv_heads, size, size

    @property
    def num_queries(self) -> int:
        return sum(queries for _, queries in self.requests)

    def num_pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        most = self.window or max(length for length, _ in self.requests)
        return sum(min(n - q + i, most) for n, q in self.requests for i in range(1, q + 1))

    def num_keys(self) -> int:
        """Tokens in the cache that must be read, shared ones once."""
        hidden = 0
        if self.window is not None:
            hidden = sum(max(0, n - q + 1 - self.window) for n, q in self.requests)
        return self.shared + sum(length - self.shared for length, _ in self.requests) - hidden


def rows(quick: bool) -> list[Row]:
    decode = {
        "decode 64 x 4k": (64, 4096),
        "decode 1 x 32k": (1, 32768),
        "decode 16 x 1k": (16, 1024),
    }
    made = [_row(name, _decodes(*size)) for name, size in decode.items()]
    made += [
        _row(f"decode 64 x 4k, blocks of {size}", _decodes(64, 4096, block_size=size))
        for size in (16, 32)
    ]
    made += [
        _row(f"{name}, float8", _decodes(*decode[name], float8=True))
        for name in ("decode 64 x 4k", "decode 1 x 32k")
    ]
    made += [
        _row("decode 64 x 4k, window of 1k", _in_window(_decodes(64, 4096))),
        _row("prompt 1 x 4k, window of 1k", _in_window(_prompt)),
        _row("prompt 1 x 4k", _prompt),
        _row("chunk 512 after 8k", lambda bench: Shape((_chunk(bench, 512, 8192),))),
        _row("mixed: 63 x 1k and a chunk of 512", _mixed),
        _row("shared 64 x 4k, own 128", _shared),
        _row("latents: decode 64 x 4k", _of_latents(_decodes(64, 4096))),
        _row("latents: prompt 1 x 4k", _of_latents(_prompt)),
    ]
    left_out = ("blocks", "window", "latents") if quick else ()
    return [row for row in made if not any(word in row.name for word in left_out)]


def _row(name: str, shape: Callable[[Bench], Shape]) -> Row:
    return Row("attention", name, lambda bench: _build(bench, shape(bench)))


def _decodes(
    count: int, length: int, block_size: int = 64, float8: bool = False
) -> Callable[[Bench], Shape]:
    def shape(bench: Bench) -> Shape:
        requests = ((bench.sizes.tokens(length), 1),) * bench.sizes.requests(count)
        return Shape(requests, block_size, float8)

    return shape


def _prompt(bench: Bench) -> Shape:
    return Shape(((bench.sizes.tokens(4096),) * 2,))


def _in_window(shape: Callable[[Bench], Shape]) -> Callable[[Bench], Shape]:
    return lambda bench: replace(shape(bench), window=bench.sizes.tokens(1024))


def _of_latents(shape: Callable[[Bench], Shape]) -> Callable[[Bench], Shape]:
    return lambda bench: replace(shape(bench), latent=True)


def _chunk(bench: Bench, queries: int, after: int) -> tuple[int, int]:
    return bench.sizes.tokens(queries + after), bench.sizes.tokens(queries)


def _mixed(bench: Bench) -> Shape:
    decodes = ((bench.sizes.tokens(1024), 1),) * bench.sizes.requests(63)
    return Shape((*decodes, _chunk(bench, 512, 0)))


def _shared(bench: Bench) -> Shape:
    # At least two blocks and two members, or there is nothing to share.
    shared = max(64, bench.sizes.tokens(4096))
    count = max(2, bench.sizes.requests(64))
    return Shape(((shared + bench.sizes.tokens(128), 1),) * count, shared=shared)


@dataclass(frozen=True, slots=True)
class Batch:
    """Arguments of `paged_attention`."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    max_query_len: int
    prefix_groups: PrefixGroups | None
    window: int | None

    def call(self, bench: Bench) -> Tensor:
        return bench.kernels.paged_attention(
            *self.tensors(),
            scale=self.query.shape[2] ** -0.5,
            window=self.window,
            prefix_groups=self.prefix_groups,
            max_query_len=self.max_query_len,
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return (
            self.query,
            self.key_cache,
            self.value_cache,
            self.block_table,
            self.seq_lens,
            self.query_start_loc,
        )


def make_batch(bench: Bench, shape: Shape) -> Batch:
    """Random queries and caches, blocks in random order, those of a shared prefix in each table."""
    size = shape.block_size
    num_shared = shape.shared // size
    count = len(shape.requests)
    widest = max(-(-length // size) for length, _ in shape.requests)
    own = widest - num_shared
    ids = torch.randperm(num_shared + count * own, device=bench.device).int()
    table = ids[num_shared:].view(count, own)
    if num_shared:
        table = torch.cat([ids[:num_shared].expand(count, -1), table], dim=1)
    heads, kv_heads, *head_sizes = shape.heads(bench)
    key_cache, value_cache = (
        bench.randn(*bench.kernels.kv_cache_shape(len(ids), size, kv_heads, head_size))
        for head_size in head_sizes
    )
    if shape.float8:
        key_cache, value_cache = key_cache.to(FLOAT8), value_cache.to(FLOAT8)
    starts = [0]
    for _, queries in shape.requests:
        starts.append(starts[-1] + queries)
    groups = None
    if num_shared:
        groups = PrefixGroups(
            bench.ints(range(count)), bench.ints([0, count]), bench.ints([num_shared])
        )
    return Batch(
        bench.randn(shape.num_queries, heads, head_sizes[0]),
        key_cache,
        value_cache,
        table.contiguous(),
        bench.ints([length for length, _ in shape.requests]),
        bench.ints(starts),
        max(queries for _, queries in shape.requests),
        groups,
        shape.window,
    )


def _build(bench: Bench, shape: Shape) -> Case:
    heads, kv_heads, key_size, value_size = shape.heads(bench)
    itemsize = 1 if shape.float8 else bench.dtype.itemsize
    both = key_size + value_size
    kv_bytes = shape.num_keys() * kv_heads * both * itemsize
    rest = shape.num_queries * heads * both * bench.dtype.itemsize
    first = make_batch(bench, shape)

    def check() -> None:
        # The twin is given what the cache holds, in a dtype that it can compute with.
        twin = replace(
            first,
            key_cache=first.key_cache.to(bench.dtype),
            value_cache=first.value_cache.to(bench.dtype),
        )
        expected = bench.naive.paged_attention(
            *twin.tensors(), scale=key_size**-0.5, window=shape.window
        )
        allowed = _TOLERANCE_FLOAT8 if shape.float8 else tolerance(bench.dtype)
        check_close(first.call(bench), expected, allowed)

    batches = iter([first])

    def make() -> Callable[[], Tensor]:
        batch = next(batches, None) or make_batch(bench, shape)
        return lambda: batch.call(bench)

    return Case(
        calls=bench.rotated(make, kv_bytes + rest),
        check=check,
        num_bytes=kv_bytes + rest,
        flops=2 * shape.num_pairs() * heads * both,
        peers={}
        if shape.shared or shape.window or shape.latent
        else attention_peers(bench, shape.requests, kv_bytes),
    )
