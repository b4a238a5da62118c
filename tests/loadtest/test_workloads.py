"""The same seed gives the same load, whatever is measured with it."""

import itertools
import random
from dataclasses import replace

import pytest

from streamserve_loadtest.arrivals import arrival_times
from streamserve_loadtest.drive import Planner
from streamserve_loadtest.prompts import WordPrompts
from streamserve_loadtest.workloads import WORKLOADS, ClosedLoop, OpenLoop
from tests.loadtest.canned import byte_prompts


def plans(workload, *, seed=0, round_number=0, rate=None, prompts=None):
    planner = Planner(prompts or WordPrompts(), seed, round_number, rate)
    return [planner.plan(group) for group in workload.groups]


def drawn(workload, **options):
    """Everything that a plan holds, as plain data."""
    found = []
    for plan in plans(workload, **options):
        conversations = plan.conversations or [next(client) for client in plan.clients]
        found.append(
            (
                plan.arrivals,
                [(c.name, c.kind.name, c.messages, sorted(c.cancelled)) for c in conversations],
            )
        )
    return found


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_seed_fixes_prompts_kinds_arrivals_and_who_leaves(name):
    workload = WORKLOADS[name]
    assert drawn(workload, seed=3) == drawn(workload, seed=3)
    assert drawn(workload, seed=3) != drawn(workload, seed=4)


def test_prompts_are_new_in_every_round_except_for_the_shared_prefix():
    first, second = (drawn(WORKLOADS["W2"], round_number=n)[0][1] for n in (0, 1))
    assert [c[2][0] for c in first] == [c[2][0] for c in second]
    assert len({c[2][0]["content"] for c in first}) == 1
    assert not {c[2][1]["content"] for c in first} & {c[2][1]["content"] for c in second}


def test_prompts_are_new_at_every_rate():
    """Or a server would find those of the rate before in its cache."""
    w6 = WORKLOADS["W6"].at_rate(1.0)
    [(arrivals, first)], [(again, second)] = (drawn(w6, rate=rate) for rate in (1.0, 2.0))
    assert arrivals == again
    texts = [{c[2][0]["content"] for c in conversations} for conversations in (first, second)]
    assert not texts[0] & texts[1]


def test_every_round_and_rate_meets_the_same_mix():
    w6 = WORKLOADS["W6"].lasting(200.0)
    slow, fast = w6.at_rate(1.0), w6.at_rate(2.0)
    [(arrivals, conversations)] = drawn(slow)
    [(sooner, more)] = drawn(fast, round_number=1)
    assert sooner[: len(arrivals)] == pytest.approx([t / 2 for t in arrivals])
    shape = [(c[0], c[1], c[3]) for c in conversations]
    assert shape == [(c[0], c[1], c[3]) for c in more[: len(shape)]]


def test_w6_has_the_mix_that_it_says():
    [(_, conversations)] = drawn(WORKLOADS["W6"].at_rate(20.0))
    kinds = [c[1] for c in conversations]
    for kind in WORKLOADS["W6"].groups[0].kinds:
        assert kinds.count(kind.name) / len(kinds) == pytest.approx(kind.share, abs=0.03)
    num_turns = sum(3 if kind == "three turns" else 1 for kind in kinds)
    num_cancelled = sum(len(c[3]) for c in conversations)
    assert num_cancelled / num_turns == pytest.approx(0.10, abs=0.02)


@pytest.mark.parametrize(("role", "tokens"), [("system", 512), ("user", 32), ("user", 2000)])
def test_a_message_adds_exactly_its_tokens(role, tokens):
    prompts = byte_prompts()
    history = [prompts.fill([], "system", 100, random.Random(0))] if role == "user" else []
    message = prompts.fill(history, role, tokens, random.Random(1))
    before = prompts.count(history, opens_answer=False)
    after = prompts.count([*history, message], opens_answer=role == "user")
    assert after - before == tokens


def test_a_message_that_cannot_be_so_short_is_empty():
    assert byte_prompts().fill([], "user", 1, random.Random(0))["content"] == ""


def test_the_longest_context_of_a_workload():
    assert WORKLOADS["W1"].max_tokens == 192
    assert WORKLOADS["W2"].max_tokens == 608
    assert WORKLOADS["W4"].max_tokens == 1048


def test_poisson_arrivals_have_their_rate_and_spread():
    times = arrival_times(OpenLoop("poisson", 5.0, 2000.0), random.Random(0))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert times == sorted(times)
    assert times[-1] < 2000.0
    assert mean == pytest.approx(0.2, rel=0.05)
    assert variance**0.5 == pytest.approx(mean, rel=0.05)


def test_uniform_arrivals_and_bursts():
    rng = random.Random(0)
    assert arrival_times(OpenLoop("uniform", 1 / 3, 15.0), rng) == [0, 3, 6, 9, 12]
    assert arrival_times(OpenLoop("burst", 2.0, 4.0, burst_size=4), rng) == [0] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (OpenLoop("steady", 1.0, 1.0), "got 'steady'"),
        (OpenLoop("poisson", 0.0, 1.0), "above 0, got 0"),
    ],
)
def test_arrivals_that_make_no_sense_are_refused(load, message):
    with pytest.raises(ValueError, match=message):
        arrival_times(load, random.Random(0))


def test_changing_the_rate_leaves_closed_loops_alone():
    w3 = WORKLOADS["W3"].at_rate(2.0)
    assert isinstance(w3.groups[0].load, ClosedLoop)
    assert w3.groups[1].load == replace(WORKLOADS["W3"].groups[1].load, rate=2.0)
