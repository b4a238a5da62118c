"""Host memory behind the device's KV cache: what the LRU evicts comes back by a copy.

A node of the prefix tree has its content in a device block, in a host block, or in both; a hit
compares tokens and parent wherever the content lies.

    computed ──full, its step retired──> stored ──> on both ──the device's LRU──> on the host only
                                                      ^                                   │
                                                      └── loaded, for a request that waits <┘

**Blocks are stored when they are full, not when they are evicted** (so do vLLM's offloading
connector and SGLang's HiCache, "write-through"). Eviction then costs nothing, at the very moment
when somebody needs the block: written back then, the step that takes it would have to wait for the
copy, and a preempted request's blocks are taken in the same breath as they are given back. The
price is that each full block crosses the bus once whether it is ever asked for or not: for an 8B
model 128 KiB a token, 8 MB in a step of 64 streams, a fifth of a millisecond of the bus and none of
the compute.

**Blocks are loaded before the request is admitted**, into blocks of the device that the step
carrying them holds, together with what the device has of that prefix. The request waits for that
step to retire and is then an ordinary hit, and so is everybody else who waits for the same prefix:
it is loaded once. So no forward ever reads what its own step copies; copies need no order among
the kernels and delay nobody's tokens, however long the prefix. Loading in the step that admits
would be a step or two sooner for one and put the copy in front of everybody else's next token.
When nothing else runs, a step carries loads alone, as many as there are.

Both directions are bounded per step (``max_transfers_per_step``), since the step's result waits for
its copies. What could not be stored before its block was taken is lost, and computed again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from streamserve.config import CacheConfig
from streamserve.core.block_pool import BlockPool, KVCacheBlock, PrefixNode
from streamserve.core.plan import BlockTransfer, SchedulerOutput
from streamserve.core.prefix_cache import PrefixCache, PrefixMatch
from streamserve.core.request import Request


class _Transfers:
    """What one step carries. Device blocks in ``held`` are lent to it, shallowest first."""

    __slots__ = ("held", "loads", "request_ids", "stores")

    def __init__(self) -> None:
        self.stores: list[tuple[PrefixNode, KVCacheBlock]] = []
        self.loads: list[tuple[PrefixNode, KVCacheBlock]] = []
        self.held: list[KVCacheBlock] = []
        self.request_ids: list[str] = []  # who waits for the loads

    @property
    def nodes(self) -> list[PrefixNode]:
        """Whose host blocks are being read or written."""
        return [node for node, _ in (*self.stores, *self.loads)]


class HostTier:
    """Host blocks by their content. Integers only: the copies are part of the plan.

    A host block is *busy* while a step in flight stores or loads it: it is then out of the LRU list
    and nothing else is put there.
    """

    def __init__(self, config: CacheConfig, cache: PrefixCache, pool: BlockPool) -> None:
        self.num_blocks = config.num_host_blocks
        self.num_stored_tokens = 0
        self.num_loaded_tokens = 0
        self._block_size = config.block_size
        self._max_per_step = config.max_transfers_per_step
        self._cache = cache
        self._pool = pool
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._lru: OrderedDict[PrefixNode, None] = OrderedDict()
        self._unstored: OrderedDict[PrefixNode, None] = OrderedDict()  # on the device only
        self._loading: dict[PrefixNode, KVCacheBlock] = {}
        self._promised: dict[str, int] = {}  # request id -> device blocks it needs besides
        self._next = _Transfers()  # of the plan that is being made
        self._in_flight: dict[int, _Transfers] = {}  # by step id

    @property
    def usage(self) -> float:
        """Share of the host blocks that hold something, 0 to 1."""
        return (self.num_blocks - len(self._free)) / self.num_blocks

    @property
    def has_loads(self) -> bool:
        """Whether the plan being made must be launched, be there nothing else in it."""
        return bool(self._next.loads)

    def use(self, nodes: list[PrefixNode]) -> None:
        """A request has written or hit these nodes of one path: store what is not, keep the rest.

        The deepest becomes the least recently used of them: a child is of no use without parents.
        """
        for node in reversed(nodes):
            if node in self._lru:
                self._lru.move_to_end(node)
        for node in nodes:
            if node.host_block_id is None and node.block is not None:
                self._unstored[node] = None

    def evict(self, node: PrefixNode) -> None:
        """The node's device block is taken for something else."""
        self._unstored.pop(node, None)
        self._cache.detach(node)

    def discard(self, node: PrefixNode) -> None:
        """The node's content is not to be found any more, where nobody is copying it."""
        if node in self._lru:
            self._forget(node)
        self.evict(node)

    def num_promised(self, request: Request) -> int:
        """Device blocks that others, whose prefix is being loaded, will need to be admitted."""
        if not self._promised:
            return 0
        return sum(self._promised.values()) - self._promised.get(request.request_id, 0)

    def bring_back(
        self, request: Request, match: PrefixMatch, num_reserved_blocks: int, *, is_alone: bool
    ) -> PrefixMatch | None:
        """The match when all of it is on the device; ``None``: it is being loaded, ask again.

        Loads nothing unless the request could be admitted with it, ``num_reserved_blocks`` left
        over; then the answer is what the device has. ``is_alone``: no step runs that would be
        delayed, so load everything at once.
        """
        nodes = match.nodes
        num_loaded = next((i for i, node in enumerate(nodes) if node.block is None), len(nodes))
        if num_loaded == len(nodes):
            return match
        blocks = [node.block or self._loading.get(node) for node in nodes]
        missing = [node for node, block in zip(nodes, blocks, strict=True) if block is None]
        present = [block for block in blocks if block is not None]
        num_needed = -(-request.num_tokens // self._block_size) - len(present)
        num_free = self._pool.num_free_blocks - sum(block.ref_cnt == 0 for block in present)
        if num_needed + num_reserved_blocks > num_free - self.num_promised(request):
            return match.cut(num_loaded, self._block_size)
        if not is_alone:
            del missing[max(self._max_per_step - len(self._next.loads), 0) :]
        if missing:
            self._promised[request.request_id] = num_needed - len(missing)
            self._next.request_ids.append(request.request_id)
            self._load(missing, present)
            self.use(nodes)
        return None

    def _load(self, missing: list[PrefixNode], present: list[KVCacheBlock]) -> None:
        """Plan the loads of ``missing``, and hold what leads there until they are done."""
        for block in present:
            self._pool.touch(block)
            self._hold(block)
        for node in missing:
            block = self._pool.allocate()
            self._hold(block)
            self._next.loads.append((node, block))
            self._loading[node] = block
            del self._lru[node]
        self.num_loaded_tokens += len(missing) * self._block_size

    def _hold(self, block: KVCacheBlock) -> None:
        self._pool.lend(block)
        self._next.held.append(block)

    def fill(self, plan: SchedulerOutput) -> None:
        """Write the loads, and as many stores as a step may carry, into a plan to be launched."""
        transfers = self._next
        while self._unstored and len(transfers.stores) < self._max_per_step:
            host_block_id = self._allocate()
            if host_block_id is None:
                break
            node, _ = self._unstored.popitem(last=False)
            assert node.block is not None
            node.host_block_id = host_block_id
            self._pool.touch(node.block)
            self._hold(node.block)
            transfers.stores.append((node, node.block))
        if transfers.stores or transfers.loads:
            plan.stores.extend(map(_transfer, transfers.stores))
            plan.loads.extend(map(_transfer, transfers.loads))
            self._in_flight[plan.step_id] = transfers
            self._next = _Transfers()

    def _allocate(self) -> int | None:
        """A host block for new content, the least recently used one's if need be."""
        if not self._free and self._lru:
            self._forget(next(iter(self._lru)))
        return self._free.pop() if self._free else None

    def _forget(self, node: PrefixNode) -> None:
        self._lru.pop(node, None)
        assert node.host_block_id is not None
        self._free.append(node.host_block_id)
        node.host_block_id = None
        self._cache.prune(node)

    def retire(self, step_id: int, *, failed: bool) -> None:
        """A step is done. What one that failed has copied is neither here nor there."""
        transfers = self._in_flight.pop(step_id, None)
        if transfers is None:
            return
        for node, block in reversed(transfers.loads):
            del self._loading[node]
            if not failed:
                self._cache.adopt(node, block)
        for node in reversed(transfers.nodes):
            self._lru[node] = None
            if failed:
                self._forget(node)
        for block in reversed(transfers.held):
            self._pool.take_back(block)
        if not failed:
            self.num_stored_tokens += len(transfers.stores) * self._block_size
        for request_id in transfers.request_ids:
            if not any(request_id in other.request_ids for other in self._in_flight.values()):
                self._promised.pop(request_id, None)

    def check_integrity(self, nodes: Iterable[PrefixNode]) -> None:
        """Assert every invariant, given all nodes of the prefix tree. O(nodes)."""
        assert not self._next.nodes, "transfers of a plan that was not launched"
        busy = [node for transfers in self._in_flight.values() for node in transfers.nodes]
        stored = [*self._lru, *busy]
        found = {node for node in nodes if node.host_block_id is not None}
        assert found == set(stored), "host blocks and the prefix tree disagree"
        host_ids = [*self._free, *(node.host_block_id or 0 for node in stored)]
        assert sorted(host_ids) == list(range(self.num_blocks)), "host blocks"
        for node in self._unstored:
            assert node.host_block_id is None, "stored twice"
            assert node.block is not None, "nothing to store"
        waiting_ids = {i for t in self._in_flight.values() for i in t.request_ids}
        assert self._promised.keys() == waiting_ids, "promised to nobody"
        num_lent = Counter(b.block_id for t in self._in_flight.values() for b in t.held)
        for transfers in self._in_flight.values():
            for node, block in transfers.stores:
                assert node.block is block, "evicted while it is stored"
            for node, block in transfers.loads:
                assert self._loading[node] is block
                assert block.node is None, "cached while it is loaded"
        assert num_lent <= Counter(self._pool.num_lent), "lent to no step"


def _transfer(pair: tuple[PrefixNode, KVCacheBlock]) -> BlockTransfer:
    node, block = pair
    assert node.host_block_id is not None
    return BlockTransfer(block.block_id, node.host_block_id)
