"""The sort keys, and when one request yields to another."""

import itertools

import pytest

from streamserve import config
from streamserve.core.policy import POLICIES
from streamserve.core.request import Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.shares import Account


def make_request(arrival_time, priority, num_tokens=1):
    params = SamplingParams()
    request = Request(
        "r", [1] * num_tokens, params, arrival_time=arrival_time, seed=0, priority=priority
    )
    request.account = TENANT
    return request


TENANT = Account("")

# (arrival time, priority), in the order in which they came
REQUESTS = [(3.0, 0), (1.0, 5), (1.0, 0), (2.0, -1), (1.0, 5)]


@pytest.mark.parametrize(
    ("policy", "order"),
    [("fcfs", [1, 2, 4, 3, 0]), ("sjf", [1, 2, 4, 3, 0]), ("priority", [3, 2, 0, 1, 4])],
)
def test_order(policy, order):
    key = POLICIES[policy].key
    keys = [key(make_request(*args), seq) for seq, args in enumerate(REQUESTS)]
    assert sorted(range(len(REQUESTS)), key=keys.__getitem__) == order
    assert len(set(keys)) == len(keys)


def test_every_policy_of_the_config_is_there():
    assert set(config.POLICIES) == set(POLICIES)


def test_first_come_never_yields():
    requests = [make_request(*args) for args in REQUESTS]
    assert not any(
        POLICIES["fcfs"].outranks(a, b) for a, b in itertools.product(requests, repeat=2)
    )


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_outranking_is_a_smaller_key_by_more_than_a_margin(policy):
    requests = [make_request(*args) for args in REQUESTS]
    for seq, request in enumerate(requests):
        request.sort_key = POLICIES[policy].key(request, seq)
    for (i, a), (j, b) in itertools.product(enumerate(requests), repeat=2):
        if POLICIES[policy].outranks(a, b):
            assert POLICIES[policy].key(a, i) < POLICIES[policy].key(b, j)
            assert not POLICIES[policy].outranks(b, a)


def test_only_a_more_urgent_class_outranks():
    outranks = POLICIES["priority"].outranks
    assert outranks(make_request(9.0, 0), make_request(1.0, 1))
    assert not outranks(make_request(1.0, 1), make_request(9.0, 1))
    assert not outranks(make_request(1.0, 2), make_request(9.0, 1))


def test_the_shortest_goes_first_and_ages():
    key = POLICIES["sjf"].key
    long = key(make_request(10.0, 0, 1000), 0)
    assert key(make_request(12.0, 0, 100), 1) < long
    assert key(make_request(14.4, 0, 100), 2) < long
    assert key(make_request(14.6, 0, 100), 3) > long  # 900 tokens let others pass for 4.5 s
    cached = make_request(10.0, 0, 1000)
    cached.num_uncached_tokens = 100
    assert key(cached, 4) < key(make_request(10.0, 0, 101), 5)


def test_who_overtakes_sorts_before_and_who_outranks_overtakes():
    requests = [make_request(*args) for args in REQUESTS]
    for policy in POLICIES.values():
        for seq, request in enumerate(requests):
            request.sort_key = policy.key(request, seq)
        for a, b in itertools.product(requests, repeat=2):
            assert not policy.overtakes(a, b) or a.sort_key < b.sort_key
            assert not policy.outranks(a, b) or policy.overtakes(a, b)
