"""Where a step's time goes on a GPU: `python kernels/bench/step_profile.py DIR --batch-size 1 64`.

For each batch size a table of what prolongs its decode steps, from a profile of their graph; then,
with `--sweep`, attention's sizes and every kernel of every product tried in that graph. Takes the
flags of `streamserve bench latency`; what a sweep finds is told, and kept nowhere.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile
from triton.errors import TritonError

from device_bench.attention_plans import IN_A_STEP, changed
from device_bench.step_sweep import Choice, Event, Part, Tried, of_products, parts, sweep
from device_bench.table import replace_text
from streamserve.cli.bench_engine import Subject, build, start
from streamserve.cli.bench_flags import latency_parser
from streamserve.cli.bench_load import Load
from streamserve.cli.bench_steps import decode_steps
from streamserve.errors import StreamServeError
from streamserve_kernels.triton.tuning import Config, Tunable, bucket
from streamserve_loadtest.cli import run_async

_STEPS = 40  # of a measurement
_MOST_PARTS = 24


class Profiler:
    """An engine whose decodes are looked at. It answers the same prompts again and again."""

    def __init__(self, subject: Subject, load: Load, input_len: int) -> None:
        self._subject = subject
        self._load = load
        self._input_len = input_len
        self._prompts: dict[int, list[list[int]]] = {}
        runner: Any = subject.probe.runner
        self._runner, self._executor = runner, runner._executor

    async def seconds(self, batch_size: int) -> float:
        """The median of decode steps of the whole batch, on the device."""
        begin = len(self._subject.probe.steps)
        await self._answers(batch_size)
        device = decode_steps(self._subject.probe.steps[begin:], batch_size).device
        assert device is not None
        return device.median

    async def parts(self, batch_size: int) -> list[Part]:
        await self._answers(batch_size)  # the prompts are cached then
        begin = len(self._subject.probe.steps)
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
            await self._answers(batch_size)
        return parts(_events(found), len(self._subject.probe.steps) - begin)

    async def sweep(self, batch_size: int, tell: Callable[[Tried], object]) -> None:
        """Steps are measured on the loop, and the sweep waits for each in a thread of its own.

        That thread calls `tell` with each option when it has been tried.
        """
        keys = self._executor.decode_graphs(batch_size)
        on_device_thread = self._runner.on_device_thread
        rows = bucket(keys[0].num_seqs)
        products: dict[str, list[Tunable]] = {}
        for linear in self._executor.model.linears():
            if isinstance(linear, Tunable) and len(linear.candidates(rows)) > 1:
                products.setdefault(linear.tuning_key(rows), []).append(linear)
        loop = asyncio.get_running_loop()

        def measure() -> float:
            on_device_thread(lambda: self._executor.capture_again(keys))
            return asyncio.run_coroutine_threadsafe(self.seconds(batch_size), loop).result()

        def can_multiply(product: Tunable, config: Config) -> bool:
            def run() -> None:
                x = torch.zeros(rows, product.in_features, dtype=product.dtype)
                product.run(x.to(product.device), config)

            return bool(on_device_thread(lambda: _fits(run)))

        with ExitStack() as sizes:

            def choose(option: str) -> None:
                sizes.close()
                sizes.enter_context(changed(IN_A_STEP[option]))

            def can_attend(option: str) -> bool:
                """Runs the step of before once more: its answers are finished."""
                choose(option)
                steps = [partial(self._executor.run_eagerly, key) for key in keys]
                return all(bool(on_device_thread(lambda step=step: _fits(step))) for step in steps)

            attention = Choice("attention", "as planned", list(IN_A_STEP), choose, can_attend)
            choices = [attention, *of_products(products, rows, can_multiply)]

            def try_all() -> None:
                for one in sweep(choices, measure):
                    tell(one)

            await asyncio.to_thread(try_all)

    async def _answers(self, batch_size: int) -> None:
        if batch_size not in self._prompts:
            prompts = [self._load.prompt(self._input_len) for _ in range(batch_size)]
            self._prompts[batch_size] = prompts
            await self._load.answers(prompts, 1)
        await self._load.answers(self._prompts[batch_size], _STEPS)


def _fits(run: Callable[[], object]) -> bool:
    """Whether a kernel runs. Some want more shared memory than there is."""
    try:
        run()
    except TritonError:
        return False
    return True


def _events(found: profile) -> list[Event]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        found.export_chrome_trace(file.name)
        trace = json.loads(Path(file.name).read_text())
    return [
        Event(_name(event), event["ts"], event["ts"] + event["dur"])
        for event in trace["traceEvents"]
        if event.get("cat") in {"kernel", "gpu_memcpy", "gpu_memset"}
    ]


def _name(event: dict[str, Any]) -> str:
    """With the grid: a GEMV of another layer is another one."""
    grid = event["args"].get("grid")
    short = str(event["name"]).partition("(")[0].removeprefix("void ")[:48]
    return f"{short} {grid}" if grid else short


def described(found: Sequence[Part]) -> str:
    lines = [f"{'a step, on average':64} {'times':>6} {'µs':>9} {'idle':>8}"]
    lines += [
        f"{part.name:64} {part.count:6.1f} {part.prolonged:9.1f} {part.waited:8.1f}"
        for part in found[:_MOST_PARTS]
    ]
    total = sum(part.prolonged for part in found)
    return "\n".join([*lines, f"{'together':64} {'':6} {total:9.1f}"])


def main(argv: Sequence[str] | None = None) -> int:
    own = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    own.add_argument("--sweep", action="store_true", help="try its kernels in the step")
    args, rest = own.parse_known_args(argv)
    flags = latency_parser("step_profile.py").parse(rest)
    if not torch.cuda.is_available():
        print("there is no GPU here, whose steps could be profiled", file=sys.stderr)
        return 2
    shapes = [(size, flags.input_len[0], _STEPS) for size in flags.batch_size]
    try:
        subject = build(flags, shapes)
    except StreamServeError as error:
        print(error, file=sys.stderr)
        return 1

    results: dict[str, Any] = {}

    def write() -> None:
        """What ends this process early does not take with it what has been measured."""
        if flags.json is not None:
            replace_text(flags.json, json.dumps(results, indent=1) + "\n")

    async def look() -> None:
        profiler = Profiler(subject, await start(subject, flags), flags.input_len[0])
        for size in flags.batch_size:
            found = await profiler.parts(size)
            print(f"\nbatch {size}\n{described(found)}", flush=True)
            tried: list[dict[str, Any]] = []
            results[str(size)] = {"parts": [part._asdict() for part in found], "tried": tried}
            write()

            def tell(one: Tried, tried: list[dict[str, Any]] = tried) -> None:
                print(f"{one.seconds * 1e3:8.3f} ms  {one.key}  {one.option}", flush=True)
                tried.append({**one._asdict(), "option": str(one.option)})
                write()

            if args.sweep:
                await profiler.sweep(size, tell)
        await subject.service.engine.stop()

    run_async(look)
    return 0


if __name__ == "__main__":
    sys.exit(main())
