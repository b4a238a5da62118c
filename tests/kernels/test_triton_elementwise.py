"""Norms, activations, rotation, cache writes and copies against the naive twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streamserve_kernels import naive
from tests.kernels.conftest import TOLERANCE

triton = pytest.importorskip("triton")
ours = pytest.importorskip("streamserve_kernels.triton")

FLOAT8 = torch.float8_e4m3fn
# query heads, kv heads, head size, value size, rotated, interleaved
LAYOUTS = [
    (4, 2, 64, 64, 64, False),
    (3, 1, 80, 80, 32, False),
    (4, 4, 64, 48, 64, True),
    (6, 2, 96, 96, 16, True),
    (8, 8, 128, 128, 128, False),
]


def close(found, expected, dtype: torch.dtype) -> None:
    for one, other in zip(_all(found), _all(expected), strict=True):
        assert one.dtype == other.dtype
        bounds = TOLERANCE[dtype] if dtype != torch.float32 else {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(one.float().cpu(), other.float().cpu(), **bounds)


def _all(tensors: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tensors if isinstance(tensors, tuple) else (tensors,)


def normal(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(device, dtype)


@pytest.mark.parametrize("size", [64, 100, 4096])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_norms(device, dtype, size, with_residual, strided):
    x = normal(5, 2 * size, device=device, dtype=dtype)
    x = x[:, :size] if strided else x[:, :size].contiguous()
    x[0] *= 1e-3  # as small as epsilon
    weight, bias = (normal(size, device=device, dtype=dtype) for _ in range(2))
    residual = normal(5, size, device=device, dtype=dtype) if with_residual else None
    before = x.clone()
    for offset in (0.0, 0.25):
        args = (x, weight, 1e-5, residual, offset)
        close(ours.rms_norm(*args), naive.rms_norm(*args), dtype)
    for parts in ((weight, bias), (weight, None), (None, None)):
        args = (x, *parts, 1e-5, residual)
        close(ours.layer_norm(*args), naive.layer_norm(*args), dtype)
    assert x.equal(before)
    of_heads = normal(5, size, device=device, dtype=dtype)
    args = (x, of_heads, None, 1e-5, residual)
    close(ours.layer_norm(*args), naive.layer_norm(*args), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_round_where_the_twin_rounds(device, dtype):
    """A sum in another order may round a few numbers to the other side, not more."""
    x, residual, weight, bias = (normal(3, 2048, device=device, dtype=dtype) for _ in range(4))
    weight, bias = weight[0], bias[0]
    for name, args in (
        ("rms_norm", (x, weight, 1e-5)),
        ("rms_norm", (x, weight, 1e-5, residual)),
        ("layer_norm", (x, weight, bias, 1e-5, residual)),
    ):
        found, expected = (_all(getattr(kernels, name)(*args)) for kernels in (ours, naive))
        for one, other in zip(found, expected, strict=True):
            assert (one != other).float().mean() < 0.02, name


def test_norms_of_more_dimensions_and_of_nothing(device, dtype):
    weight = normal(32, device=device, dtype=dtype)
    x = normal(3, 4, 32, device=device, dtype=dtype)
    close(ours.rms_norm(x, weight, 1e-6), naive.rms_norm(x, weight, 1e-6), dtype)
    assert ours.rms_norm(x[:0], weight, 1e-6).shape == (0, 4, 32)


@pytest.mark.parametrize(
    "kind",
    ["silu", "gelu", "gelu_tanh", "gelu_new", "gelu_fast", "quick_gelu", "relu", "relu2"],
)
def test_activations(device, dtype, kind):
    x = 4 * normal(3, 2200, device=device, dtype=dtype)[:, :2100]
    x[0, :3] = torch.tensor([60.0, -60.0, 0.0])
    close(ours.activation(x, kind), naive.activation(x, kind), dtype)
    if kind in ("silu", "gelu", "gelu_tanh", "relu"):
        close(ours.gated_activation(x, kind), naive.gated_activation(x, kind), dtype)


def test_a_clamped_gate(device, dtype):
    x = 5 * normal(3, 2100, device=device, dtype=dtype)
    kind = "clamped_swiglu"
    close(ours.gated_activation(x, kind), naive.gated_activation(x, kind), dtype)
    with pytest.raises(ValueError, match="'clamped_swiglu' is not known"):
        ours.activation(x, kind)


def test_an_unknown_activation_is_refused(device, dtype):
    with pytest.raises(ValueError, match="'sine' is not known"):
        ours.activation(normal(1, 8, device=device, dtype=dtype), "sine")


def test_embedding_and_pending_tokens(device, dtype):
    weight = normal(50, 1040, device=device, dtype=dtype)[:, :1030]
    ids = torch.tensor([3, 49, 0, 3], device=device)
    assert ours.embedding(ids, weight).equal(weight[ids])
    ids = torch.tensor([5, -1, -3, 7] * 300, device=device)
    last = torch.arange(10, device=device) * 11
    expected = ids.clone()
    naive.resolve_tokens(expected, last)
    assert expected[:4].tolist() == [5, 0, 22, 7]
    ours.resolve_tokens(ids, last)
    assert ids.equal(expected)


class Cached:
    """Queries, keys, values as views of one product, and caches that hold NaN."""

    def __init__(self, layout, tokens: int, cache_dtype: torch.dtype, device, dtype) -> None:
        heads, kv_heads, size, value_size, rotated, self.interleaved = layout
        blocks, self.block_size = 12, 16
        self.slots = torch.randperm(blocks * self.block_size)[:tokens].to(device)
        self.slots[tokens // 2 :: 7] = -1
        self.positions = torch.randint(0, 50, (tokens,)).to(device)
        self.cos_sin = torch.randn(50, rotated).to(device)
        self.sizes = heads * size, kv_heads * size, kv_heads * value_size
        self.heads = (heads, size), (kv_heads, size), (kv_heads, value_size)
        self.qkv = normal(tokens, sum(self.sizes), device=device, dtype=dtype)
        self.caches = tuple(
            torch.full((blocks, kv_heads, self.block_size, width), torch.nan)
            .to(cache_dtype)
            .to(device)
            for width in (size, value_size)
        )

    def views(self) -> list[Tensor]:
        parts = self.qkv.split(self.sizes, 1)
        return [p.view(-1, *shape) for p, shape in zip(parts, self.heads, strict=True)]

    def copy(self) -> Cached:
        other = object.__new__(Cached)
        other.__dict__.update(self.__dict__)
        other.qkv, other.caches = self.qkv.clone(), tuple(c.clone() for c in self.caches)
        return other

    def written(self) -> list[Tensor]:
        """What the caches hold in the slots that were written; elsewhere they must be NaN."""
        found = []
        for cache in self.caches:
            rows = cache.float().cpu().transpose(1, 2).flatten(0, 1)
            slots = self.slots[self.slots >= 0].cpu()
            found.append(rows[slots])
            rows[slots] = torch.nan
            assert rows.isnan().all()
        return found


@pytest.mark.parametrize("cache_dtype", [None, FLOAT8], ids=["same", "float8"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_rotation_and_the_cache_write(device, dtype, layout, tokens, cache_dtype):
    case = Cached(layout, tokens, cache_dtype or dtype, device, dtype)
    other = case.copy()
    query, key, value = case.views()
    query_out, key_out = ours.rotary_write_kv(
        query, key, value, case.positions, case.cos_sin, *case.caches, case.slots,
        interleaved=case.interleaved,
    )  # fmt: skip
    assert query_out.data_ptr() == query.data_ptr()
    assert key_out.data_ptr() == key.data_ptr()
    query, key, value = other.views()
    naive.rotary_embedding(
        query, key, other.positions, other.cos_sin, interleaved=other.interleaved
    )
    close(case.qkv, other.qkv, dtype)
    naive.write_kv(key, value, *other.caches, other.slots)
    for found, expected in zip(case.written(), other.written(), strict=True):
        if cache_dtype is None:
            torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
        else:  # a rounding to three bits, of values that were rounded themselves
            torch.testing.assert_close(found, expected, atol=2**-6, rtol=2**-3)


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_rotation_alone_and_the_write_alone(device, dtype, layout):
    case = Cached(layout, 9, dtype, device, dtype)
    other = case.copy()
    query, key, value = case.views()
    value = value.contiguous()  # a row of it is no further than it is long
    options = {"interleaved": case.interleaved}
    ours.rotary_embedding(query, key, case.positions, case.cos_sin, **options)
    ours.write_kv(key, value, *case.caches, case.slots)
    query, key, value = other.views()
    naive.rotary_embedding(query, key, other.positions, other.cos_sin, **options)
    naive.write_kv(key, value, *other.caches, other.slots)
    close(case.qkv, other.qkv, dtype)
    for found, expected in zip(case.written(), other.written(), strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


def test_float8_holds_no_more_than_it_can(device, dtype):
    layout = (1, 1, 16, 16, 16, False)
    case = Cached(layout, 2, FLOAT8, device, dtype)
    case.slots[:] = torch.tensor([3, 4])
    case.qkv.fill_(1000.0)
    case.qkv[1] = -1000.0
    other = case.copy()
    _, key, value = case.views()
    ours.write_kv(key, value, *case.caches, case.slots)
    naive.write_kv(key, value, *other.caches, other.slots)
    for found, expected in zip(case.written(), other.written(), strict=True):
        assert found.equal(expected)
        assert found[:, 0, 0].tolist() == [448.0, -448.0]


@pytest.mark.parametrize("width", [24, 3], ids=["words", "odd bytes"])
def test_copies_of_blocks(device, dtype, width):
    caches = [normal(9, 2, 16, width, device=device, dtype=dtype) for _ in range(3)]
    caches += [normal(9, 1, 1, 5, device=device, dtype=dtype) for _ in range(2)]
    caches.append(normal(9, 4, 16, 160, device=device, dtype=dtype))  # more than a program copies
    expected = [cache.clone() for cache in caches]
    src, dst = torch.tensor([1, 2, 5], device=device), torch.tensor([0, 8, 3], device=device)
    naive.copy_blocks(expected, src, dst)
    for _ in range(2):
        ours.copy_blocks(caches, src, dst)
        assert all(one.equal(other) for one, other in zip(caches, expected, strict=True))
    ours.copy_blocks(caches, src[:0], dst[:0])
