from __future__ import annotations

import pytest
import torch

from streamserve.errors import ConfigError
from streamserve.runner.devices import (
    VisibleGpu,
    VisibleGpus,
    choose_device,
    device_of_rank,
    visible_gpus,
)

OLD = VisibleGpu("Tesla V100", (7, 0))
H100 = VisibleGpu("NVIDIA H100", (9, 0))
NONE = VisibleGpus(why_none="torch 2.13.0 was built without CUDA")


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("auto", (), "cpu"),
        ("auto", (OLD,), "cpu"),
        ("auto", (H100, H100), "cuda:0"),
        ("auto", (OLD, H100), "cuda:1"),
        ("cpu", (H100,), "cpu"),
        ("cuda", (H100,), "cuda:0"),
        ("cuda:1", (OLD, H100), "cuda:1"),
    ],
)
def test_the_device_that_serves(name, gpus, expected):
    visible = VisibleGpus(gpus) if gpus else NONE
    assert choose_device(name, visible) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "visible", "message"),
    [
        ("cuda", NONE, "--device cuda is not there: torch 2.13.0 was built without CUDA"),
        ("cuda:1", VisibleGpus((H100,)), r"cuda:1 is not there: torch .* sees cuda:0: NVIDIA H100"),
        ("cuda:0", VisibleGpus((OLD,)), r"must have compute capability 8\.0 or more: .* 7\.0"),
        ("tpu", NONE, "must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("cuda:", NONE, "got 'cuda:'"),
        ("cuda:-1", NONE, "got 'cuda:-1'"),
        ("cpu:0", NONE, "got 'cpu:0'"),
    ],
)
def test_a_device_that_cannot_serve_is_refused(name, visible, message):
    with pytest.raises(ConfigError, match=message):
        choose_device(name, visible)


def test_what_torch_sees_here():
    visible = visible_gpus()
    assert len(visible.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert torch.__version__ in str(visible)


def test_ranks_have_the_first_gpu_and_those_behind_it():
    visible = VisibleGpus((OLD, H100, H100))
    assert device_of_rank(torch.device("cuda", 1), 1, 2, visible) == torch.device("cuda", 2)
    for start, size in ((1, 3), (0, 2)):
        wanted = f"--tensor-parallel-size {size} .* from cuda:{start}"
        with pytest.raises(ConfigError, match=wanted):
            device_of_rank(torch.device("cuda", start), 0, size, visible)
