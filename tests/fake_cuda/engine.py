"""An engine's runner on the fake device, built as a server does it; its steps are written down."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import current_thread
from typing import Any

from streamserve.cli.args import build_parser
from streamserve.cli.compose import builder_of, set_up
from streamserve.core.plan import ModelRunnerOutput, SchedulerOutput
from streamserve.errors import OutOfMemoryError
from streamserve.runner.cuda.model_runner import CudaModelRunner
from streamserve.runner.drafting import DraftingRunner
from streamserve.runner.head_drafter import HeadDrafter
from tests.fake_cuda import runtime
from tests.fake_cuda.device import Entry, FakeDevice
from tests.runner.loop import Loop

BLOCK_SIZE = 16
MAX_TOKENS = 64
SEATS = 8
# Of the host's thread: it waits for nothing but these.
_COUNTED = ("h2d", "d2h", "blocking h2d", "blocking d2h", "wait", "replay")


@dataclass(frozen=True, slots=True)
class CountedStep:
    """What a step asked of the device, on the device thread."""

    plan: SchedulerOutput
    entries: list[Entry]

    @property
    def counts(self) -> dict[str, int]:
        kinds = Counter(entry.kind for entry in self.entries)
        return {kind: kinds[kind] for kind in _COUNTED if kinds[kind]}


class Engine:
    """A warm runner. ``met`` are the kernels that it had met when it was ready."""

    def __init__(self, device: FakeDevice, directory: Path, *flags: str) -> None:
        common = [
            "serve", str(directory), "--device", f"cuda:{device.index}", "--block-size",
            str(BLOCK_SIZE), "--max-num-seqs", str(SEATS), "--max-num-batched-tokens",
            str(MAX_TOKENS), "--max-model-len", "128",
        ]  # fmt: skip
        args = build_parser().parse_args([*common, *flags])
        self.device = device
        self.said: list[str] = []
        setup = set_up(args, self.said.append, self.said.append)
        self.scheduler = setup.scheduler
        self.built = builder_of(setup).build()
        self.built.finish_warm_up()
        self.runner = self.built.runner
        target = self.runner
        if isinstance(target, DraftingRunner):
            target = target._target
        assert isinstance(target, CudaModelRunner)
        self.target = target
        self.num_compilations = self.runner.num_compilations
        self.prefix_options: dict[str, Any] = (
            {} if self.built.num_host_blocks else {"prefix": False}
        )
        self.met = set(runtime.compiled)
        self.met_operations = self._operations()
        self.steps: list[CountedStep] = []
        self.loops: list[EngineLoop] = []
        self._count_steps()

    def _operations(self) -> set[str]:
        return {entry.name for entry in self.device.log if entry.kind == "kernel"}

    @property
    def met_late(self) -> list[str]:
        """Kernels that were compiled since the runner was ready."""
        return sorted(set(runtime.compiled) - self.met)

    @property
    def operations_met_late(self) -> list[str]:
        """Operations of torch that ran first since the runner was ready."""
        return sorted(self._operations() - self.met_operations)

    def _count_steps(self) -> None:
        launch = self.target._launch_step

        def counted(plan: SchedulerOutput) -> bool:
            first = len(self.device.log)
            try:
                return launch(plan)
            finally:
                self.device.check_joined()
                entries = self.device.log[first:]
                mine = [entry for entry in entries if entry.thread == "streamserve-device"]
                self.steps.append(CountedStep(plan, mine))

        self.target._launch_step = counted  # type: ignore[method-assign]

    def loop(self, **config: Any) -> EngineLoop:
        """A scheduler of its own, for a runner that knows of no request."""
        books = [self.target._batch]
        if isinstance(self.runner, DraftingRunner):
            drafter = self.runner._drafter
            assert isinstance(drafter, HeadDrafter)
            for known in (drafter._requests, drafter._new, drafter._released_ids):
                known.clear()
            books.append(drafter._steps._books)
        for batch in books:
            for request_id in batch.rows.request_ids:
                batch._remove(request_id)
        options = {"num_blocks": 48, "block_size": BLOCK_SIZE, "max_num_seqs": SEATS}
        if self.built.num_host_blocks:
            options["num_host_blocks"] = self.built.num_host_blocks
        options["num_state_slots"] = self.built.memory.num_state_slots
        loop = EngineLoop(self.runner, **{**options, "max_steps_in_flight": 2, **config})
        self.loops.append(loop)
        return loop

    @contextmanager
    def failing(self, name: str, error: BaseException) -> Iterator[list[BaseException]]:
        """The next operation of this name raises, once; what has not been raised yet.

        Of a step's: what a head guesses meanwhile is on another thread.
        """
        left = [error]

        def fail_when(asked: str) -> BaseException | None:
            is_step = current_thread().name == "streamserve-device"
            return left.pop() if left and asked == name and is_step else None

        self.device.fail_when = fail_when
        try:
            yield left
        finally:
            self.device.fail_when = lambda asked: None


class EngineLoop(Loop):
    """With masks, and with steps that fail as the engine lets them."""

    def __init__(self, *args: Any, **config: Any) -> None:
        super().__init__(*args, **config)
        self.masks: dict[str, bytes] = {}
        self.errors: list[Exception] = []

    def turn(self) -> None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.plans.append(plan)
            check_apart(plan)
            self.runner.launch(plan)
            scheduled = {part.request_id for part in plan.scheduled}
            masks = {name: mask for name, mask in self.masks.items() if name in scheduled}
            self.futures.append(self.runner.sample(plan.step_id, masks or None))
        if plan is None or len(self.futures) >= self.scheduler.config.max_steps_in_flight:
            self.retire()
        self.scheduler.check_integrity()

    def retire(self) -> None:
        future: Future[ModelRunnerOutput] = self.futures.pop(0)
        step_id = self.plans[-1 - len(self.futures)].step_id
        try:
            output = future.result(timeout=120)
        except Exception as error:
            self.errors.append(error)
            is_memory = isinstance(error, OutOfMemoryError)
            self.scheduler.fail_step(step_id, out_of_memory=is_memory)
            return
        check_arrived(output)
        self.updates += self.scheduler.update(output)


def check_arrived(output: ModelRunnerOutput) -> None:
    """Nothing was read before the device had written it: see `tensors._download`."""
    assert all(token_id >= 0 for ids in output.sampled_token_ids for token_id in ids)
    found = chain.from_iterable(output.logprobs or ())
    assert not any(math.isnan(entry.logprob) for entry in found)
    for vector in (output.pooled or {}).values():
        assert not any(map(math.isnan, vector))


def check_apart(plan: SchedulerOutput) -> None:
    """What is carried to and from the host is neither written nor read by the step beside it."""
    both = [*plan.loads, *plan.stores]
    carried = {pair.block_id for pair in both}
    assert len(carried) == len({pair.host_block_id for pair in both}) == len(both)
    new = {block for part in plan.scheduled for block in part.new_block_ids}
    assert not carried & {copy.dst for copy in plan.block_copies}
    assert not {pair.block_id for pair in plan.loads} & {copy.src for copy in plan.block_copies}
    assert not {pair.block_id for pair in plan.loads} & new
