"""Unquantised products on the GPU: every candidate kernel against float64, and the tuning."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from streamserve_kernels.interface import PackedLinear
from streamserve_kernels.triton import tuning
from streamserve_kernels.triton.linear import FEW_ROWS, linear, prepare_linear, prepare_quantised
from streamserve_kernels.triton.runtime import INTERPRETED, compilations
from streamserve_kernels.triton.split import SPLIT_ROWS, num_splits
from streamserve_kernels.triton.tuning import LIBRARY, Config, bucket, tune
from tests.kernels.conftest import amid_nan, dtype_on
from tests.kernels.pretended_gpu import HAS_GPU, IS_PRETENDED, capture

# Odd sizes, less than a tile, several steps of the loop.
SMALL = [(5, 24), (37, 100), (130, 1160), (64, 2048)]
LLAMA = [(6144, 4096), (4096, 4096), (4096, 14336)] if HAS_GPU else [(96, 512), (64, 1792)]
# Relative to |x|·|w|: the sum, and the rounding of the result.
SUM = 1e-5


def check(y, x, weight, bias, config=None):
    """Within the error of float32 sums in any order, and one rounding of the result.

    cuBLAS may add partial sums in the dtype of the result.
    """
    x, weight = x.double(), weight.double()
    expected = x @ weight.T + (0.0 if bias is None else bias.double())
    magnitude = x.abs() @ weight.abs().T + (0.0 if bias is None else bias.double().abs())
    rounding = torch.finfo(y.dtype).eps * (magnitude if config == LIBRARY else expected.abs())
    error = (y.double() - expected).abs()
    assert not error.isnan().any()
    assert (error <= SUM * magnitude + rounding + 1e-6).all(), error.max()


def test_every_candidate_is_the_product(device, dtype):
    for shape in SMALL if device.type == "cpu" else LLAMA:
        weight = amid_nan(torch.randn(shape, device=device).to(dtype))
        packed = prepare_linear(weight)
        for rows in (1, 2, 5, FEW_ROWS, 24, 64, SPLIT_ROWS - 1):
            x = amid_nan(torch.randn(rows, shape[1], device=device).to(dtype))
            for config in packed.candidates(bucket(rows)):
                check(packed.run(x, config), x, weight, None, config)


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
def test_a_product_is_written_where_it_is_wanted(device, dtype, kind):
    weight, bias = torch.randn(64, 96, device=device), torch.randn(64, device=device)
    for given in (None, bias.to(dtype)):
        args = weight.to(dtype), given
        packed = prepare_linear(*args) if kind is None else prepare_quantised(*args, kind)
        for rows in (1, 5, 64, SPLIT_ROWS + 1):
            x = torch.randn(rows, 96, device=device).to(dtype)
            around = torch.full((rows + 2, 64), float("nan"), dtype=dtype, device=device)
            packed.write(x, around[1:-1])
            assert torch.equal(around[1:-1], packed(x))
            assert around.isnan().sum() == 2 * 64


@pytest.mark.parametrize("elements", [2**25, 10 * 64])
def test_and_by_the_library_as_a_whole_or_piece_by_piece(device, monkeypatch, elements):
    monkeypatch.setattr(sys.modules[linear.__module__], "_SCRATCH_ELEMENTS", elements)
    weight, bias, x = (torch.randn(*size, device=device) for size in ((24, 64), (24,), (3, 64)))
    packed = prepare_quantised(weight, bias, "int8")
    around = torch.full((5, 24), float("nan"), device=device)
    packed.run(x, LIBRARY, around[1:-1])
    assert torch.equal(around[1:-1], packed.run(x, LIBRARY))
    assert around.isnan().sum() == 2 * 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_row_of_odd_sizes_with_a_bias(device, dtype):
    for shape in SMALL:
        weight, bias, x = (
            amid_nan(torch.randn(*size, device=device).to(dtype))
            for size in (shape, shape[:1], (1, shape[1]))
        )
        check(prepare_linear(weight, bias)(x), x, weight, bias)


@pytest.mark.parametrize("rows", [2, 7, 16])
@pytest.mark.parametrize("shape", SMALL)
def test_matrix_units_take_few_rows(device, dtype, rows, shape):
    """Float32 is not a candidate there, but under the interpreter it shows every index right."""
    weight, bias, x = (
        amid_nan(torch.randn(*size, device=device).to(dtype))
        for size in (shape, shape[:1], (rows, shape[1]))
    )
    check(prepare_linear(weight, bias).run(x, Config("skinny", 16, 16, 64, 4, 2)), x, weight, bias)


@pytest.mark.parametrize("splits", [1, 3])
def test_inputs_are_split_between_programs(device, splits):
    """More rows than a tile has, fewer steps than splits, and counters that are zero again."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    config = Config("split", 32, 128, 64, 4, 2, splits=splits)
    for shape in SMALL:
        weight, bias = (torch.randn(*size, device=device).to(dtype) for size in (shape, shape[:1]))
        for packed, rows in ((prepare_linear(weight, bias), 40), (prepare_linear(weight), 3)):
            x = torch.randn(rows, shape[1], device=device).to(dtype)
            y = packed.run(x, config)
            check(y, x, weight, packed.bias)
            assert packed.run(x, config).equal(y)
            assert packed.run(x[2:3], config).equal(y[2:3])  # whoever is beside it
            assert not packed.counters.any()


def test_splits_fill_the_processors():
    assert num_splits(tiles=32, steps=64, at_once=132, cost=0.03) == 4
    assert num_splits(tiles=32, steps=64, at_once=264, cost=0.03) == 8
    assert num_splits(tiles=32, steps=12, at_once=264, cost=0.03) == 3  # too few steps for more
    assert num_splits(tiles=32, steps=64, at_once=264, cost=1.0) == 3
    assert num_splits(tiles=224, steps=64, at_once=264, cost=0.03) == 1
    assert num_splits(tiles=1, steps=1, at_once=132, cost=0.0) == 1


def test_more_tiles_than_counters_are_refused(device):
    packed = prepare_linear(torch.randn(8, 300, device=device))
    x = torch.randn(200, 300, device=device)
    for block_m, block_n in ((32, 128), (64, 64)):
        with pytest.raises(ValueError, match="no counters for 200 rows"):
            packed.run(x, Config("split", block_m, block_n, 64, splits=2))


def test_bfloat16_under_the_interpreter():
    if not INTERPRETED:
        pytest.skip("a kernel on a device is tried with it anyway")
    weight, x = torch.randn(40, 300).bfloat16(), torch.randn(3, 300).bfloat16()
    packed = prepare_linear(weight)
    check(packed.run(x[:1], packed.candidates(1)[0]), x[:1], weight, None)
    check(packed.run(x, Config("skinny", 16, 32, 128, 4, 2)), x, weight, None)
    check(packed.run(x, Config("split", 16, 128, 64, 4, 2, splits=2)), x, weight, None)


def test_the_contract(device):
    weight = torch.randn(40, 64, device=device)
    bias = torch.randn(40, device=device)
    packed = prepare_linear(weight, bias)
    assert isinstance(packed, PackedLinear)
    assert (packed.out_features, packed.in_features, packed.dtype) == (40, 64, torch.float32)
    assert packed.nbytes == 4 * (40 * 64 + 40)
    assert packed.unpack().data_ptr() == weight.data_ptr()
    fused = torch.randn(24, 200, device=device)
    view = fused[:, 3:67]  # at odd addresses
    check(linear(view, packed), view, weight, bias)
    check(linear(view[:1], packed), view[:1], weight, bias)
    assert linear(view.reshape(2, 3, 4, 64), packed).shape == (2, 3, 4, 40)
    assert linear(view[:0], packed).shape == (0, 40)
    with pytest.raises(ValueError, match="expected rows of 64, got 65"):
        packed.run(fused[:1, :65], packed.candidates(1)[0])


def test_a_row_that_is_no_number_stays_alone(device):
    packed = prepare_linear(torch.randn(40, 128, device=device).to(dtype_on(device)))
    x = torch.randn(5, 128, device=device).to(packed.dtype)
    expected = packed(x)
    x[2, 100] = torch.nan
    result = packed(x)
    assert result[2].isnan().all()
    assert result[[0, 1, 3, 4]].equal(expected[[0, 1, 3, 4]])


def favour(best):
    """A measurement that finds one config the fastest, and remembers what it was asked."""
    asked = []

    def measure(layers, x, config):
        asked.append((len(layers), tuple(x.shape), config))
        return 1.0 if config == best else 2.0

    return measure, asked


def test_what_is_measured_is_chosen_and_kept(device, tmp_path):
    dtype = dtype_on(device)
    layers = [prepare_linear(torch.randn(40, 64, device=device).to(dtype)) for _ in range(3)]
    layers.append(prepare_linear(torch.randn(48, 64, device=device).to(dtype)))
    best = layers[0].candidates(1)[1]
    measure, asked = favour(best)
    chosen = tune(layers, [1], directory=tmp_path, measure=measure)
    assert list(chosen.values()) == [best, best]
    assert all(layer.choices == {1: best} for layer in layers)
    assert {(count, shape) for count, shape, _ in asked} == {(3, (1, 64)), (1, (1, 64))}
    assert len(asked) == 2 * len(layers[0].candidates(1))
    # The next start reads it.
    again = prepare_linear(layers[0].unpack())
    measure, asked = favour(LIBRARY)
    assert list(tune([again], [1], directory=tmp_path, measure=measure).values()) == [best]
    assert again.choices == {1: best}
    assert asked == []
    # Nothing compiles afterwards.
    before = compilations()
    again(torch.ones(1, 64, device=device, dtype=dtype))
    assert compilations() == before


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"a": 3}', '{"a": [1, 2, 3, 4, 5, 6, 7, 8, 9]}', "\x00\x80"]
)
def test_a_broken_file_is_ignored(device, tmp_path, content):
    packed = prepare_linear(torch.randn(8, 32, device=device))
    measure, asked = favour(packed.candidates(1)[1])
    tune([packed], [1], directory=tmp_path, measure=measure)
    (path,) = tmp_path.glob("*.json")
    path.write_bytes(content.encode("latin-1"))
    asked.clear()
    with pytest.warns(RuntimeWarning, match="is ignored"):
        tune([packed], [1], directory=tmp_path, measure=measure)
    assert asked
    assert json.loads(path.read_text()).keys() == {packed.tuning_key(1)}


def test_a_directory_that_cannot_be_written_costs_a_warning(device, tmp_path):
    packed = prepare_linear(torch.randn(8, 32, device=device))
    best = packed.candidates(1)[1]
    path = tmp_path / "file"
    path.write_text("")
    with (
        pytest.warns(RuntimeWarning, match="was not written"),
        pytest.warns(RuntimeWarning, match="is ignored"),
    ):
        tune([packed], [1], directory=path, measure=favour(best)[0])
    assert packed.choices == {1: best}


def test_each_version_measures_for_itself_and_no_file_is_written_in_part(
    device, tmp_path, monkeypatch
):
    packed, other = (prepare_linear(torch.randn(n, 32, device=device)) for n in (8, 16))
    best = packed.candidates(1)[1]
    tune([packed], [1], directory=tmp_path, measure=favour(best)[0])
    for module, version in (
        (tuning.triton, "__version__"),
        (tuning.torch, "__version__"),
        (tuning, "_CANDIDATES"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, version, "0.0")
            measure, asked = favour(best)
            tune([packed], [1], directory=tmp_path, measure=measure)
            assert asked
    assert len(list(tmp_path.glob("*.json"))) == 4
    names = set(tmp_path.iterdir())
    # What was known stays beside what is found, and a full disk leaves it as it was.
    path = tuning._path(tmp_path, packed.device)
    before = path.read_text()

    def half(content, file, **options):
        file.write("{")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(tuning.json, "dump", half)
        with pytest.warns(RuntimeWarning, match="was not written"):
            tune([other], [1], directory=tmp_path, measure=favour(best)[0])
    assert path.read_text() == before
    assert set(tmp_path.iterdir()) == names
    tune([other], [1], directory=tmp_path, measure=favour(best)[0])
    assert json.loads(path.read_text()).keys() == {p.tuning_key(1) for p in (packed, other)}


# Tunes a layer of so many outputs; stops, until it is sent a line, before it writes, then within a
# function of a module.
TUNE = """
import sys
from pathlib import Path
import torch
from streamserve_kernels.triton import tuning
from streamserve_kernels.triton.linear import prepare_linear

def stop_at(module, name):
    function = getattr(module, name)
    def stopped(*args, **options):
        print(name, flush=True)
        sys.stdin.readline()
        return function(*args, **options)
    setattr(module, name, stopped)

directory, outputs, module, name = sys.argv[1:]
stop_at(tuning, "_write")
stop_at(getattr(tuning, module), name)
layer = prepare_linear(torch.ones(int(outputs), 32))
measure = lambda layers, x, config: float(config != tuning.LIBRARY)
tuning.tune([layer], [1], directory=Path(directory), measure=measure)
"""


def test_two_processes_that_tune_at_once_keep_what_either_found(tmp_path):
    """One comes to write while the other does; both began when nothing was known."""
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", TUNE, str(tmp_path), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for args in (("8", "json", "dump"), ("16", "fcntl", "flock"))
    )

    def go_on(process: subprocess.Popen) -> None:
        process.stdin.write("\n")
        process.stdin.flush()

    with first, second:
        assert (first.stdout.readline(), second.stdout.readline()) == ("_write\n", "_write\n")
        go_on(first)
        assert first.stdout.readline() == "dump\n"
        go_on(second)
        assert second.stdout.readline() == "flock\n"
        go_on(second)
        go_on(first)
        assert (first.wait(60), second.wait(60)) == (0, 0)
    (path,) = tmp_path.glob("*.json")
    layers = [prepare_linear(torch.ones(outputs, 32)) for outputs in (8, 16)]
    assert json.loads(path.read_text()).keys() == {layer.tuning_key(1) for layer in layers}


def test_all_that_was_chosen_has_run(device, tmp_path, monkeypatch):
    """What was measured, read from the file, or is the first for lack of time: on no zeros."""
    packed = prepare_linear(torch.randn(8, 32, device=device))
    best, ran = packed.candidates(1)[1], []
    run = type(packed).run

    def watched(self, x, config):
        ran.append((tuple(x.shape), config, bool(x.eq(0).any())))
        return run(self, x, config)

    monkeypatch.setattr(type(packed), "run", watched)
    tune([packed], [1], directory=tmp_path, measure=favour(best)[0])
    tune([packed], [1], directory=tmp_path, measure=favour(LIBRARY)[0])
    tune([packed], [4], directory=tmp_path, seconds=0.0, measure=favour(best)[0])
    assert ran == [
        ((1, 32), best, False),
        ((1, 32), best, False),
        ((4, 32), packed.candidates(4)[0], False),
    ]


def test_only_a_device_that_can_overlap_kernels_is_given_such(monkeypatch):
    """And there not the same ones without, which look no worse where they are measured alone."""
    plain, other = Config("gemv"), Config("gemv", splits=2)
    candidates, device = (plain, other, plain._replace(overlap=True)), torch.device("cpu")
    for can, expected in ((False, candidates[:2]), (True, candidates[1:])):
        monkeypatch.setattr(tuning, "overlaps", lambda device, can=can: can)
        tuning.usable.cache_clear()
        assert tuning.usable(candidates, device) == expected
    tuning.usable.cache_clear()


def test_a_layer_whose_kernels_are_all_wrong_is_the_librarys(device, tmp_path):
    weight = torch.randn(8, 64, device=device)
    packed = prepare_quantised(weight, None, "int8")
    assert LIBRARY not in packed.candidates(1)
    asked = []

    def measure(layers, x, config):
        asked.append(config)
        return float("inf")

    for _ in range(2):  # the next start reads it
        packed.choices.clear()
        tune([packed], [1], directory=tmp_path, measure=measure)
        assert packed.choices == {1: LIBRARY}
    assert asked == list(packed.candidates(1))


def test_a_stored_config_that_is_no_candidate_is_measured_anew(device, tmp_path):
    packed = prepare_linear(torch.randn(8, 32, device=device))
    measure, _ = favour(packed.candidates(1)[1])
    tune([packed], [1], directory=tmp_path, measure=measure)
    (path,) = tmp_path.glob("*.json")
    path.write_text(json.dumps({packed.tuning_key(1): Config("gemv", 1, 3)}))
    tune([packed], [1], directory=tmp_path, measure=measure)
    assert packed.choices == {1: packed.candidates(1)[1]}


def test_time_is_bounded(device, tmp_path):
    packed = prepare_linear(torch.randn(8, 32, device=device))
    measure, asked = favour(packed.candidates(1)[1])
    tune([packed], [1, 3], directory=tmp_path, seconds=0.0, measure=measure)
    assert packed.choices == {1: packed.candidates(1)[0], 4: packed.candidates(4)[0]}
    assert asked == []
    assert list(tmp_path.iterdir()) == []


def test_what_was_measured_in_part_is_not_chosen(device, tmp_path, monkeypatch):
    """Time is up between two candidates."""
    packed, now = prepare_linear(torch.randn(8, 32, device=device)), [0.0]
    monkeypatch.setattr(tuning.time, "monotonic", lambda: now[0])

    def measure(layers, x, config):
        now[0] += 1.0
        return -now[0]  # each is better than the one before

    tune([packed], [1], directory=tmp_path, seconds=1.5, measure=measure)
    assert packed.choices == {1: packed.candidates(1)[0]}
    assert now == [2.0]
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_nothing_is_measured(tmp_path):
    packed = prepare_linear(torch.randn(8, 32))
    if not INTERPRETED:
        pytest.skip("a CPU tensor runs under the interpreter only")
    tune([packed, object()], [1], directory=tmp_path)
    assert packed.choices == {1: packed.candidates(1)[0]}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(IS_PRETENDED, reason="there is nothing to measure")
def test_the_gpu_measures(tmp_path):
    layers = [
        prepare_linear(torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16))
        for _ in range(2)
    ]
    chosen = tune(layers, [1, 4], directory=tmp_path)
    assert len(chosen) == 2
    stored = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert {key: tuning.Config(*value) for key, value in stored.items()} == chosen


def test_roundings_agree_and_a_wrong_tile_does_not():
    expected = torch.linspace(-1.0, 1.0, 4096).view(4, 1024)
    assert tuning.agree(expected.bfloat16(), expected)
    assert tuning.agree(expected * 0, expected * 0)
    wrong = expected.clone()
    wrong[3, -16:] = 0.0  # a tile that was not stored
    for found in (wrong, expected * torch.nan, expected + 0.02):
        assert not tuning.agree(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(IS_PRETENDED, reason="there is nothing to measure")
def test_a_kernel_that_is_wrong_on_this_card_is_not_chosen(tmp_path, monkeypatch):
    layer = prepare_linear(torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16))
    run = type(layer).run

    def wrong(self, x, config):
        return run(self, x, config) * (1.0 if config == LIBRARY else 1.1)

    monkeypatch.setattr(type(layer), "run", wrong)
    with pytest.warns(RuntimeWarning, match="is wrong on this card"):
        chosen = tune([layer], [1], directory=tmp_path)
    assert set(chosen.values()) == {LIBRARY}


@pytest.mark.gpu
def test_products_that_overlap_wait_for_each_other():
    """Each starts before the one that makes its input has ended."""
    size = 2048
    layers = [
        prepare_linear(torch.randn(size, size, device="cuda", dtype=torch.bfloat16) / size**0.5)
        for _ in range(4)
    ]

    def chain(config: Config) -> torch.Tensor:
        y = torch.linspace(-1, 1, config.block_m * size, device="cuda").bfloat16().view(-1, size)
        for step in range(40):
            y = layers[step % 4].run(y, config)
        return y

    candidates = (*layers[0].candidates(1), *layers[0].candidates(64))
    for config in (config for config in candidates if config.overlap):
        expected = chain(config._replace(overlap=False))
        assert chain(config).equal(expected)
        replay, y = capture(lambda config=config: chain(config))
        for _ in range(3):
            replay()
            assert y.equal(expected)
            y.zero_()


def test_products_are_captured_into_a_graph(device, dtype):
    shape = (40, 96) if device.type == "cpu" else (512, 1024)
    packed = prepare_linear(torch.randn(shape, device=device).to(dtype))
    x = torch.zeros(1, shape[1], device=device, dtype=dtype)
    packed(x)
    replay, y = capture(lambda: packed(x))
    x.copy_(torch.randn_like(x))
    replay()
    check(y, x, packed.unpack(), None)
