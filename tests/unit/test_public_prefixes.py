"""Tenants share what was declared public, and no token or block more."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from streamserve.core.prefix_cache import num_common_tokens
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.preprocess import PromptEncoder
from streamserve.engine.system_prefix import system_prefix
from tests.unit.simulated import Harness

SYSTEM = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]  # two blocks of 4, and two tokens
QUESTION = [*SYSTEM, 1, 1, 2, 2, 3, 3]


def run_one(harness, prompt, salt, *, shares=True):
    """How many tokens of ``prompt`` are computed."""
    before = harness.runner.num_computed_tokens
    request = harness.add(prompt, salt=salt, shares=shares, max_tokens=1)
    harness.run()
    return harness.runner.num_computed_tokens - before, request


@pytest.mark.parametrize("host", [0, 40])
def test_promise_private_a_hit_ends_with_the_declared_prefix(host):
    harness = Harness(public_prefixes=[SYSTEM], num_host_blocks=host)
    cold = len(QUESTION)
    assert run_one(harness, QUESTION, "a")[0] == cold
    assert run_one(harness, QUESTION, "a")[0] == 1, "one's own is found to the token"
    assert run_one(harness, QUESTION, "b")[0] == cold - 8, "not the tail, nor the blocks behind"
    assert run_one(harness, QUESTION, "c")[0] == cold - 8
    assert run_one(harness, QUESTION, "b")[0] == 1
    assert run_one(harness, QUESTION, "c, a salt of its own", shares=False)[0] == cold
    assert run_one(harness, QUESTION, "", shares=False)[0] == cold, "the public root is no salt"
    assert run_one(harness, SYSTEM[:-3], "d")[0] == len(SYSTEM) - 3, "it is not whole"
    harness.check_integrity()


def test_promise_private_a_tail_behind_public_blocks_is_ones_own():
    harness = Harness(public_prefixes=[SYSTEM])
    prompt = [*SYSTEM, 1]
    assert run_one(harness, prompt, "a")[0] == 11
    assert run_one(harness, prompt, "b")[0] == 3
    assert run_one(harness, prompt, "a")[0] == 1
    assert run_one(harness, prompt, "b")[0] == 1


def test_promise_private_without_a_declaration_nothing_is_shared():
    harness = Harness()
    for salt in "abc":
        assert run_one(harness, QUESTION, salt)[0] == len(QUESTION)


def test_promise_private_what_the_host_tier_brings_back_is_ones_own():
    harness = Harness(
        public_prefixes=[SYSTEM], num_blocks=8, num_host_blocks=64, max_transfers_per_step=8
    )
    run_one(harness, QUESTION, "a")
    for i in range(4):  # pushes everything out of the device
        run_one(harness, [10, i] * 10, "filler")
    assert harness.kv.stats.num_evictions
    computed, _ = run_one(harness, QUESTION, "b")
    assert computed == len(QUESTION) - 8
    assert harness.runner.num_loads >= 2
    for i in range(4):
        run_one(harness, [10, i, 5] * 7, "filler")
    assert run_one(harness, QUESTION, "a")[0] <= 4, "and that is all of it"


def test_promise_private_nobody_waits_for_another_tenants_prompt():
    harness = Harness(public_prefixes=[SYSTEM], max_num_batched_tokens=64)
    requests = [harness.add(QUESTION, salt=salt, shares=True) for salt in "aab"]
    first = harness.step()
    assert [s.request_id for s in first.scheduled] == [requests[0].request_id, "r3"]
    assert [len(s.token_ids) for s in first.scheduled] == [len(QUESTION)] * 2
    harness.run()


def test_groups_of_several_tenants_share_the_public_blocks_only():
    harness = Harness(public_prefixes=[SYSTEM], max_num_batched_tokens=64)
    run_one(harness, QUESTION, "a")
    for salt in "abcd":
        harness.add(QUESTION, salt=salt, shares=True, max_tokens=10)
    plans = harness.run()
    groups = [group for plan in plans for group in plan.prefix_groups]
    assert {len(members) for members, _ in groups} == {4}
    assert {num_blocks for _, num_blocks in groups} == {2}


def test_the_longest_declared_prefix_counts():
    longer = [*SYSTEM, 0, 0, 0, 0]
    harness = Harness(public_prefixes=[SYSTEM, longer, [5]])
    run_one(harness, [*longer, 1], "a")
    assert run_one(harness, [*longer, 1], "b")[0] == 15 - 12
    assert run_one(harness, [*SYSTEM, 1, 1, 1, 1], "b")[0] == 14 - 8


@given(
    asked=st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(0, 14),  # of the system prompt
            st.lists(st.integers(0, 1), min_size=1, max_size=8),
            st.booleans(),
        ),
        min_size=2,
        max_size=25,
    ),
    length=st.integers(1, 14),
    num_blocks=st.integers(8, 24),
    num_host_blocks=st.sampled_from([0, 0, 30]),
    at_once=st.integers(1, 4),
    depth=st.sampled_from([1, 2]),
)
@settings(max_examples=60)
def test_promise_private_a_request_finds_its_own_tenants_tokens_and_public_ones(
    asked, length, num_blocks, num_host_blocks, at_once, depth
):
    """Against all that its tenant ever computed; whose memory is read, the device checks."""
    system = [*SYSTEM, 3, 3, 3, 3]
    harness = Harness(
        public_prefixes=[system[:length]],
        num_blocks=num_blocks,
        num_host_blocks=num_host_blocks,
        max_steps_in_flight=depth,
    )
    known = {tenant: [] for tenant in "abc"}
    for i in range(0, len(asked), at_once):
        requests = [
            harness.add([*system[:shared], *words], salt=tenant, shares=shares)
            for tenant, shared, words, shares in asked[i : i + at_once]
        ]
        for request in requests:
            known[request.cache_salt].append(request)
        harness.run()
        for request in requests:
            prompt = request.token_ids[: request.num_prompt_tokens]
            own = [
                num_common_tokens(prompt, other.token_ids)
                for other in known[request.cache_salt]
                if other is not request
            ]
            whole = length // 4 * 4
            is_public = prompt[:whole] == system[:whole] and request.shares_public_prefixes
            public = whole if is_public else 0
            assert request.num_cached_tokens <= max([public, *own])


def test_a_system_prompt_is_what_the_template_writes_before_the_first_words():
    tokenizer = ByteTokenizer()
    for name in ("plain", "chatml"):
        template = ChatTemplate.builtin(name, special_tokens=tokenizer.special_tokens)
        encoder = PromptEncoder(tokenizer, template)
        found = system_prefix(encoder, "You are kind.")
        chat = encoder.chat(
            [
                {"role": "system", "content": "You are kind."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho"},
                {"role": "user", "content": "Hu"},
            ]
        )
        assert chat.token_ids[: len(found)] == found
        text = tokenizer.decode(found, skip_special_tokens=False)
        assert "You are kind." in text
        assert chat.text.startswith(text)
        assert chat.text[len(text) :].lstrip().startswith("Hi")
