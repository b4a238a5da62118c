"""The same work by other libraries, where they are installed: what a kernel has to beat.

Each peer gets its inputs in the layout that it likes best, contiguous where ours are paged.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from device_bench.row import Bench
from device_bench.timing import Call

Peers = dict[str, Callable[[], Sequence[Call]]]


def attention_peers(bench: Bench, requests: Sequence[tuple[int, int]], kv_bytes: float) -> Peers:
    """Where all requests are alike: SDPA, flex attention, FlashInfer and vLLM's flash attention."""
    if len(set(requests)) != 1:
        return {}
    make = {"SDPA": _sdpa}
    if bench.device.type == "cuda":
        if bench.with_flex:
            make["flex"] = _flex
        if importlib.util.find_spec("flashinfer") is not None:
            make["FlashInfer"] = _flashinfer
        if importlib.util.find_spec("vllm") is not None:
            make["vLLM flash"] = _vllm_flash
    (length, queries), count = requests[0], len(requests)
    return {
        name: partial(bench.rotated, partial(peer, bench, count, length, queries), kv_bytes)
        for name, peer in make.items()
    }


def _dense(bench: Bench, count: int, length: int, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [R, Hq, q, D], keys and values [R, Hkv, L, D]."""
    sizes = bench.sizes
    keys = (count, sizes.kv_heads, length, sizes.head_size)
    query = bench.randn(count, sizes.heads, queries, sizes.head_size)
    return query, bench.randn(*keys), bench.randn(*keys)


def _sdpa(bench: Bench, count: int, length: int, queries: int) -> Call:
    query, key, value = _dense(bench, count, length, queries)
    attend = partial(F.scaled_dot_product_attention, query, key, value, enable_gqa=True)
    if queries == 1:
        return attend
    if queries == length:
        return partial(attend, is_causal=True)
    from torch.nn.attention.bias import causal_lower_right

    return partial(attend, attn_mask=causal_lower_right(queries, length))


def _flex(bench: Bench, count: int, length: int, queries: int) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value = _dense(bench, count, length, queries)
    offset = length - queries

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q + offset >= k

    mask = None
    if queries > 1:
        mask = create_block_mask(causal, None, None, queries, length, device=bench.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, block_mask=mask, enable_gqa=True)


def _flashinfer(bench: Bench, count: int, length: int, queries: int) -> Call:
    import flashinfer

    sizes, page = bench.sizes, 16
    if queries > 1:
        query, key, value = _dense(bench, 1, length, queries)
        prefill = flashinfer.single_prefill_with_kv_cache
        heads_last = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]
        return lambda: prefill(*heads_last, causal=True)
    pages = -(-length // page)
    cache = bench.randn(count * pages, 2, page, sizes.kv_heads, sizes.head_size)
    query = bench.randn(count, sizes.heads, sizes.head_size)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=bench.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        bench.ints(range(0, (count + 1) * pages, pages)),
        torch.randperm(count * pages, device=bench.device).int(),
        bench.ints([(length - 1) % page + 1] * count),
        sizes.heads,
        sizes.kv_heads,
        sizes.head_size,
        page,
        q_data_type=bench.dtype,
        kv_data_type=bench.dtype,
    )
    return lambda: wrapper.run(query, cache)


def _vllm_flash(bench: Bench, count: int, length: int, queries: int) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    sizes, page = bench.sizes, 16
    pages = -(-length // page)
    shape = (count * pages, page, sizes.kv_heads, sizes.head_size)
    key, value = bench.randn(*shape), bench.randn(*shape)
    table = torch.randperm(count * pages, device=bench.device).int().view(count, pages)
    return partial(
        flash_attn_varlen_func,
        bench.randn(count * queries, sizes.heads, sizes.head_size),
        key,
        value,
        max_seqlen_q=queries,
        cu_seqlens_q=bench.ints(range(0, (count + 1) * queries, queries)),
        max_seqlen_k=length,
        seqused_k=bench.ints([length] * count),
        block_table=table,
        causal=True,
    )


def naive_peer(bench: Bench, call: Callable[[], Call], num_bytes: float) -> Peers:
    """The naive twin itself: what plain torch takes."""
    return {"plain torch": lambda: bench.rotated(call, num_bytes)}


def sampling_peers(
    bench: Bench,
    rotated: Callable[[Bench, Callable[[Tensor], object]], Sequence[Call]],
    top_k: int,
    top_p: float,
) -> Peers:
    """FlashInfer's, where it is installed: the temperature has been applied."""
    if bench.device.type != "cuda" or importlib.util.find_spec("flashinfer") is None:
        return {}

    def make() -> Sequence[Call]:
        from flashinfer.sampling import top_k_top_p_sampling_from_logits as sample

        k = top_k or bench.sizes.vocab
        return rotated(bench, lambda logits: sample(logits.float(), k, top_p))

    return {"FlashInfer": make}
