"""Machines with a known cost function on a virtual clock: what the pacing of steps is tested on."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from streamserve.core.plan import ModelRunnerOutput
from streamserve.core.step_time import StepProfile, StepShape, StepTimeModel, shape_of
from tests.unit.simulated import Harness

Rows = Callable[[int], float]


def plateau(rows: int) -> float:
    """Rows are nearly free up to 64, as on matrix units."""
    return 0.020 + 0.00004 * rows + 0.0003 * max(rows - 64, 0)


def linear(rows: int) -> float:
    """Compute-bound from a few rows on."""
    return 0.016 + 0.0007 * max(rows - 4, 0)


LADDER = (1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), 288, 320, 384, 448, 512, 520)


@dataclass
class Machine:
    """Seconds of a step: rows, attention, sampling; then noise, and now and then a disturbance."""

    rows: Rows = linear
    decode_context_s: float = 1e-6
    pair_s: float = 4e-7
    key_s: float = 5e-6
    sampled_s: float = 0.0001
    noise: float = 0.0  # relative standard deviation
    outliers: float = 0.0  # share of steps that take up to four times as long
    slow_down: float = 1.0
    sizes: tuple[int, ...] = ()
    seed: int = 0
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def undisturbed(self, shape: StepShape) -> float:
        """What the step takes on a quiet machine."""
        return self.slow_down * (
            self.rows(self.padded(shape))
            + self.decode_context_s * shape.decode_context
            + self.pair_s * shape.prefill_pairs
            + self.key_s * shape.prefill_keys
            + self.sampled_s * shape.num_sampled
        )

    def seconds(self, shape: StepShape) -> float:
        """What it takes today."""
        factor = max(1.0 + self.rng.gauss(0.0, self.noise), 0.5)
        if self.rng.random() < self.outliers:
            factor *= self.rng.uniform(1.5, 4.0)
        return factor * self.undisturbed(shape)

    def padded(self, shape: StepShape) -> int:
        def pad(count: int) -> int:
            return next((size for size in self.sizes if size >= count), count)

        return pad(shape.num_tokens + pad(shape.num_sampled) - shape.num_sampled)

    def profile(self) -> StepProfile:
        """As a warm-up would measure it: a handful of steps."""
        chunks = [StepShape().with_chunk(0, rows, 1) for rows in (1, 8, 32, 64, 128, 512)]
        decodes = StepShape(64, 64, 64 * 9)
        behind = StepShape().with_chunk(1000, 64, 1)
        shapes = [*chunks, decodes, behind]
        return StepProfile(tuple((s, self.seconds(s)) for s in shapes), self.sizes)


@dataclass
class TimedStep:
    """One step as it went."""

    shape: StepShape
    decode_shape: StepShape  # of its decodes alone
    chunks: dict[str, int]
    seconds: float
    undisturbed: float
    target_s: float


class TimedHarness(Harness):
    """A scheduler on a machine: its clock is what the machine's steps take."""

    def __init__(self, machine: Machine, **config: object) -> None:
        self.machine = machine
        defaults = {"max_model_len": 4096, "max_num_batched_tokens": 512, "max_num_seqs": 64}
        super().__init__(
            num_blocks=4096,
            block_size=16,
            step_time=StepTimeModel(machine.profile()),
            **(defaults | {"policy": "sjf"} | config),
        )
        self.steps: list[TimedStep] = []

    def add_now(self, num_tokens: int, *, max_tokens: int) -> object:
        """A prompt that shares nothing with another, arriving now."""
        before = self.now
        self.num_distinct = getattr(self, "num_distinct", 0) + 1
        request = self.request([self.num_distinct] * num_tokens, max_tokens=max_tokens)
        self.now = request.arrival_time = before
        self.scheduler.add(request)
        return request

    def timed_step(self) -> TimedStep | None:
        """Schedule, let the machine work, and retire."""
        plan = self.scheduler.schedule()
        if plan is None:
            return None
        shape = shape_of(plan)
        singles = [s for s in plan.scheduled if s.output_position]
        decode_shape = StepShape(len(singles), len(singles), sum(s.start + 1 for s in singles))
        seconds = self.machine.seconds(shape)
        self.now += seconds
        sampled = [[1] * s.num_kept([1] * s.sample) for s in plan.scheduled]
        self.scheduler.update(ModelRunnerOutput(plan.step_id, sampled, duration_s=seconds))
        step = TimedStep(
            shape,
            decode_shape,
            {s.request_id: len(s.token_ids) for s in plan.scheduled if not s.output_position},
            seconds,
            self.machine.undisturbed(shape),
            self.scheduler.pacer.stats.itl_target_s,
        )
        self.steps.append(step)
        return step
