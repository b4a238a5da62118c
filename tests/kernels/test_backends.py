"""Choosing a backend, what importing costs, and that nothing compiles after warm-up."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import streamserve_kernels
from streamserve_kernels import Kernels, load
from tests.kernels.conftest import paged_case

FUNCTIONS = [name for name in vars(Kernels) if not name.startswith("_") and name != "name"]
ROOT = Path(streamserve_kernels.__file__).parents[1]


def test_exported_names() -> None:
    assert sorted(streamserve_kernels.__all__) == [
        "ActivationKind",
        "BACKENDS",
        "GatedKind",
        "Kernels",
        "NotRecordableError",
        "PackedLinear",
        "PrefixGroups",
        "QUANTIZATIONS",
        "QuantLinear",
        "Quantization",
        "RecordedStep",
        "load",
    ]


def test_load_chooses_by_device() -> None:
    assert load("cpu").name == "cpu"
    assert load(torch.device("cpu"), "naive").name == "naive"
    assert load("cuda").name == "naive"


def test_load_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(ValueError, match="'fast' is not one of naive, cpu, native, triton"):
        load("cpu", "fast")
    with pytest.raises(ValueError, match="'cuda'"):
        load("cuda", "cpu")
    with pytest.raises(NotImplementedError, match="triton"):
        load("cuda", "triton")


def test_without_numba_it_warns_and_is_naive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match="numba is not installed"):
        assert load("cpu").name == "naive"


@pytest.mark.parametrize("backend", ["naive", "cpu", "native"])
def test_backends_have_the_contracts_signatures(backend: str) -> None:
    kernels = importlib.import_module(f"streamserve_kernels.{backend}")
    for name in FUNCTIONS:
        expected = list(inspect.signature(getattr(Kernels, name)).parameters.values())[1:]
        got = list(inspect.signature(getattr(kernels, name)).parameters.values())
        assert [(p.name, p.kind, p.default) for p in got] == [
            (p.name, p.kind, p.default) for p in expected
        ], name


def test_importing_the_package_imports_no_compiler() -> None:
    code = (
        "import sys, streamserve_kernels as k; k.load('cpu', 'naive');"
        "print([m for m in ('numba', 'triton', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "__init__.py").exists()


def use_everything(naive: Kernels, cpu: Kernels, dtype: torch.dtype) -> None:
    for requests in ([(40, 1), (3, 1)], [(70, 70), (20, 3)]):
        case = paged_case(
            naive,
            seed=1,
            dtype=dtype,
            heads=(4, 2),
            head_size=64,
            block_size=16,
            requests=requests,
        )
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


def test_one_thread_without_libgomp(naive: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamserve_kernels.cpu import attention
    from streamserve_kernels.pool import Pool

    lonely = Pool(None)
    assert lonely.threads() == 1
    case = paged_case(
        naive,
        seed=2,
        dtype=torch.float32,
        heads=(4, 2),
        head_size=64,
        block_size=16,
        requests=[(100, 1), (30, 1)],
    )
    expected = naive.paged_attention(*case.args, scale=0.1)
    monkeypatch.setattr(attention, "pool", lambda: lonely)
    attention.decode_kernel.cache_clear()
    try:
        out = attention.paged_attention(*case.args, scale=0.1)
    finally:
        attention.decode_kernel.cache_clear()
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
