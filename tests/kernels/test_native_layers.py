"""The native norms, activations, products, rotation and cache writes against the naive twin."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import get_args

import pytest
import torch
from torch import Tensor

from streamserve_kernels import ActivationKind, GatedKind, Kernels, PackedLinear, onednn
from streamserve_kernels.native import unpack_keys, unpack_values
from streamserve_kernels.native.execute import Executable
from streamserve_kernels.routing import Routing
from tests.kernels.conftest import threads
from tests.kernels.test_layers import both, normal

# Not the function of that name.
linear_module = importlib.import_module("streamserve_kernels.native.linear")
BF16 = torch.bfloat16
NAN = float("nan")
# One rounding: the twin's sums are in another order.
TIGHT = {"atol": 4e-6, "rtol": 8e-3}


@pytest.mark.parametrize("width", [1, 15, 64, 579, 2050])
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norms_are_naive(
    naive: Kernels, native: Kernels, rows: int, width: int, with_residual: bool
) -> None:
    wide = torch.full((rows, width + 21), NAN, dtype=BF16)
    x = wide[:, 3 : 3 + width].copy_(normal(3, rows, width))
    weight, bias = normal(4, width, dtype=BF16), normal(5, width, dtype=BF16)
    residual = normal(6, rows, width, dtype=BF16) if with_residual else None
    calls = [
        lambda k: k.rms_norm(x, weight, 1e-6, residual),
        lambda k: k.rms_norm(x, weight, 1e-6, residual, weight_offset=1.0),
        lambda k: k.layer_norm(x, weight, bias, 1e-5, residual),
        lambda k: k.layer_norm(x, weight, None, 1e-5, residual),
        lambda k: k.layer_norm(x, None, bias, 1e-5, residual),
        lambda k: k.layer_norm(x, None, None, 1e-5, residual),
    ]
    before = wide.clone()
    for call in calls:
        expected, got = both(call(naive)), both(call(native))
        assert len(got) == len(expected)
        # Rounded before the weight, and after it.
        torch.testing.assert_close(got[0], expected[0], atol=4e-6, rtol=1.6e-2)
        if with_residual:
            assert torch.equal(got[1], expected[1])
    assert torch.equal(wide.nan_to_num(9), before.nan_to_num(9)), "inputs are left alone"


def test_norms_of_stacked_rows_and_none(naive: Kernels, native: Kernels) -> None:
    weight = normal(1, 48, dtype=BF16)
    for shape in ((2, 3, 48), (48,), (0, 48)):
        x = normal(2, *shape, dtype=BF16)
        torch.testing.assert_close(
            native.rms_norm(x, weight, 1e-6), naive.rms_norm(x, weight, 1e-6), **TIGHT
        )
    swapped = normal(3, 48, 5, dtype=BF16).T
    torch.testing.assert_close(
        native.layer_norm(swapped, weight, None, 1e-6, swapped),
        naive.layer_norm(swapped, weight, None, 1e-6, swapped),
        **TIGHT,
    )


def test_heads_may_have_weights_of_their_own(naive: Kernels, native: Kernels) -> None:
    weight = normal(1, 5, 48, dtype=BF16)
    wide = normal(2, 30, 60, dtype=BF16)
    for x in (wide[:, :48], wide.flatten()[: 35 * 48].view(35, 48), wide[:0, :48]):
        expected = naive.layer_norm(x, weight, None, 1e-5)
        torch.testing.assert_close(native.layer_norm(x, weight, None, 1e-5), expected, **TIGHT)
    one = torch.nn.functional.layer_norm(wide[3, :48].float(), (48,), weight[3].float())
    found = naive.layer_norm(wide[:, :48], weight, None, 1e-5)[3]
    torch.testing.assert_close(found.float(), one, **TIGHT)


def test_what_norms_cannot_take_is_refused(native: Kernels) -> None:
    x, weight = normal(1, 4, 32, dtype=BF16), normal(2, 32, dtype=BF16)
    with pytest.raises(TypeError, match=r"must be bfloat16, got torch\.float32"):
        native.rms_norm(x.float(), weight, 1e-6)
    with pytest.raises(TypeError, match=r"must be bfloat16, got torch\.float32"):
        native.layer_norm(x, weight, weight.float(), 1e-6)
    for wrong in (weight[:31], weight.repeat_interleave(2)[::2]):
        with pytest.raises(ValueError, match="32 adjacent numbers"):
            native.rms_norm(x, wrong, 1e-6)
    with pytest.raises(ValueError, match="residual"):
        native.rms_norm(x, weight, 1e-6, x[:1])


@pytest.mark.parametrize("kind", get_args(ActivationKind))
@pytest.mark.parametrize("shape", [(1, 7), (7, 333), (130, 48), (2, 3, 20), (0, 16)])
def test_activations_are_naive(
    naive: Kernels, native: Kernels, kind: str, shape: tuple[int, ...]
) -> None:
    x = normal(9, *shape, dtype=BF16) * 4
    torch.testing.assert_close(native.activation(x, kind), naive.activation(x, kind), **TIGHT)


@pytest.mark.parametrize("kind", get_args(GatedKind))
@pytest.mark.parametrize("rows", [1, 4, 50])
@pytest.mark.parametrize("width", [1, 31, 1537])
def test_gated_activations_are_naive(
    naive: Kernels, native: Kernels, kind: str, rows: int, width: int
) -> None:
    x = torch.full((rows, 2 * width + 5), NAN, dtype=BF16)[:, 3:-2]
    x.copy_(normal(10, rows, 2 * width) * 5)
    expected = naive.gated_activation(x, kind)
    for count in (1, 3):
        with threads(count):
            torch.testing.assert_close(native.gated_activation(x, kind), expected, **TIGHT)


@pytest.mark.parametrize("kind", get_args(ActivationKind))
def test_activations_of_extreme_values(naive: Kernels, native: Kernels, kind: str) -> None:
    x = torch.tensor([[-1e30, -1e15, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 1e15, 1e30, NAN]])
    expected = naive.activation(x.to(BF16), kind)
    out = native.activation(x.to(BF16), kind)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=8e-3, equal_nan=True)


def test_what_activations_cannot_take_is_refused(native: Kernels) -> None:
    x = torch.zeros(2, 6, dtype=BF16)
    for call in (native.activation, native.gated_activation):
        with pytest.raises(ValueError, match="'swish'"):
            call(x, "swish")
        with pytest.raises(TypeError, match="float32"):
            call(x.float(), "silu")
    with pytest.raises(ValueError, match="'clamped_swiglu'"):
        native.activation(x, "clamped_swiglu")
    with pytest.raises(ValueError, match="5 elements"):
        native.gated_activation(x[:, :5], "silu")


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.double()
    return torch.nn.functional.linear(x.double(), weight.double(), bias).to(BF16)


SHAPES = [(960, 576), (100, 72), (37, 31), (64, 1536), (16, 20), (1, 1), (130, 2), (65, 1030)]


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("matrix_units", [False, True], ids=["ours", "onednn"])
def test_linear(
    native: Kernels,
    monkeypatch: pytest.MonkeyPatch,
    out_features: int,
    in_features: int,
    with_bias: bool,
    matrix_units: bool,
) -> None:
    """Also on oneDNN's own packed weight, whose product takes over where there are many rows."""
    monkeypatch.setattr(linear_module, "has_matrix_units", lambda: matrix_units)
    weight = normal(11, out_features, in_features, dtype=BF16)
    bias = normal(12, out_features, dtype=BF16) if with_bias else None
    wide = torch.full((200, in_features + 9), NAN, dtype=BF16)
    wide[:, 1 : 1 + in_features] = normal(13, 200, in_features)
    packed = native.prepare_linear(weight.clone(), bias)
    for rows in (0, 1, 2, 5, 6, 7, 8, 9, 12, 13, 31, 48, 49, 96, 97, 200):
        x = wide[:rows, 1 : 1 + in_features]
        out = native.linear(x, packed)
        assert out.dtype == BF16
        torch.testing.assert_close(out, exact(x, weight, bias), atol=1e-2, rtol=8e-3)
    assert isinstance(packed, PackedLinear)
    assert torch.equal(packed.unpack(), weight)
    assert (packed.out_features, packed.in_features) == (out_features, in_features)
    assert packed.nbytes >= weight.nbytes + (0 if bias is None else bias.nbytes)
    stacked = native.linear(wide[:6, 1 : 1 + in_features].reshape(2, 3, -1), packed)
    assert torch.equal(stacked.view(6, -1), packed(wide[:6, 1 : 1 + in_features]))


def test_onednns_weight_is_used_where_its_layout_is_ours(
    native: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "has_matrix_units", lambda: True)
    weight = normal(1, 576, 576, dtype=BF16)
    width = onednn.packed_width(onednn.pack(weight), weight)
    packed = native.prepare_linear(weight)
    assert packed.few_rows == (linear_module.FEW_ROWS if width == 64 else None)
    assert native.prepare_linear(weight[:, :575]).few_rows is None


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_row_does_not_depend_on_its_batch_or_the_threads(native: Kernels, count: int) -> None:
    weight, bias = normal(1, 1000, 770, dtype=BF16), normal(2, 1000, dtype=BF16)
    packed = native.prepare_linear(weight, bias)
    x = normal(3, 101, 770, dtype=BF16)
    alone = torch.cat([packed(row[None]) for row in x])
    with threads(count):
        for rows in (2, 5, 7, 13, 50, 101):
            assert torch.equal(packed(x[:rows]), alone[:rows])
            assert torch.equal(packed(x[-rows:]), alone[-rows:])


def test_rows_of_any_stride(native: Kernels) -> None:
    weight = normal(1, 40, 30, dtype=BF16)
    packed = native.prepare_linear(weight.T.contiguous().T)
    x = normal(2, 30, 5, dtype=BF16).T
    expected = exact(x, weight, None)
    torch.testing.assert_close(packed(x), expected, atol=1e-2, rtol=8e-3)
    torch.testing.assert_close(packed(x[0]), expected[0], atol=1e-2, rtol=8e-3)
    repeated = packed(x[:1].expand(7, 30))
    assert torch.equal(repeated, packed(x[:1]).expand(7, 40))


def test_what_linear_cannot_take_is_refused(native: Kernels) -> None:
    weight = normal(1, 40, 30, dtype=BF16)
    packed = native.prepare_linear(weight)
    with pytest.raises(ValueError, match="rows of 30 bfloat16, got 29"):
        packed(torch.zeros(2, 29, dtype=BF16))
    with pytest.raises(ValueError, match=r"got 30 of torch\.float32"):
        packed(torch.zeros(2, 30))
    with pytest.raises(TypeError, match=r"bfloat16 weights, got torch\.float32"):
        native.prepare_linear(weight.float())
    with pytest.raises(ValueError, match="40 outputs"):
        native.prepare_linear(weight, torch.zeros(39, dtype=BF16))


def test_experts(naive: Kernels, native: Kernels) -> None:
    up = [normal(20 + e, 2 * 24, 16, dtype=BF16) * 0.2 for e in range(4)]
    down = [normal(30 + e, 16, 24, dtype=BF16) * 0.2 for e in range(4)]
    x, router = normal(40, 13, 16, dtype=BF16), normal(41, 13, 4, dtype=BF16)
    out, expected = (
        k.moe(
            x,
            router,
            [k.prepare_linear(w) for w in up],
            [k.prepare_linear(w) for w in down],
            Routing(2, True),
            "silu",
        )
        for k in (native, naive)
    )
    torch.testing.assert_close(out, expected, atol=1e-2, rtol=2e-2)


def caches(blocks: int, size: int, heads: int, head_size: int, value_size: int):
    return (
        torch.full((blocks, heads, size, head_size), NAN, dtype=BF16),
        torch.full((blocks, heads, size, value_size), NAN, dtype=BF16),
    )


@pytest.mark.parametrize(
    ("head_size", "value_size", "rot_dim", "block_size"),
    [(64, 64, 64, 16), (80, 64, 32, 32), (128, 16, 20, 48), (96, 96, 2, 16), (24, 48, 24, 16)],
)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tokens", [1, 37])
def test_rotation_and_cache_write_are_naive(
    naive: Kernels,
    native: Kernels,
    head_size: int,
    value_size: int,
    rot_dim: int,
    block_size: int,
    interleaved: bool,
    tokens: int,
) -> None:
    heads, kv_heads, blocks = 5, 2, 6
    widths = (heads * head_size, kv_heads * head_size, kv_heads * value_size)
    fused = normal(1, tokens, sum(widths) + 1, dtype=BF16)  # every other row at an odd address
    cos_sin = normal(2, 100, rot_dim)
    random = torch.Generator().manual_seed(3)
    positions = torch.randint(0, 100, (tokens,), generator=random)
    slots = torch.randperm(blocks * block_size, generator=random)[:tokens]
    slots[::5] = -1
    results = []
    for kernels in (naive, native):
        q, k, v = fused.clone()[:, : sum(widths)].split(widths, dim=1)
        views = (
            q.view(tokens, heads, head_size),
            k.view(tokens, kv_heads, head_size),
            v.view(tokens, kv_heads, value_size),
        )
        cache = caches(blocks, block_size, kv_heads, head_size, value_size)
        returned = kernels.rotary_write_kv(
            *views, positions, cos_sin, *cache, slots, interleaved=interleaved
        )
        assert returned[0] is views[0]
        assert returned[1] is views[1]
        results.append((*views, *cache))
    expected, got = results
    order = (unpack_keys, unpack_values)
    for theirs, ours in zip(expected[:3], got[:3], strict=True):
        torch.testing.assert_close(ours, theirs, **TIGHT)
    for theirs, ours, unpack in zip(expected[3:], got[3:], order, strict=True):
        torch.testing.assert_close(unpack(ours), theirs, equal_nan=True, **TIGHT)
    query, key = got[0].clone(), got[1].clone()
    native.rotary_embedding(query, key, positions, cos_sin, interleaved=interleaved)
    naive.rotary_embedding(got[0], got[1], positions, cos_sin, interleaved=interleaved)
    torch.testing.assert_close(query, got[0], **TIGHT)
    torch.testing.assert_close(key, got[1], **TIGHT)


@pytest.mark.parametrize("block_size", [16, 32, 48])
def test_keys_and_values_come_back_from_the_cache(native: Kernels, block_size: int) -> None:
    key, value = normal(1, 40, 3, 20, dtype=BF16), normal(2, 40, 3, 32, dtype=BF16)
    slots = torch.randperm(5 * block_size, generator=torch.Generator().manual_seed(0))[:40]
    key_cache, value_cache = caches(5, block_size, 3, 20, 32)
    padding = torch.full((40,), -1)
    native.write_kv(key, value, key_cache, value_cache, padding)
    assert key_cache.isnan().all()
    assert value_cache.isnan().all()
    with threads(3):
        native.write_kv(key, value, key_cache, value_cache, slots)
    blocks, offsets = slots // block_size, slots % block_size
    assert torch.equal(unpack_keys(key_cache)[blocks, :, offsets], key)
    assert torch.equal(unpack_values(value_cache)[blocks, :, offsets], value)
    assert key_cache.isnan().sum() == key_cache.numel() - key.numel()
    assert value_cache.isnan().sum() == value_cache.numel() - value.numel()


@pytest.mark.parametrize("count", [0, 1, 5])
def test_copies_of_blocks_are_naive(naive: Kernels, native: Kernels, count: int) -> None:
    random = torch.Generator().manual_seed(4)
    order = torch.randperm(12, generator=random)
    src, dst = order[:count], order[6 : 6 + count]
    shapes = ((12, 2, 16, 8), (12, 2, 16, 6), (12, 1, 32, 10))
    mine = [normal(i, *shape, dtype=BF16) for i, shape in enumerate(shapes)]
    theirs = [cache.clone() for cache in mine]
    with threads(3):
        native.copy_blocks(mine, src, dst)
    naive.copy_blocks(theirs, src, dst)
    for ours, expected in zip(mine, theirs, strict=True):
        assert torch.equal(ours, expected)
    native.copy_blocks([], src, dst)


def test_what_the_cache_cannot_take_is_refused(native: Kernels) -> None:
    key, value = normal(1, 4, 2, 32, dtype=BF16), normal(2, 4, 2, 16, dtype=BF16)
    key_cache, value_cache = caches(3, 16, 2, 32, 16)
    slots, cos_sin = torch.arange(4), torch.ones(9, 32)
    write = native.write_kv
    for wrong in (key[:, :1], key[..., :30]):
        with pytest.raises((TypeError, ValueError)):
            write(wrong.contiguous(), value, key_cache, value_cache, slots)
    with pytest.raises(ValueError, match="do not fit the caches"):
        write(key, key, key_cache, value_cache, slots)
    with pytest.raises(TypeError, match="caches must be contiguous"):
        write(key, value, key_cache.transpose(0, 1), value_cache, slots)
    with pytest.raises(TypeError, match="must be adjacent"):
        write(
            key.transpose(0, 1).contiguous().transpose(0, 1), value, key_cache, value_cache, slots
        )
    with pytest.raises(TypeError, match="slot_mapping"):
        write(key, value, key_cache, value_cache, slots.int())
    with pytest.raises(TypeError, match="bfloat16"):
        write(key.float(), value, key_cache, value_cache, slots)
    with pytest.raises(ValueError, match="got 8, 32, 16"):
        write(key, value, *caches(3, 8, 2, 32, 16), slots)
    rotate = native.rotary_embedding
    with pytest.raises(TypeError, match="positions"):
        rotate(key, key, slots.int(), cos_sin, interleaved=False)
    with pytest.raises(TypeError, match="cos_sin"):
        rotate(key, key, slots, cos_sin.double(), interleaved=False)
    with pytest.raises(ValueError, match="34 elements do not turn in 32"):
        rotate(key, key, slots, torch.ones(9, 34), interleaved=False)
    with pytest.raises(ValueError, match="2 blocks cannot be copied to 1"):
        native.copy_blocks([key_cache], slots[:2], slots[2:3])
    with pytest.raises(TypeError, match="src"):
        native.copy_blocks([key_cache], slots[:1].int(), slots[2:3])
    with pytest.raises(TypeError, match="contiguous"):
        native.copy_blocks([key_cache[:, :1]], slots[:1], slots[2:3])
    with pytest.raises(ValueError, match="got 8, 64, 16"):
        native.kv_cache_shape(3, 8, 2, 64)
    with pytest.raises(ValueError, match="got 16, 63, 16"):
        native.kv_cache_shape(3, 16, 2, 63)


def test_two_threads_at_once_run_what_each_of_them_has_set(
    native: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines of one process: neither runs before both have written their instructions."""
    weights = [torch.randn(32, 64).to(torch.bfloat16) for _ in range(2)]
    packed = [native.prepare_linear(weight) for weight in weights]
    x = torch.randn(3, 64).to(torch.bfloat16)
    expected = [native.linear(x, weight) for weight in packed]
    both, run = Barrier(2, timeout=60), Executable.run

    def run_together(self: Executable, step: bytes, threads: int) -> None:
        both.wait()
        run(self, step, threads)

    monkeypatch.setattr(Executable, "run", run_together)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda weight: native.linear(x, weight), packed))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
