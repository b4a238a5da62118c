"""Fixed-size KV blocks as integers: reference counts and an LRU free list."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class PrefixNode:
    """One block's worth of cached tokens, below its parent: a node of the prefix tree.

    A node is named by its content (the path of tokens from its root), a block by its place in
    memory. ``block`` is where the content lies, ``None`` for a root and for a node whose block was
    evicted while something below it lives on, or while ``host_block_id`` says where in host memory
    the content is. ``block_hash`` chains the whole path; it is ``None`` for a tail, a node with
    fewer tokens than a block holds.
    """

    __slots__ = (
        "block",
        "block_hash",
        "children",
        "host_block_id",
        "num_pins",
        "parent",
        "state_slot",
        "token_ids",
    )

    def __init__(
        self, parent: PrefixNode | None, token_ids: list[int], block_hash: bytes | None
    ) -> None:
        self.parent = parent
        self.token_ids = token_ids
        self.block_hash = block_hash
        self.block: KVCacheBlock | None = None
        self.host_block_id: int | None = None  # the host tier's, of full nodes only
        # first token -> children in the order they were cached (a dict: removal in O(1))
        self.children: dict[int, dict[PrefixNode, None]] = {}
        self.num_pins = 0  # requests whose deepest node this is
        self.state_slot: int | None = None  # where the state behind all of its tokens is kept


class KVCacheBlock:
    """One block. In the free list ⇔ ``ref_cnt == 0``; a free block may still be cached."""

    __slots__ = ("block_id", "node", "ref_cnt")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_cnt = 0
        self.node: PrefixNode | None = None  # what it is cached as

    @property
    def block_hash(self) -> bytes | None:
        """The chained hash that this block is found by, ``None`` while it is not full or cached."""
        return None if self.node is None else self.node.block_hash

    def __repr__(self) -> str:
        return (
            f"KVCacheBlock({self.block_id}, ref_cnt={self.ref_cnt}, cached={self.node is not None})"
        )


class BlockPool:
    """Every block there is. All operations are O(1) per block.

    The free list is least recently used first. A block that is freed uncached goes to its front:
    nothing is lost when it is taken. ``evict(node)`` is called before a cached block is taken for
    new content and must detach the node from the block.

    Some references are *lent* to a step: a copy's or a transfer's, until the step has retired.
    """

    def __init__(self, num_blocks: int, evict: Callable[[PrefixNode], None]) -> None:
        self.blocks = [KVCacheBlock(block_id) for block_id in range(num_blocks)]
        self.num_evictions = 0
        self._evict = evict
        self.num_lent: dict[int, int] = {}  # by block id, where there are any
        self._free: OrderedDict[int, KVCacheBlock] = OrderedDict(
            (block.block_id, block) for block in self.blocks
        )

    @property
    def num_free_blocks(self) -> int:
        """Blocks that ``allocate`` could hand out now, cached or not."""
        return len(self._free)

    def allocate(self) -> KVCacheBlock:
        """The least recently used free block, with one reference and cached no more."""
        _, block = self._free.popitem(last=False)
        assert block.ref_cnt == 0
        if block.node is not None:
            self.num_evictions += 1
            self._evict(block.node)
            assert block.node is None
        block.ref_cnt = 1
        return block

    def touch(self, block: KVCacheBlock) -> None:
        """Take one more reference."""
        self.touch_all([block])

    def release(self, block: KVCacheBlock) -> None:
        """Give one reference back; the last one makes the block free and most recently used."""
        self.release_all([block.block_id])

    def touch_all(self, blocks: list[KVCacheBlock]) -> None:
        """``touch`` each: a long prompt has thousands."""
        free = self._free
        for block in blocks:
            if block.ref_cnt == 0:
                del free[block.block_id]
            block.ref_cnt += 1

    def release_all(self, block_ids: list[int]) -> None:
        """``release`` each, the last one first."""
        all_blocks, free = self.blocks, self._free
        for block_id in reversed(block_ids):
            block = all_blocks[block_id]
            assert block.ref_cnt > 0, f"block {block_id} freed twice"
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                free[block_id] = block
                if block.node is None:
                    free.move_to_end(block_id, last=False)

    def lend(self, block: KVCacheBlock) -> None:
        """Let one of the references there are belong to a step, until ``take_back``."""
        num_lent = self.num_lent.get(block.block_id, 0) + 1
        assert num_lent <= block.ref_cnt, f"{block}: {num_lent} references are lent"
        self.num_lent[block.block_id] = num_lent

    def take_back(self, block: KVCacheBlock) -> None:
        """The step is done with a reference that it was lent: release it."""
        num_lent = self.num_lent[block.block_id] - 1
        if num_lent:
            self.num_lent[block.block_id] = num_lent
        else:
            del self.num_lent[block.block_id]
        self.release(block)

    @property
    def has_returning(self) -> bool:
        """Whether a block becomes free when the steps that use it retire. O(blocks lent)."""
        return any(self.blocks[i].ref_cnt == num for i, num in self.num_lent.items())

    def check_integrity(self, num_held: list[int]) -> None:
        """Assert that references are those lent and what ``num_held`` (by block id) says."""
        expected = num_held[:]
        for block_id, num_lent in self.num_lent.items():
            expected[block_id] += num_lent
        counts = [block.ref_cnt for block in self.blocks]
        assert counts == expected, f"references: {counts}, of which {expected} are held"
        unused = {block_id for block_id, count in enumerate(counts) if not count}
        assert self._free.keys() == unused, f"free list: {sorted(self._free.keys() ^ unused)}"
        for block in self.blocks:
            if (node := block.node) is not None:
                assert node.block is block, f"{block}: cached as a node that is elsewhere"
