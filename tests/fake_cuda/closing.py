"""`python -m tests.fake_cuda.closing`: what an `LLM` leaves of a device when it is closed, as JSON.

Somebody holds the object on, or the error that it died of; or it could not be built.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.fake_cuda import runtime
from tests.fake_cuda.device import FakeDevice
from tests.fake_cuda.tensors import num_pinned_bytes

OPTIONS: dict[str, Any] = {
    "max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 32,
    "kv_cache_memory": "8MiB", "swap_space": "8MiB", "enable_lora": True, "max_loras": 2,
}  # fmt: skip
FAILURES = (1, 4)  # tenths of what a device is asked for while an engine is built


def held(device: FakeDevice) -> dict[str, Any]:
    """What nobody has let go of."""
    return {
        "device bytes": device.live_bytes,
        "pinned bytes": num_pinned_bytes(),
        "graphs": len(device.graphs),
        "work spaces": len(device.work_spaces),
        "threads": sorted(t.name for t in threading.enumerate() if "streamserve" in t.name),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        os.environ["HOME"] = home  # nothing that was measured before
        count()


def count() -> None:
    """Opens and closes, and prints what is left."""
    device = runtime.install()
    from streamserve import LLM, SamplingParams
    from streamserve.errors import StreamServeError
    from streamserve.runner.cuda.memory import open_runners

    def opened() -> LLM:
        return LLM(device=f"cuda:{device.index}", **OPTIONS)

    # Its edits go to the device beside the step's inputs.
    params = SamplingParams(logit_bias={5: 4.0}, frequency_penalty=0.3, logprobs=3)

    def answer(llm: LLM) -> None:
        llm.generate("Hello", params, use_tqdm=False)

    gc.disable()  # nothing waits for it
    with counted(device) as asked:
        first = opened()
    answer(first)
    reports = {"open": held(device)}
    llm = opened()
    first.close()  # which takes nothing from the one that is left
    answer(llm)
    for runner in open_runners:
        runner.on_device_thread(lambda: None)  # it has come past the last step
    with lost(device, "edit_kernel"):  # while it samples
        try:
            answer(llm)
        except StreamServeError as error:
            kept = error
        llm.close()
    reports["one closed, one dead"] = {"error": type(kept).__name__, **held(device)}

    for tenths in FAILURES:
        said = None
        with failing(device, len(asked) * tenths // 10):
            try:
                opened().close()
            except StreamServeError as error:
                said = type(error).__name__
        reports[f"failed at {tenths}"] = {"error": said, **held(device)}
    print(json.dumps({**reports, "findings": dict(device.findings)}))


@contextmanager
def counted(device: FakeDevice) -> Iterator[list[str]]:
    """The names of all that the device is asked for."""
    names: list[str] = []
    device.fail_when = names.append  # type: ignore[assignment]
    yield names
    device.fail_when = lambda name: None


@contextmanager
def failing(device: FakeDevice, number: int) -> Iterator[None]:
    """There is no memory for this one of the things that the device is asked for."""
    left = number

    def fail(name: str) -> BaseException | None:
        nonlocal left
        left -= 1
        return torch.OutOfMemoryError("CUDA out of memory") if left == 0 else None

    device.fail_when = fail
    yield
    device.fail_when = lambda name: None


@contextmanager
def lost(device: FakeDevice, name: str) -> Iterator[None]:
    """From the first ``name`` on nothing can be asked of the device any more."""
    is_lost = False

    def error(asked: str) -> torch.AcceleratorError | None:
        nonlocal is_lost
        if asked == name:
            is_lost = True
            device.lose()
        return torch.AcceleratorError("CUDA error: illegal memory access") if is_lost else None

    def synchronize(*_: object) -> None:
        if is_lost:
            raise torch.AcceleratorError("CUDA error: illegal memory access")
        works()

    works = torch.cuda.synchronize
    device.fail_when, torch.cuda.synchronize = error, synchronize
    yield
    device.fail_when, torch.cuda.synchronize = (lambda name: None), works
    assert is_lost, f"no {name}"


if __name__ == "__main__":
    main()
