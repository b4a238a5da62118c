"""Choosing a backend, what importing costs, and that nothing compiles after warm-up."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pwd
import threading
from pathlib import Path

import pytest
import torch

import streamserve_kernels
from streamserve_kernels import Kernels, load
from streamserve_kernels.pool import Pool, find_libgomp
from tests.interpreter import ROOT, run_python
from tests.kernels.conftest import paged_case

FUNCTIONS = [n for n, member in vars(Kernels).items() if n[0] != "_" and callable(member)]


def test_exported_names() -> None:
    assert sorted(streamserve_kernels.__all__) == [
        "ActivationKind",
        "BACKENDS",
        "ExpertKind",
        "GatedKind",
        "HeadsLinear",
        "Kernels",
        "NotRecordableError",
        "PackedLinear",
        "PrefixGroups",
        "QUANTIZATIONS",
        "QuantLinear",
        "Quantization",
        "RecordedStep",
        "SamplingKernels",
        "WritingLinear",
        "bfloat16_pays",
        "load",
        "load_row_draws",
        "load_sampling",
        "row_draws_bytes",
    ]


def test_load_chooses_by_device() -> None:
    assert load("cpu").name == "cpu"
    assert load(torch.device("cpu"), "naive").name == "naive"
    assert load("mps").name == "naive"


def test_load_chooses_triton_for_a_gpu() -> None:
    pytest.importorskip("triton")
    assert load("cuda").name == "triton"
    assert load("cuda", "naive").name == "naive"


def test_on_rocm_it_is_naive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert load("cuda").name == "naive"


def test_load_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(ValueError, match="'fast' is not one of naive, cpu, native, triton"):
        load("cpu", "fast")
    with pytest.raises(ValueError, match="'cuda'"):
        load("cuda", "cpu")
    with pytest.raises(ValueError, match="'mps'"):
        load("mps", "triton")


def test_without_triton_a_gpu_warns_and_is_naive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match="triton is not installed"):
        assert load("cuda").name == "naive"


def test_triton_on_a_cpu_is_for_the_interpreter(said_in_turn: list[str]) -> None:
    pytest.importorskip("triton")
    assert "cannot serve device 'cpu'" in said_in_turn[2]
    assert "TRITON_INTERPRET=1" in said_in_turn[2]


@pytest.mark.parametrize("backend", ["cpu", "native"])
def test_cpu_backends_refuse_a_cache_of_eight_bits(
    backend: str, request: pytest.FixtureRequest
) -> None:
    kernels = request.getfixturevalue(backend)
    heads = torch.ones(1, 1, 64, dtype=torch.bfloat16)
    zero = torch.zeros(1, dtype=torch.int64)
    shape = kernels.kv_cache_shape(2, 16, 1, 64)
    caches = [torch.zeros(shape).to(torch.float8_e4m3fn) for _ in range(2)]
    table, ends = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"'{backend}' holds no KV cache of dtype float8_e4m3fn"):
        kernels.write_kv(heads, heads, *caches, zero)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        kernels.rotary_write_kv(
            heads, heads, heads, zero, torch.ones(1, 64), *caches, zero, interleaved=False
        )
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        kernels.paged_attention(heads, *caches, table, ends[1:], ends, scale=1.0)


def test_without_numba_it_warns_and_is_naive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match="numba is not installed"):
        assert load("cpu").name == "naive"


@pytest.mark.parametrize("backend", ["naive", "cpu", "native", "triton"])
def test_backends_have_the_contracts_signatures(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    kernels = importlib.import_module(f"streamserve_kernels.{backend}")
    for name in FUNCTIONS:
        expected = list(inspect.signature(getattr(Kernels, name)).parameters.values())[1:]
        got = list(inspect.signature(getattr(kernels, name)).parameters.values())
        assert [(p.name, p.kind, p.default) for p in got] == [
            (p.name, p.kind, p.default) for p in expected
        ], name


IN_TURN = """
import sys, warnings
import streamserve_kernels as k
k.load("cpu", "naive")
print([m for m in ("numba", "triton", "transformers") if m in sys.modules])
import torch
warnings.simplefilter("ignore")
for dtype in (torch.float32, torch.bfloat16):
    k.load("cpu", dtype=dtype)
print([m for m in ("triton", "streamserve_kernels.triton") if m in sys.modules])
try:
    print(k.load("cpu", "triton").name)
except (ImportError, ValueError) as error:
    print(error)
"""


@pytest.fixture(scope="module")
def said_in_turn() -> list[str]:
    """By a process without the interpreter that loads one backend after the other."""
    return run_python("-c", IN_TURN, TRITON_INTERPRET="0").stdout.splitlines()


def test_importing_the_package_imports_no_compiler(said_in_turn: list[str]) -> None:
    assert said_in_turn[0] == "[]"


def test_a_cpu_never_imports_triton(said_in_turn: list[str]) -> None:
    assert said_in_turn[1] == "[]"


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def use_everything(naive: Kernels, cpu: Kernels, dtype: torch.dtype) -> None:
    for requests in ([(40, 1), (3, 1)], [(70, 70), (20, 3)]):
        case = paged_case(naive, seed=1, dtype=dtype, heads=(4, 2), head_size=64, requests=requests)
        for options in ({}, {"window": 9}, {"soft_cap": 2.0}, {"sinks": torch.zeros(4)}):
            cpu.paged_attention(*case.args, scale=0.1, **options)
    x = torch.ones(3, 64, dtype=dtype)
    weight = torch.ones(64, dtype=dtype)
    for residual in (None, x):
        cpu.rms_norm(x, weight, 1e-6, residual)
        cpu.layer_norm(x, weight, weight, 1e-6, residual)
    packed = cpu.prepare_linear(torch.ones(128, 64, dtype=dtype))
    for rows in (1, 2, 3, 5, 8, 30):
        for kind in ("silu", "gelu", "gelu_tanh", "relu"):
            cpu.gated_activation(cpu.linear(x[:1].expand(rows, 64), packed), kind)
    heads = x.view(3, 1, 64)
    cache = torch.zeros(2, 1, 16, 64, dtype=dtype)
    slots, positions, cos_sin = torch.arange(3), torch.arange(3), torch.ones(3, 64)
    for interleaved in (False, True):
        cpu.rotary_write_kv(
            heads.clone(),
            heads.clone(),
            heads,
            positions,
            cos_sin,
            cache,
            cache,
            slots,
            interleaved=interleaved,
        )
    cpu.copy_blocks([cache], torch.tensor([0]), torch.tensor([1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_nothing_compiles_after_warm_up(naive: Kernels, cpu: Kernels, dtype: torch.dtype) -> None:
    cpu.warm_up(dtype, 64)
    before = cpu.compilations()
    assert before > 0
    use_everything(naive, cpu, dtype)
    assert cpu.compilations() == before


def test_where_nothing_may_be_written_kernels_are_compiled_all_the_same_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caching = pytest.importorskip("numba.core.caching")
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    from streamserve_kernels.cpu import jit

    def body(_args: int) -> None:
        pass

    jit._say_uncached.cache_clear()
    with pytest.warns(UserWarning, match="NUMBA_CACHE_DIR") as said:
        compiled = [jit.compile_body(body) for _ in range(2)]
    assert all(one.address for one in compiled)
    assert len(said) == 1


UNWRITABLE = """
import warnings
from streamserve_kernels import load
with warnings.catch_warnings(record=True) as said:
    load("cpu", "triton")
    print(load("cpu", "triton").name)
from triton.runtime.cache import FileCacheManager
print(FileCacheManager("kernel").put("kept", "file", binary=False))
print([str(warning.message) for warning in said])
"""


def test_triton_can_compile_where_its_own_folder_may_not_be_written_to(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache"  # not even for root
    done = run_python(
        "-c",
        UNWRITABLE,
        TRITON_INTERPRET="1",
        TRITON_CACHE_DIR=str(folder),
        TMPDIR=str(tmp_path),
    )
    name, kept, said = done.stdout.splitlines()
    assert name == "triton"
    assert Path(kept).is_relative_to(tmp_path)
    assert said.count(f"{folder} may not be written to") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing is left behind


def test_what_was_tuned_has_a_folder_though_the_user_has_no_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from streamserve_kernels.triton.tuning import default_directory

    def unknown(_user: int) -> None:
        raise KeyError

    monkeypatch.setenv("HOME", "/home/someone")
    assert default_directory() == Path("/home/someone/.cache/streamserve")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert default_directory() == Path("/.cache/streamserve")


def test_kernels_run_on_another_thread(naive: Kernels, cpu: Kernels) -> None:
    """The device thread is not the one that loaded the backend."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            use_everything(naive, cpu, torch.bfloat16)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []


def test_libgomp_is_found_by_its_name_whatever_its_path() -> None:
    line = b"7f00-7f01 r-xp 00001000 fe:00 123"
    torch_directory = "/my models/libgomp/caf\udce9/torch"
    ours = f"{torch_directory}/lib/libgomp.so.1"
    others = [b"/usr/lib/libgomp.so.1", b"/my models/libgomp/other.so", b"[heap]"]
    maps = b"\n".join(
        [line, *(line + b"      " + path for path in (*others, os.fsencode(ours), others[0])), b""]
    )
    assert find_libgomp(maps, torch_directory) == ours
    assert find_libgomp(maps, "/elsewhere/torch") in {ours, "/usr/lib/libgomp.so.1"}
    assert find_libgomp(line + b" " + others[1], torch_directory) is None


def test_one_thread_without_libgomp(naive: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamserve_kernels.cpu import attention

    lonely = Pool(None)
    assert lonely.threads() == 1
    case = paged_case(
        naive, seed=2, dtype=torch.float32, heads=(4, 2), head_size=64, requests=[(100, 1), (30, 1)]
    )
    expected = naive.paged_attention(*case.args, scale=0.1)
    monkeypatch.setattr(attention, "pool", lambda: lonely)
    attention.decode_kernel.cache_clear()
    try:
        out = attention.paged_attention(*case.args, scale=0.1)
    finally:
        attention.decode_kernel.cache_clear()
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
