"""Blocks, references and the prefix tree, without a scheduler."""

import pytest

from streamserve.config import CacheConfig
from streamserve.core.block_pool import BlockPool
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.plan import BlockCopy
from streamserve.core.prefix_cache import PrefixCache
from streamserve.core.request import Request
from streamserve.core.sampling_params import SamplingParams

BLOCK = 4


def make(num_blocks=16, **config):
    return KVCacheManager(
        CacheConfig(num_blocks=num_blocks, block_size=BLOCK, **config), secret=b"test"
    )


def make_request(token_ids, name="r", salt=""):
    params = SamplingParams(max_tokens=8)
    return Request(name, token_ids, params, arrival_time=0.0, seed=0, cache_salt=salt)


def admit(kv, request, num_tokens=None):
    """Match, allocate and compute ``num_tokens`` (all when ``None``); returns tokens reused."""
    match = kv.find_prefix(request)
    num_new = request.num_tokens - match.num_tokens if num_tokens is None else num_tokens
    block_ids = kv.allocate_slots(request, num_new, match)
    assert block_ids == request.block_table
    request.num_computed_tokens += num_new
    return match.num_tokens


def retire(kv, request):
    """The step that wrote the request's tokens is done."""
    request.num_written_tokens = request.num_computed_tokens
    kv.cache_blocks(request)
    kv.release_copies(kv.take_copies())
    kv.check_integrity()


def compute(kv, token_ids, name="r", salt=""):
    """Admit, compute and free a request; returns how many of its tokens were reused."""
    request = make_request(token_ids, name, salt)
    num_reused = admit(kv, request)
    retire(kv, request)
    kv.free(request)
    kv.check_integrity()
    return num_reused


def test_blocks_are_handed_out_once_and_come_back():
    kv = make(num_blocks=3)
    request = make_request(list(range(9)))
    assert kv.allocate_slots(request, 9, kv.find_prefix(request)) == [0, 1, 2]
    assert kv.num_free_blocks == 0
    assert kv.usage == 1.0
    kv.free(request)
    assert kv.num_free_blocks == 3
    assert kv.usage == 0.0
    assert request.block_table == []
    kv.check_integrity()


def test_no_room_is_none_and_changes_nothing():
    kv = make(num_blocks=2)
    compute(kv, list(range(8)))
    request = make_request([*range(8), 8])
    assert kv.allocate_slots(request, 1, kv.find_prefix(request)) is None
    assert (request.block_table, request.num_computed_tokens) == ([], 0)
    assert kv.take_copies() == []
    kv.check_integrity()


def test_a_running_request_grows_block_by_block():
    kv = make(num_blocks=3)
    request = make_request(list(range(4)))
    admit(kv, request)
    assert kv.allocate_slots(request, 1) == [1]
    request.num_computed_tokens = 5
    assert kv.allocate_slots(request, 3) == []
    request.num_computed_tokens = 8
    assert kv.allocate_slots(request, 5) is None
    assert request.block_table == [0, 1]


def test_admission_looks_ahead_to_all_known_tokens_and_the_reserve():
    kv = make(num_blocks=4)
    request = make_request(list(range(16)))
    match = kv.find_prefix(request)
    assert kv.allocate_slots(request, 4, match, num_reserved_blocks=1) is None
    assert kv.allocate_slots(request, 4, match) == [0]


def test_freed_twice_is_caught():
    pool = BlockPool(1, evict=lambda node: None)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(AssertionError, match="block 0 freed twice"):
        pool.release(block)


@pytest.mark.parametrize(
    ("first", "second", "num_reused"),
    [
        (list(range(12)), list(range(12)), 11),  # one token is always computed
        (list(range(8)), list(range(8)), 7),
        (list(range(12)), [*range(12), 99], 12),
        (list(range(12)), [*range(8), 99], 8),
        (list(range(12)), [*range(10), 99], 10),  # a part of a full block
        (list(range(10)), [*range(10), 99], 10),  # a tail
        (list(range(10)), [*range(9), 99], 9),  # a part of a tail
        (list(range(10)), [*range(10), 10, 11, 12], 10),
        (list(range(3)), [*range(3), 99], 3),  # a tail below the root
        ([7], [7], 0),
        ([7, 8], [7, 9], 1),
        ([1, 2, 3, 4], [2, 2, 3, 4], 0),
    ],
)
def test_reuse_is_exact_to_the_token(first, second, num_reused):
    kv = make()
    assert compute(kv, first) == 0
    assert compute(kv, second) == num_reused
    assert kv.stats.num_hit_tokens == num_reused
    assert kv.stats.num_queried_tokens == len(first) + len(second)


def test_only_a_partial_match_copies():
    kv = make()
    compute(kv, list(range(10)))
    full = make_request([*range(8), 99], "full")
    admit(kv, full)
    assert kv.take_copies() == []
    assert full.block_table[:2] == [0, 1]
    tail = make_request([*range(10), 99], "tail")
    admit(kv, tail)
    # block 2 holds tokens 8 and 9; the copy goes to a block that nobody had
    assert kv.take_copies() == [BlockCopy(2, tail.block_table[2])]
    assert tail.block_table[:2] == [0, 1]
    assert tail.num_computed_tokens == 11
    assert kv.stats.num_block_copies == 1


def test_a_copy_keeps_its_source_until_the_step_retires():
    kv = make(num_blocks=4)
    compute(kv, list(range(6)))
    request = make_request([*range(6), 99])
    admit(kv, request)
    copies = kv.take_copies()
    assert copies == [BlockCopy(1, request.block_table[1])]
    assert kv.num_free_blocks == 1  # 4 - 2 held - 1 source
    kv.check_integrity()
    kv.release_copies(copies)
    assert kv.num_free_blocks == 2
    kv.check_integrity()


def test_the_longest_of_the_matching_children_is_copied():
    kv = make()
    compute(kv, [0, 1, 2, 3, 4, 5], "short")
    compute(kv, [0, 1, 2, 3, 4, 6, 7], "long")
    compute(kv, [0, 1, 2, 3, 4, 7], "other")
    assert compute(kv, [0, 1, 2, 3, 4, 6, 7, 8], "again") == 7


def test_a_tail_that_is_cached_already_is_not_cached_twice():
    kv = make(num_blocks=4)
    compute(kv, [0, 1, 2, 3, 4, 5])
    tails = [b for b in kv._pool.blocks if b.node is not None and b.block_hash is None]
    compute(kv, [0, 1, 2, 3, 4, 5])
    assert [b for b in kv._pool.blocks if b.node is not None and b.block_hash is None] == tails


def test_salts_never_share():
    kv = make()
    assert compute(kv, list(range(10)), salt="a") == 0
    assert compute(kv, list(range(10)), salt="b") == 0
    assert compute(kv, list(range(10))) == 0
    assert compute(kv, list(range(10)), salt="a") == 9


def test_the_hash_is_keyed_chained_and_salted():
    def hashes(token_ids, salt="", secret=b"one"):
        request = make_request(token_ids, salt=salt)
        PrefixCache(BLOCK, secret).hash_blocks(request, 99)
        return request.block_hashes

    base = hashes(list(range(9)))
    assert len(base) == 2
    assert hashes(list(range(8))) == base
    assert not set(hashes(list(range(8)), salt="a")) & set(base)
    assert not set(hashes(list(range(8)), secret=b"two")) & set(base)
    assert hashes([9, 1, 2, 3, 4, 5, 6, 7])[1] != base[1]  # same tokens, another parent
    assert hashes(list(range(8)), secret=None) != hashes(list(range(8)), secret=None)


def test_a_look_up_hashes_no_further_than_the_first_miss():
    kv = KVCacheManager(CacheConfig(num_blocks=400, block_size=BLOCK))
    compute(kv, list(range(400)))
    long = list(range(1000, 2000))
    cold = make_request(long)
    assert kv.find_prefix(cold).num_tokens == 0
    assert len(cold.block_hashes) < 100


@pytest.mark.parametrize("max_num_hashed", [1, 7, 33, 99, 100])
def test_a_look_up_in_parts_finds_the_same(max_num_hashed):
    kv = KVCacheManager(CacheConfig(num_blocks=400, block_size=BLOCK))
    compute(kv, list(range(400)))
    for token_ids in (list(range(400)), list(range(402)), [*range(200), *range(500)], [7, 8]):
        whole = kv.find_prefix(make_request(token_ids))
        request = make_request(token_ids)
        num_calls = 1
        while (match := kv.find_prefix(request, max_num_hashed)) is None:
            assert len(request.block_hashes) == num_calls * max_num_hashed
            num_calls += 1
        assert match == whole


def test_a_collision_serves_nobody_elses_tokens(monkeypatch):
    monkeypatch.setattr(PrefixCache, "_hash", lambda self, parent, block: b"same")
    kv = make()
    assert compute(kv, [0, 1, 2, 3, 4, 5, 6, 7, 8]) == 0
    assert compute(kv, [9, 1, 2, 3, 4, 5, 6, 7, 8]) == 0
    assert compute(kv, [0, 1, 2, 9, 4, 5, 6, 7, 8]) == 3
    # the same tokens in the second block, below another first one
    assert compute(kv, [5, 5, 5, 5, 0, 1, 2, 3, 8]) == 0
    kv.check_integrity()


def test_what_is_cached_after_a_collision_is_below_its_own_tokens(monkeypatch):
    monkeypatch.setattr(PrefixCache, "_hash", lambda self, parent, block: b"same")
    kv = make()
    compute(kv, [0, 0, 0, 0, 1])
    compute(kv, [9, 9, 9, 9, 7, 7])
    assert kv.find_prefix(make_request([0, 0, 0, 0, 7, 7, 7])).num_tokens == 4
    kv.check_integrity()


def test_a_hit_must_have_the_same_parent(monkeypatch):
    """Blocks that differ only in what came before collide: the parent tells them apart."""
    monkeypatch.setattr(
        PrefixCache, "_hash", lambda self, parent, token_ids: repr(token_ids).encode()
    )
    kv = make()
    compute(kv, [0, 0, 0, 0, 7, 7, 7, 7, 8])
    compute(kv, [1, 1, 1, 1, 6])
    assert kv.find_prefix(make_request([1, 1, 1, 1, 7, 7, 7, 7, 8])).num_tokens == 4
    compute(kv, [1, 1, 1, 1, 7, 7, 7, 7, 9, 9])
    assert kv.find_prefix(make_request([0, 0, 0, 0, 7, 7, 7, 7, 9, 9, 9])).num_tokens == 8
    kv.check_integrity()


def test_blocks_are_cached_only_when_their_step_has_retired():
    kv = make()
    first = make_request(list(range(9)), "first")
    admit(kv, first)
    second = make_request(list(range(9)), "second")
    assert kv.find_prefix(second).num_tokens == 0
    retire(kv, first)
    assert kv.find_prefix(second).num_tokens == 8  # the tail is not shared while it grows


def test_what_did_not_retire_is_not_cached_on_free():
    kv = make()
    request = make_request(list(range(9)))
    admit(kv, request)
    kv.take_copies()
    kv.free(request)
    assert compute(kv, list(range(9)), "again") == 0


def test_lru_evicts_the_oldest_chain_deepest_block_first():
    kv = make(num_blocks=6)
    old, new = [0] * 8 + [1], [2] * 8 + [3]
    compute(kv, old, "old")
    compute(kv, new, "new")
    assert kv.num_free_blocks == 6
    assert compute(kv, [4, 4, 4, 4], "a") == 0  # takes the tail of the oldest chain
    assert kv.stats.num_evictions == 1
    assert kv.find_prefix(make_request([*old, 9])).num_tokens == 8
    compute(kv, [5] * 8, "b")
    assert kv.find_prefix(make_request([*old, 9])).num_tokens == 0
    assert kv.find_prefix(make_request([*new, 9])).num_tokens == 9


def test_a_hit_makes_blocks_recently_used():
    kv = make(num_blocks=4)
    compute(kv, [0] * 8, "a")
    compute(kv, [1] * 8, "b")
    assert compute(kv, [0] * 8, "a again") == 7
    # "a again" copied its last block to one of b's, which was evicted
    assert kv.find_prefix(make_request([0] * 9)).num_tokens >= 7


def test_uncached_blocks_are_taken_before_cached_ones():
    kv = make(num_blocks=4)
    compute(kv, [0] * 8, "cached")
    request = make_request([1] * 8, "not written")
    admit(kv, request)
    kv.free(request)
    assert kv.num_free_blocks == 4
    compute(kv, [2] * 8, "next")
    assert kv.stats.num_evictions == 0
    assert kv.find_prefix(make_request([0] * 9)).num_tokens == 8


def test_a_child_outlives_its_parents_block():
    """Two requests compute the same block: the one that is cached may go, the chain stays."""
    kv = make(num_blocks=5)
    first = make_request([0, 0, 0, 0, 1, 1, 1, 1, 9], "first")
    second = make_request([0, 0, 0, 0, 2, 2, 2, 2, 9], "second")
    admit(kv, first, 4)
    admit(kv, second, 4)
    retire(kv, first)
    retire(kv, second)  # its block 0 is a duplicate
    kv.free(first)
    assert kv.allocate_slots(second, 5) is not None
    second.num_computed_tokens = 9
    retire(kv, second)
    hog = make_request([3] * 8, "hog")
    admit(kv, hog)  # evicts the first's block
    kv.check_integrity()
    assert kv.find_prefix(make_request([0, 0, 0, 0, 7])).num_tokens == 0
    kv.free(hog)
    kv.free(second)  # its duplicate takes the place of what was evicted
    kv.check_integrity()
    assert kv.find_prefix(make_request([0, 0, 0, 0, 2, 2, 2, 2, 9])).num_tokens == 8


def test_what_is_cached_of_a_long_prompt_counts_as_far_as_it_may_be_hashed():
    kv = make()
    compute(kv, list(range(16)))
    assert kv.estimate_cached(make_request(list(range(17))), 2) == 2 * BLOCK


def test_discarded_tokens_that_others_hold_stay_cached():
    kv = make()
    first, second = make_request(list(range(14)), "a"), make_request(list(range(14)), "b")
    admit(kv, first)
    retire(kv, first)
    admit(kv, second)
    retire(kv, second)
    del first.token_ids[6:]
    kv.free(first)
    kv.check_integrity()
    assert kv.find_prefix(make_request(list(range(14)))).num_tokens == 12
    kv.free(second)


def test_discarded_tokens_leave_the_cache():
    kv = make()
    request = make_request(list(range(14)))
    admit(kv, request)
    retire(kv, request)
    del request.token_ids[6:]
    kv.free(request)
    kv.check_integrity()
    assert kv.find_prefix(make_request(list(range(14)))).num_tokens == 6


def test_fork_shares_written_tokens_and_copies_on_write():
    kv = make()
    parent = make_request(list(range(10)), "parent")
    admit(kv, parent)
    retire(kv, parent)
    children = [make_request(list(range(10)), f"child {i}") for i in range(2)]
    for child in children:
        assert kv.fork(parent, child) == 9
        assert child.block_table == parent.block_table
    assert kv.usage == 3 / 16
    for child in children:
        assert kv.allocate_slots(child, 1) == []
        child.num_computed_tokens = 10
    copies = kv.take_copies()
    assert copies == [BlockCopy(2, 3), BlockCopy(2, 4)]
    assert [child.block_table for child in children] == [[0, 1, 3], [0, 1, 4]]
    kv.free(parent)
    kv.check_integrity()
    kv.release_copies(copies)
    for child in children:
        kv.free(child)
    assert kv.num_free_blocks == 16
    kv.check_integrity()


def test_fork_shares_only_what_is_written_and_common():
    kv = make()
    parent = make_request(list(range(10)), "parent")
    admit(kv, parent, 6)
    assert kv.fork(parent, make_request(list(range(10)), "unwritten")) == 0
    retire(kv, parent)
    assert kv.fork(parent, make_request(list(range(10)), "part")) == 6
    assert kv.fork(parent, make_request([0, 1, 2, 9, 9], "common")) == 3
    kv.check_integrity()


def test_a_fork_with_another_salt_shares_nothing_then_or_later():
    kv = make()
    parent = make_request(list(range(10)), "parent")
    admit(kv, parent)
    retire(kv, parent)
    salted = make_request([*range(8), 77], "salted", salt="s")
    assert kv.fork(parent, salted) == 0
    assert kv.allocate_slots(salted, 9) is not None
    salted.num_computed_tokens = 9
    retire(kv, salted)
    kv.free(salted)
    kv.check_integrity()
    assert kv.find_prefix(make_request([*range(8), 77, 1])).num_tokens == 8
    assert kv.find_prefix(make_request([*range(8), 77, 1], salt="s")).num_tokens == 9


def test_the_last_of_the_sharers_writes_in_place_when_nothing_is_cached():
    kv = make(enable_prefix_caching=False)
    parent = make_request(list(range(6)), "parent")
    admit(kv, parent)
    retire(kv, parent)
    child = make_request(list(range(6)), "child")
    assert kv.fork(parent, child) == 5
    kv.free(parent)
    assert kv.allocate_slots(child, 1) == []
    assert kv.take_copies() == []
    assert child.block_table == [0, 1]
    kv.check_integrity()


def test_caching_off_shares_nothing():
    kv = make(enable_prefix_caching=False)
    assert compute(kv, list(range(12))) == 0
    assert compute(kv, list(range(12))) == 0
    assert kv.stats.num_evictions == 0
    assert all(block.node is None for block in kv._pool.blocks)


def test_an_empty_cache_keeps_no_nodes():
    kv = make(num_blocks=3)
    for i in range(20):
        compute(kv, [i] * 9, salt=str(i))
    assert len(kv._cache._roots) == len(kv._cache._salts) == 1
    assert len(kv._cache._index) == 2


def test_gates_go_with_what_lies_behind_them():
    config = CacheConfig(num_blocks=3, block_size=BLOCK)
    kv = KVCacheManager(config, public_prefixes=[[7] * BLOCK])
    for i in range(20):
        request = make_request([7] * BLOCK + [i] * 5, salt=str(i))
        request.shares_public_prefixes = True
        kv.recognise(request)
        admit(kv, request)
        retire(kv, request)
        kv.free(request)
    assert len(kv._cache._salts) == 2  # the root, and the gate of the last


def test_tokens_of_an_answer_are_not_public():
    config = CacheConfig(num_blocks=3, block_size=BLOCK)
    kv = KVCacheManager(config, public_prefixes=[[7] * BLOCK])
    request = make_request([7] * 3)
    request.shares_public_prefixes = True
    request.token_ids += [7, 7]
    kv.recognise(request)
    assert request.num_public_blocks == 0


def test_a_lent_block_returns_only_if_nobody_else_holds_it():
    pool = BlockPool(2, lambda node: None)
    block = pool.allocate()
    pool.touch(block)
    pool.lend(block)
    assert not pool.has_returning
    pool.release(block)
    assert pool.has_returning


def test_a_look_up_that_goes_on_leaves_out_what_was_evicted_meanwhile():
    kv = KVCacheManager(CacheConfig(num_blocks=12, block_size=BLOCK))
    compute(kv, list(range(40)))
    request = make_request(list(range(41)))
    assert kv.find_prefix(request, 6) is None
    compute(kv, list(range(100, 132)))  # takes the oldest blocks, deepest first
    whole = kv.find_prefix(make_request(list(range(41))))
    assert 0 < whole.num_tokens < 6 * BLOCK
    assert kv.find_prefix(request) == whole
    kv.check_integrity()


def test_who_needs_every_row_of_its_prompt_has_nothing_cached():
    kv = make()
    compute(kv, [1] * 12)
    request = make_request([1] * 12, "s")
    assert kv.estimate_cached(request, 9) == 11
    request.prompt_logprobs = []
    assert kv.estimate_cached(request, 9) == 0
    assert kv.find_prefix(request).num_tokens == 0
