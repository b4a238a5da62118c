"""Writing and copying the cache, and rotary embedding, on views of a fused projection."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamserve_kernels import Kernels

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def tables(positions: int, rot_dim: int) -> Tensor:
    """cos and sin [P, rot_dim] float32 of the usual frequencies."""
    frequencies = 10000.0 ** -(torch.arange(0, rot_dim, 2) / rot_dim)
    angles = torch.arange(positions)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def fused(seed: int, tokens: int, dtype: torch.dtype, hq: int = 9, hkv: int = 3, d: int = 64):
    """Query, key and value as views of one projection [T, (Hq + 2·Hkv)·D], and that projection."""
    random = torch.Generator().manual_seed(seed)
    qkv = torch.randn(tokens, (hq + 2 * hkv) * d, generator=random).to(dtype)
    query, key, value = qkv.split([hq * d, hkv * d, hkv * d], dim=1)
    return query.view(tokens, hq, d), key.view(tokens, hkv, d), value.view(tokens, hkv, d), qkv


@pytest.mark.parametrize("tokens", [1, 5, 130])
@pytest.mark.parametrize("rot_dim", [64, 32, 20])
@pytest.mark.parametrize("interleaved", [False, True])
@DTYPES
def test_rotary_write_is_naive(
    naive: Kernels,
    cpu: Kernels,
    tokens: int,
    rot_dim: int,
    interleaved: bool,
    dtype: torch.dtype,
) -> None:
    random = torch.Generator().manual_seed(tokens)
    slots = torch.randperm(16 * 12, generator=random)[:tokens]
    slots[tokens // 2 : tokens // 2 + (tokens > 1)] = -1
    positions = torch.randint(0, 300, (tokens,), generator=random)
    results = []
    for kernels in (naive, cpu):
        query, key, value, qkv = fused(4, tokens, dtype)
        caches = [torch.full((12, 3, 16, 64), float("nan"), dtype=dtype) for _ in range(2)]
        out = kernels.rotary_write_kv(
            query,
            key,
            value,
            positions,
            tables(300, rot_dim),
            *caches,
            slots,
            interleaved=interleaved,
        )
        assert out[0].data_ptr() == query.data_ptr(), "rotates in place"
        results.append((qkv, *caches))
    tolerance = (
        {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 0, "rtol": 8e-3}
    )
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)


@DTYPES
def test_write_kv_and_rotary_alone_are_their_fusion(
    naive: Kernels, cpu: Kernels, dtype: torch.dtype
) -> None:
    slots = torch.tensor([3, -1, 40, 17])
    positions = torch.tensor([5, 0, 9, 250])
    results = []
    for kernels in (naive, cpu):
        query, key, value, qkv = fused(5, 4, dtype)
        caches = [torch.full((4, 3, 16, 64), float("nan"), dtype=dtype) for _ in range(2)]
        kernels.rotary_embedding(query, key, positions, tables(300, 64), interleaved=False)
        kernels.write_kv(key, value, *caches, slots)
        results.append((qkv, *caches))
    tolerance = (
        {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 0, "rtol": 8e-3}
    )
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)


def test_rotary_of_separate_and_odd_tensors(naive: Kernels, cpu: Kernels) -> None:
    """Heads that are not adjacent take the naive way, and mean the same."""
    results = []
    for kernels in (naive, cpu):
        random = torch.Generator().manual_seed(6)
        query = torch.randn(4, 8, 5, 32, generator=random)[:, ::2].transpose(1, 2)[:, :, 0]
        key = torch.randn(4, 2, 32, generator=random)
        out = kernels.rotary_embedding(
            query, key, torch.arange(4), tables(10, 32), interleaved=False
        )
        results.append(out)
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_naive_rotary_is_that_of_llama_and_gptj(naive: Kernels) -> None:
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotary
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

    query, key, _, _ = fused(7, 6, torch.float32)
    positions = torch.tensor([0, 3, 2, 100, 7, 1])
    cos_sin = tables(128, 64)
    cos, sin = cos_sin[positions].chunk(2, dim=-1)
    wide = [torch.cat([x, x], dim=-1)[None] for x in (cos, sin)]
    expected = llama_rotary(query[None].transpose(1, 2), key[None].transpose(1, 2), *wide)
    got = naive.rotary_embedding(query.clone(), key.clone(), positions, cos_sin, interleaved=False)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b[0].transpose(0, 1))
    expected_gptj = gptj_rotary(query[None], sin[None], cos[None])[0]
    got = naive.rotary_embedding(query.clone(), key.clone(), positions, cos_sin, interleaved=True)
    torch.testing.assert_close(got[0], expected_gptj)


@DTYPES
def test_copy_blocks(naive: Kernels, cpu: Kernels, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(8)
    originals = [
        torch.randn(20, 3, 16, size, generator=random).to(dtype) for size in (64, 64, 48, 20)
    ]
    src, dst = torch.tensor([1, 7, 1, 19]), torch.tensor([0, 2, 3, 4])
    results = []
    for kernels in (naive, cpu):
        caches = [cache.clone() for cache in originals]
        kernels.copy_blocks(caches, src, dst)
        kernels.copy_blocks(caches, src[:0], dst[:0])
        results.append(caches)
    for original, expected, got in zip(originals, *results, strict=True):
        assert torch.equal(got, expected)
        assert torch.equal(got[dst], original[src])
        assert torch.equal(got[5:], original[5:])


def test_naive_caches_of_eight_bits(naive: Kernels) -> None:
    """Writes clamp and round, reads convert, copies copy."""
    float8 = torch.float8_e4m3fn
    random = torch.Generator().manual_seed(9)
    query, key, value = torch.randn(3, 5, 2, 16, generator=random).bfloat16()
    key[0, 0, :2] = torch.tensor([1e4, -1e4])
    slots = torch.tensor([16, 17, -1, 18, 19])
    caches = [torch.full((3, 2, 16, 16), float("nan")).to(float8) for _ in range(2)]
    naive.write_kv(key, value, *caches, slots)
    held = caches[0].float()[1, :, :4].transpose(0, 1)
    assert held[0, 0, :2].tolist() == [448.0, -448.0]
    assert torch.equal(held, key[slots >= 0].float().clamp(-448, 448).to(float8).float())
    assert caches[0].float().isnan().sum() == caches[0].numel() - 4 * 2 * 16
    naive.copy_blocks(caches, torch.tensor([1]), torch.tensor([2]))
    tables = [torch.tensor([[block]], dtype=torch.int32) for block in (1, 2)]
    lengths = torch.tensor([4], dtype=torch.int32)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    wide = [cache.float() for cache in caches]
    expected = naive.paged_attention(query[:1], *wide, tables[0], lengths, starts, scale=0.2)
    assert not expected.isnan().any()
    for table in tables:
        found = naive.paged_attention(query[:1], *caches, table, lengths, starts, scale=0.2)
        assert torch.equal(found, expected)
