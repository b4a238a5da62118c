"""What the engine is told of a step that failed."""

import weakref
from contextlib import contextmanager

import pytest
import torch

from streamserve.errors import DeviceDeadError, OutOfMemoryError
from streamserve.runner.step_errors import step_error

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has …"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_no_memory(error):
    found = step_error(error, CPU)
    assert isinstance(found, OutOfMemoryError)
    assert found.__cause__ is error
    assert "\n" not in str(found)


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_device_is_lost_if_nothing_ends_on_it_any_more(is_lost, monkeypatch):
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")

    def synchronize(device):
        assert device == CUDA
        if is_lost:
            raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    found = step_error(error, CUDA)
    if is_lost:
        assert isinstance(found, DeviceDeadError)
        assert str(found).endswith("an illegal memory access was encountered")
    else:
        assert found is error


def test_other_errors_are_themselves():
    error = ValueError("a plan that cannot be right")
    assert step_error(error, CUDA) is error


def test_an_error_keeps_nothing_of_the_step():
    held = []

    def compute():
        states = torch.empty(4)
        held.append(weakref.ref(states))
        raise ValueError("a plan that cannot be right")

    @contextmanager
    def copied_beside():
        copies = torch.empty(4)
        held.append(weakref.ref(copies))
        try:
            yield
        finally:
            raise RuntimeError("the device is lost")

    def compute_beside():
        with copied_beside():
            compute()

    for fails in (compute, compute_beside):
        held.clear()
        try:
            fails()
        except (ValueError, RuntimeError) as error:
            kept = step_error(error, CPU)
        assert kept.__traceback__.tb_next is not None
        assert held
        assert not any(tensor() is not None for tensor in held), fails
