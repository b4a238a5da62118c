"""The model of a step's time against machines whose cost function is known."""

import random

import pytest

from streamserve.core.least_squares import RobustLeastSquares
from streamserve.core.plan import ScheduledRequest, SchedulerOutput
from streamserve.core.row_times import RowTimes
from streamserve.core.step_time import StepProfile, StepShape, StepTimeModel, shape_of
from tests.unit.machines import LADDER, Machine, linear, plateau


def random_shape(rng: random.Random) -> StepShape:
    """Decodes at any depth, and often a chunk."""
    num_decodes = rng.randint(1, 32)
    shape = StepShape(num_decodes, num_decodes, sum(rng.randint(1, 2000) for _ in range(8)))
    if rng.random() < 0.6:
        shape = shape.with_chunk(rng.randint(0, 3000), rng.randint(2, 200), rng.randint(0, 1))
    return shape


def settled(machine: Machine, num_steps: int = 600) -> StepTimeModel:
    model = StepTimeModel(machine.profile())
    rng = random.Random(7)
    for _ in range(num_steps):
        shape = random_shape(rng)
        model.observe(shape, machine.seconds(shape))
    return model


def errors(model: StepTimeModel, machine: Machine, num_shapes: int = 300) -> list[float]:
    """Relative errors against what the machine takes undisturbed, from small to large."""
    rng = random.Random(8)
    shapes = [random_shape(rng) for _ in range(num_shapes)]
    return sorted(abs(model.predict(s) / machine.undisturbed(s) - 1.0) for s in shapes)


def p(values: list[float], share: float) -> float:
    return values[int(share * len(values))]


def test_the_shape_of_a_plan():
    plan = SchedulerOutput(0)
    plan.scheduled.append(ScheduledRequest("a", 9, [1], [], True, 3))
    plan.scheduled.append(ScheduledRequest("b", 100, [1] * 8, [], False, 0))
    plan.scheduled.append(ScheduledRequest("c", 0, [1] * 4, [], True, 0))
    assert shape_of(plan) == StepShape(13, 2, 10, 8 * 104 + 4 * 2, 108 + 4)
    assert StepShape(1, 1, 10).with_chunk(100, 8, 0).with_chunk(0, 4, 1) == shape_of(plan)


def test_padding_is_what_the_runner_does():
    model = StepTimeModel(Machine(sizes=LADDER).profile())
    assert model.num_rows(StepShape(8, 8)) == 8
    assert model.num_rows(StepShape(28, 8)) == 32
    assert model.num_rows(StepShape(33, 9)) == 40  # 7 rows that are sampled for nothing
    assert model.num_rows(StepShape(600, 0)) == 600
    assert StepTimeModel(Machine().profile()).num_rows(StepShape(33, 9)) == 33


@pytest.mark.parametrize("rows", [plateau, linear])
@pytest.mark.parametrize("sizes", [(), LADDER])
def test_a_quiet_machine_is_learnt_to_a_few_percent(rows, sizes):
    machine = Machine(rows, sizes=sizes)
    found = errors(settled(machine), machine)
    assert p(found, 0.5) < 0.02
    assert p(found, 0.95) < 0.06


@pytest.mark.parametrize("rows", [plateau, linear])
def test_a_machine_that_others_disturb_is_learnt_nonetheless(rows):
    machine = Machine(rows, noise=0.05, outliers=0.05)
    found = errors(settled(machine, 1500), machine)
    assert p(found, 0.5) < 0.05
    assert p(found, 0.95) < 0.15


def test_one_disturbance_moves_little():
    machine = Machine(noise=0.02)
    model = settled(machine)
    shape = StepShape(8, 8, 4000).with_chunk(500, 32, 0)
    before = model.predict(shape)
    model.observe(shape, 20 * before)
    assert model.predict(shape) == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_machine_that_changes_its_speed_is_followed_within_a_dozen_steps(factor):
    machine = Machine(noise=0.02)
    model = settled(machine)
    machine.slow_down = factor
    rng = random.Random(9)
    for _ in range(12):
        shape = random_shape(rng)
        model.observe(shape, machine.seconds(shape))
    assert p(errors(model, machine), 0.9) < 0.2


def test_a_thousand_equal_steps_do_not_make_it_jumpy():
    """Nothing but decodes for long: what cannot be seen meanwhile is not forgotten into noise."""
    machine = Machine(noise=0.03)
    model = settled(machine)
    for i in range(1000):
        shape = StepShape(8, 8, 800 + 8 * (i % 100))
        model.observe(shape, machine.seconds(shape))
    assert p(errors(model, machine), 0.9) < 0.15


def test_predictions_grow_with_everything_in_a_step():
    model = settled(Machine(plateau, noise=0.1, outliers=0.1, sizes=LADDER))
    for shape in (StepShape(8, 8, 4000), StepShape(60, 8, 4000, 9e4, 1000)):
        for start in (0, 1000):
            last = 0.0
            for num_tokens in range(1, 300):
                now = model.predict(shape.with_chunk(start, num_tokens, 0))
                assert now >= last
                last = now


def test_the_error_is_the_recent_p95_within_bounds():
    machine = Machine()
    model = StepTimeModel(machine.profile())
    assert model.error == 0.1  # nothing is known yet
    shape = StepShape(8, 8, 800).with_chunk(0, 32, 0)
    for _ in range(100):
        model.observe(shape, model.predict(shape))
    assert model.error == pytest.approx(0.0)
    for i in range(64):
        model.observe(shape, model.predict(shape) * (1.08 if i % 10 == 0 else 1.0))
    assert model.error == pytest.approx(0.08)
    for _ in range(64):
        model.observe(shape, model.predict(shape) * 3)
    assert model.error == 0.25


def test_a_single_sample_is_enough_to_begin_with():
    model = StepTimeModel(StepProfile(((StepShape(4, 1), 0.01),)))
    assert model.predict(StepShape(4, 1)) == pytest.approx(0.01)
    for _ in range(50):
        model.observe(StepShape(8, 8, 80), 0.02)
    assert model.predict(StepShape(8, 8, 80)) == pytest.approx(0.02, rel=0.05)


def test_the_table_never_falls():
    table = RowTimes([(1, 0.02), (8, 0.018), (8, 0.03), (64, 0.05), (256, 0.2)])
    rng = random.Random(1)
    for _ in range(2000):
        table.observe(rng.randint(1, 400), rng.uniform(-0.05, 0.05))
        values = [table(rows) for rows in range(1, 400)]
        assert values == sorted(values)
        assert values[0] > 0


def test_the_table_is_linear_between_and_behind_its_entries():
    table = RowTimes([(1, 0.01), (64, 0.01), (128, 0.02), (256, 0.04)])
    assert table(1) == table(33) == table(64) == 0.01
    assert table(96) == pytest.approx(0.015)
    assert table(512) == pytest.approx(0.08)


def test_least_squares_find_the_coefficients():
    squares = RobustLeastSquares([1.0, 1.0], memory=500.0)
    rng = random.Random(2)
    for i in range(2000):
        features = (rng.uniform(0, 10), rng.uniform(0, 1))
        value = 0.3 * features[0] + 0.5 * features[1] + rng.gauss(0.0, 0.05)
        if i % 50 == 0:
            value += 30.0
        squares.observe(features, value - squares.value(features), 0.05**2)
    assert squares.coefficients == pytest.approx([0.3, 0.5], abs=0.05)


def test_least_squares_follow_a_change_and_stay_above_zero():
    squares = RobustLeastSquares([1.0], memory=50.0)
    for value in [1.0] * 100 + [0.2] * 200:
        squares.observe((1.0,), value - squares.value((1.0,)), 0.05**2)
    assert squares.coefficients == pytest.approx([0.2], abs=0.01)
    for _ in range(200):
        squares.observe((1.0,), -1.0 - squares.value((1.0,)), 0.05**2)
    assert squares.coefficients == [0.0]
