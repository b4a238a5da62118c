"""KV accounting: who holds which block, what is cached, what must be copied. Integers only."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from streamserve.config import CacheConfig
from streamserve.core.block_pool import BlockPool, KVCacheBlock, PrefixNode
from streamserve.core.host_tier import HostTier
from streamserve.core.plan import BlockCopy, SchedulerOutput
from streamserve.core.prefix_cache import NO_MATCH, PrefixCache, PrefixMatch, num_common_tokens
from streamserve.core.request import Request
from streamserve.core.request_states import RequestStates
from streamserve.core.state_slots import place_to_keep


@dataclass(slots=True)
class KVCacheStats:
    """Counters since the start; tokens are those of requests when they were admitted.

    ``num_host_hit_tokens`` were copied back from host memory for a request that waited.
    """

    num_queried_tokens: int = 0
    num_hit_tokens: int = 0
    num_host_hit_tokens: int = 0
    num_stored_tokens: int = 0
    num_evictions: int = 0
    num_block_copies: int = 0
    num_state_evictions: int = 0


class _Holding:
    """What a request with blocks holds besides ``Request.block_table``.

    ``nodes[0]`` is its root and ``nodes[i + 1]`` what block ``i`` is cached as, or another block
    with the same content; the last one is pinned. Empty when prefix caching is off.

        block_table   [ 0 | 1 | 2 | 3 | 4 ]
                       shared ^   ^ own          num_shared_blocks = 2
        nodes     root, 0 , 1 , 2                blocks 3 and 4 are not (all) written yet
    """

    __slots__ = ("nodes", "num_shared_blocks", "request")

    def __init__(self, request: Request, nodes: list[PrefixNode], num_shared_blocks: int) -> None:
        self.request = request
        self.nodes = nodes
        self.num_shared_blocks = num_shared_blocks


class KVCacheManager:
    """Gives blocks to requests, or says ``None``. Never touches a tensor, never raises for room.

    A block is written by one request only: the one that allocated it. A request that shares a
    block (by a prefix hit or a fork) copies it before it writes. The owner of a forked tail may
    go on writing: it only appends behind what the others share.

    ``secret`` keys the block hashes (random when ``None``), so that nobody can craft collisions.
    The full blocks of ``public_prefixes`` are shared across salts by requests that say so.
    """

    def __init__(
        self,
        config: CacheConfig,
        *,
        secret: bytes | None = None,
        public_prefixes: Sequence[list[int]] = (),
    ) -> None:
        self.block_size = config.block_size
        self.num_blocks = config.num_blocks
        num_slots = config.num_state_slots
        self._states = RequestStates(num_slots, config.block_size) if num_slots else None
        keeps_states = self._states is not None
        self._cache = PrefixCache(
            config.block_size, secret, public_prefixes, keeps_states=keeps_states
        )
        self._pool = BlockPool(config.num_blocks, self._evict)
        self._host = HostTier(config, self._cache, self._pool) if config.num_host_blocks else None
        self._caching = config.enable_prefix_caching
        self._holdings: dict[str, _Holding] = {}
        self._copies: list[BlockCopy] = []  # for the plan that is being made
        self._stats = KVCacheStats()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds, cached or not."""
        return self._pool.num_free_blocks

    @property
    def keeps_states(self) -> bool:
        """Whether requests need a slot for a state, too."""
        return self._states is not None

    @property
    def has_state_slot(self) -> bool:
        """Whether one more request could have a slot for its state, where it needs one."""
        return self._states is None or self._states.slots.has_room

    @property
    def num_kept_states(self) -> int:
        """States that are kept for whoever has their prefix."""
        return 0 if self._states is None else self._states.slots.num_kept

    @property
    def num_spare_states(self) -> int:
        """Drafts that steps may have while those who run now do: each takes a slot for a state."""
        return sys.maxsize if self._states is None else self._states.num_spare

    @property
    def usage(self) -> float:
        """Share of the blocks that are held, 0 to 1."""
        return 1.0 - self._pool.num_free_blocks / self.num_blocks

    @property
    def stats(self) -> KVCacheStats:
        """The counters now. Not a copy."""
        self._stats.num_evictions = self._pool.num_evictions
        if self._states is not None:
            self._stats.num_state_evictions = self._states.slots.num_evictions
        if self._host is not None:
            self._stats.num_host_hit_tokens = self._host.num_loaded_tokens
            self._stats.num_stored_tokens = self._host.num_stored_tokens
        return self._stats

    @property
    def host_usage(self) -> float:
        """Share of the host blocks that hold something, 0 to 1; 0 when there are none."""
        return 0.0 if self._host is None else self._host.usage

    @property
    def has_returning_blocks(self) -> bool:
        """Whether blocks become free when the steps that copy them retire."""
        return self._pool.has_returning

    @property
    def has_loads(self) -> bool:
        """Whether the plan being made must be launched for the sake of what it loads."""
        return self._host is not None and self._host.has_loads

    def recognise(self, request: Request) -> None:
        """Note how much of a new request's prompt is public. Comes before everything else."""
        self._cache.recognise(request)

    def find_prefix(
        self,
        request: Request,
        max_num_hashed: int | None = None,
        num_reserved_blocks: int = 0,
    ) -> PrefixMatch | None:
        """The longest cached prefix of a request without blocks; takes nothing for it.

        There is none for a request that needs its prompt's rows: every one is computed.

        ``None``: ask again. It was not found yet in ``max_num_hashed`` more blocks, or the plan
        being made, or one in flight, brings a part of it back from host memory. That happens
        where the request has room to be admitted, ``num_reserved_blocks`` left over, and in one
        step without ``max_num_hashed``.
        """
        assert not request.block_table
        if request.needs_prompt_rows:
            return NO_MATCH
        match = self._cache.match(request, max_num_hashed) if self._caching else NO_MATCH
        if match is None or self._host is None:
            return match
        return self._host.bring_back(
            request, match, num_reserved_blocks, is_alone=max_num_hashed is None
        )

    def estimate_cached(self, request: Request, max_num_hashed: int) -> int:
        """Tokens of a request without blocks that are cached now, on the device or the host.

        By its turn, it may be others. Of a prompt with more cached blocks than may be hashed, only
        those hashed count.
        """
        if request.needs_prompt_rows:
            return 0
        match = self._cache.match(request, max_num_hashed) if self._caching else NO_MATCH
        if match is None:
            return len(request.block_hashes) * self.block_size
        return match.num_tokens

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        match: PrefixMatch | None = None,
        *,
        num_reserved_blocks: int = 0,
    ) -> list[int] | None:
        """Room for the tokens after ``num_computed_tokens``; the block ids that were appended.

        ``match`` admits a request that holds nothing: its blocks come first, the request's
        counters start behind them, and the answer is ``None`` unless *all* the request's known
        tokens would fit now with ``num_reserved_blocks`` left over. They are not all taken: the
        look-ahead only keeps a request out that would soon be preempted.

        Copies that the step must do first are collected for ``take_copies``. ``None`` means that
        there is no room; nothing has changed then.
        """
        if match is not None:
            return self._admit(request, num_new_tokens, match, num_reserved_blocks)
        table = request.block_table
        start = request.num_computed_tokens
        num_new_blocks = -(-(start + num_new_tokens) // self.block_size) - len(table)
        shared = self._shared_tail(request) if not request.is_in_runner else None
        if num_new_blocks <= 0 and shared is None:
            return []
        if max(num_new_blocks, 0) + (shared is not None) > self._pool.num_free_blocks:
            return None
        if shared is not None:
            # The request's reference becomes the copy's. Nobody has seen this table yet.
            index = start // self.block_size
            table[index] = self._copy(shared)
            self._holdings[request.request_id].num_shared_blocks = index
            request.num_written_tokens = index * self.block_size  # until the copy is done
        return self._append_blocks(table, num_new_blocks)

    def _admit(
        self, request: Request, num_new_tokens: int, match: PrefixMatch, num_reserved_blocks: int
    ) -> list[int] | None:
        assert request.request_id not in self._holdings
        matched = [node.block for node in match.nodes if node.block is not None]
        assert len(matched) == len(match.nodes)
        source = None if match.partial is None else match.partial.block
        num_all = -(-request.num_tokens // self.block_size) - len(matched)
        num_free = self._pool.num_free_blocks - sum(block.ref_cnt == 0 for block in matched)
        if source is not None and source.ref_cnt == 0:
            num_free -= 1
        if self._host is not None:
            num_free -= self._host.num_promised(request)
        if num_all + num_reserved_blocks > num_free:
            return None
        if not self.has_state_slot:
            return None

        nodes = [self._cache.root_of(request), *match.nodes] if self._caching else []
        if nodes:
            self._cache.pin(nodes[-1])
        holding = _Holding(request, nodes, len(matched))
        self._holdings[request.request_id] = holding
        if self._states is not None:
            at_end = place_to_keep(request.num_tokens, self.block_size)
            places = {at_end, match.num_parted} if self._caching else set()
            places = {place for place in places if place > match.num_tokens}
            self._states.begin(request, match.source, sorted(places))
        request.matched_nodes = []  # a tree's nodes should not outlive their place in it
        table = request.block_table
        self._pool.touch_all(matched)
        table.extend([block.block_id for block in matched])
        if source is not None:
            self._pool.touch(source)
            table.append(self._copy(source))
        request.num_computed_tokens = match.num_tokens
        request.num_written_tokens = len(matched) * self.block_size
        self._stats.num_queried_tokens += request.num_tokens
        self._stats.num_hit_tokens += match.num_tokens
        if self._host is not None:
            self._host.use(match.nodes)
        end = match.num_tokens + num_new_tokens
        self._append_blocks(table, -(-end // self.block_size) - len(table))
        return list(table)

    def fork(self, parent: Request, child: Request) -> int:
        """Let ``child``, which holds nothing, share the parent's written tokens; returns how many.

        At least one of the child's tokens is left to compute. A block that is shared in part is
        copied when the child first writes.
        """
        assert not child.block_table
        assert self._states is None, "a state that has gone on cannot be shared"
        holding = self._holdings[parent.request_id]
        limit = min(parent.num_written_tokens, parent.num_tokens, child.num_tokens - 1)
        num_tokens = num_common_tokens(parent.token_ids, child.token_ids, limit)
        nodes = holding.nodes[: num_tokens // self.block_size + 1]
        if (parent.cache_salt, parent.num_public_blocks) != (
            child.cache_salt,
            child.num_public_blocks,
        ):
            num_tokens = 0
            nodes = [self._cache.root_of(child)] if self._caching else []
        num_blocks = -(-num_tokens // self.block_size)
        child.block_hashes += parent.block_hashes[
            len(child.block_hashes) : num_tokens // self.block_size
        ]
        if nodes:
            self._cache.pin(nodes[-1])
        self._holdings[child.request_id] = _Holding(child, nodes, num_blocks)
        for block_id in parent.block_table[:num_blocks]:
            self._pool.touch(self._pool.blocks[block_id])
            child.block_table.append(block_id)
        child.num_computed_tokens = child.num_written_tokens = num_tokens
        return num_tokens

    def cache_blocks(self, request: Request) -> None:
        """Index the request's full blocks whose tokens are known and whose steps have retired."""
        if not self._caching:
            return
        holding = self._holdings[request.request_id]
        nodes, size = holding.nodes, self.block_size
        num_full = min(request.num_written_tokens, request.num_tokens) // size
        if len(nodes) > num_full:
            return
        self._cache.hash_blocks(request, num_full + 1)  # the next one is what it claims
        deepest = nodes[-1]
        first = len(nodes)
        for i in range(first - 1, num_full):
            token_ids = request.token_ids[i * size : (i + 1) * size]
            block = self._pool.blocks[request.block_table[i]]
            parent = self._cache.parent(request, i, nodes[-1])
            nodes.append(self._cache.insert(parent, token_ids, request.block_hashes[i], block))
        self._cache.pin(nodes[-1])
        self._cache.unpin(deepest)
        if self._host is not None:
            self._host.use(nodes[first:])
        if self._states is not None:
            self._states.cached(request, nodes)

    def free(self, request: Request) -> None:
        """Give all blocks back, deepest first; what was written and is known stays cached.

        Tokens past ``request.token_ids`` (discarded by a late stop) leave the cache.
        """
        holding, last = self._holdings[request.request_id], None
        if self._caching:
            self.cache_blocks(request)
            last = self._leave_cached(holding)
        if self._states is not None:
            self._states.leave(request, last)
        del self._holdings[request.request_id]
        table = request.block_table
        self._pool.release_all(table)
        table.clear()
        request.num_computed_tokens = request.num_written_tokens = 0

    def _leave_cached(self, holding: _Holding) -> PrefixNode | None:
        """Make the cache show exactly the tokens that are written and known, tail included.

        Returns the node that ends with them; ``None``: there is none.
        """
        request, nodes, size = holding.request, holding.nodes, self.block_size
        blocks = [self._pool.blocks[block_id] for block_id in request.block_table]
        num_known = min(request.num_written_tokens, request.num_tokens)
        num_full, num_tail = divmod(num_known, size)
        deepest = nodes[-1]
        self._cache.pin(nodes[num_full])
        for node, block in zip(nodes[1:], blocks, strict=False):
            if node.block is None:  # the block that had this content is gone
                self._cache.adopt(node, block)
        for node, block in zip(nodes[num_full + 1 :], blocks[num_full:], strict=False):
            if block.node is node and block.ref_cnt == 1:
                self._discard(node)
        last: PrefixNode | None = nodes[num_full] if num_full else None
        if num_tail:
            last = None
            if num_full >= holding.num_shared_blocks and blocks[num_full].node is None:
                token_ids = request.token_ids[num_full * size : num_known]
                parent = self._cache.parent(request, num_full, nodes[num_full])
                last = self._cache.insert_tail(parent, token_ids, blocks[num_full])
        if self._host is not None:
            self._host.use(nodes[1 : num_full + 1])
        self._cache.unpin(nodes[num_full])
        self._cache.unpin(deepest)
        return last

    def _discard(self, node: PrefixNode) -> None:
        """Let nobody find the node's content, which is in a block of one holder."""
        if self._states is not None:
            self._states.slots.forget(node)
        if self._host is None:
            self._cache.detach(node)
        else:
            self._host.discard(node)

    def _evict(self, node: PrefixNode) -> None:
        """The node's block is taken for something else."""
        if self._states is not None:
            self._states.slots.forget(node)
        if self._host is None:
            self._cache.detach(node)
        else:
            self._host.evict(node)

    def want_state(self, request: Request, num_tokens: int) -> None:
        """Others have so much of what the request is about to compute: keep its state there."""
        if self._states is not None and self._caching:
            self._states.want(request, num_tokens // self.block_size * self.block_size)

    def room_for_drafts(self, request: Request) -> int:
        """How many of a request's drafts find a slot, in the plan being made, for the state before
        them.
        """
        return sys.maxsize if self._states is None else self._states.room_for_drafts(request)

    def keep_drafted(self, request: Request, num_drafts: int) -> None:
        """The plan being made has so many drafts of a request, for which there is room."""
        if self._states is not None:
            self._states.keep_drafted(request, num_drafts)

    def settle_drafts(self, request: Request) -> None:
        """The step with a request's drafts has retired: what is right of it, is computed."""
        if self._states is not None:
            self._states.settle(request)

    def complete(self, plan: SchedulerOutput, requests: Sequence[Request]) -> None:
        """Write what was planned beside the forward into a plan that will be launched.

        ``requests`` are those of ``plan.scheduled``.
        """
        plan.block_copies.extend(self.take_copies())
        if self._states is not None:
            self._states.complete(plan, requests)
        if self._host is not None:
            self._host.fill(plan)

    def retire(self, plan: SchedulerOutput, *, failed: bool = False) -> None:
        """The plan's step is done, or has failed: nothing reads or writes its blocks any more."""
        self.release_copies(plan.block_copies)
        if self._host is not None:
            self._host.retire(plan.step_id, failed=failed)

    def take_copies(self) -> list[BlockCopy]:
        """The copies that the plan being made must do; their sources stay referenced."""
        copies, self._copies = self._copies, []
        return copies

    def release_copies(self, copies: Iterable[BlockCopy]) -> None:
        """The step that did ``copies`` has retired: nothing reads their sources any more."""
        for copy in copies:
            self._pool.take_back(self._pool.blocks[copy.src])

    def check_integrity(self) -> None:
        """Assert every invariant of blocks, references and the prefix tree. O(blocks)."""
        num_held = [0] * self.num_blocks
        pins: dict[PrefixNode, int] = {}
        for holding in self._holdings.values():
            self._check_holding(holding)
            for block_id in holding.request.block_table:
                num_held[block_id] += 1
            if holding.nodes:
                pins[holding.nodes[-1]] = pins.get(holding.nodes[-1], 0) + 1
        self._pool.check_integrity(num_held)
        self._cache.check_integrity(pins)
        if self._host is not None:
            self._host.check_integrity(self._cache.nodes())
        if self._states is not None:
            self._states.check_integrity(list(self._cache.nodes()))

    def _check_holding(self, holding: _Holding) -> None:
        request, size = holding.request, self.block_size
        assert len(set(request.block_table)) == len(request.block_table), f"{request}: block twice"
        assert request.num_computed_tokens <= len(request.block_table) * size, f"{request}: room"
        assert request.num_written_tokens <= request.num_computed_tokens, f"{request}: written"
        assert len(holding.nodes) <= request.num_written_tokens // size + 1, f"{request}: cached"
        if holding.nodes:
            assert holding.nodes[0] is self._cache.root_of(request), f"{request}: root"
        for i, block_id in enumerate(request.block_table):
            block = self._pool.blocks[block_id]
            if block.node is not None and i >= holding.num_shared_blocks:
                assert i + 1 < len(holding.nodes), (
                    f"{request}: {block} is cached and may be written"
                )
                assert block.node is holding.nodes[i + 1], f"{request}: {block} cached as another's"

    def _append_blocks(self, table: list[int], num_blocks: int) -> list[int]:
        block_ids = [self._pool.allocate().block_id for _ in range(num_blocks)]
        table.extend(block_ids)
        return block_ids

    def _shared_tail(self, request: Request) -> KVCacheBlock | None:
        """The block that the next token goes into, if others read it too."""
        index, offset = divmod(request.num_computed_tokens, self.block_size)
        holding = self._holdings[request.request_id]
        if not offset or index >= holding.num_shared_blocks:
            return None
        block = self._pool.blocks[request.block_table[index]]
        if block.ref_cnt == 1 and block.node is None:
            holding.num_shared_blocks = index  # everybody else has left: it is the request's own
            return None
        return block

    def _copy(self, source: KVCacheBlock) -> int:
        """Plan a copy into a new block. One reference to ``source`` becomes the copy's."""
        block_id = self._pool.allocate().block_id
        self._copies.append(BlockCopy(source.block_id, block_id))
        self._pool.lend(source)
        self._stats.num_block_copies += 1
        return block_id
