"""The prefix cache: which block holds the KV of which tokens after which tokens.

A tree per salt, one block of tokens per node. Full nodes are found in O(1) by a chained hash,
keyed with a per-process secret; a hit then compares the tokens and the parent, so even a
collision cannot serve another prompt's KV. Past the last full node the best partly matching child
is found by its first token.

    root(salt) ── [t0 … t15] ── [t16 … t31] ─┬─ [t32 … t47]      full: in the index by its hash
                                             └─ [t32 … t36]      tail: a child only

Prefixes that were declared public have a root of their own, for all who may share them. Behind the
last full block of one stands a gate for each salt, a node without tokens: what lies there is found
through its own gate only.

    root(public) ── [t0 … t15] ── [t16 … t31] ─┬─ gate(salt 1) ── [t32 … t47]
                                               └─ gate(salt 2) ── [t32 … t47]
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from streamserve.core.block_pool import KVCacheBlock, PrefixNode
from streamserve.core.request import Request

_GATE = -1  # in place of a first token
MAX_PARTIAL_CANDIDATES = 16  # children with the right first token that a look-up compares
_NUM_HASHED_AHEAD = 32  # blocks: one at a time costs a third more


class PrefixMatch(NamedTuple):
    """What is cached of a request: full nodes below its root, then a part of one more.

    A node may be in host memory only, where there is such a tier.
    The first ``num_partial_tokens`` of ``partial`` match; it is ``None`` when they are 0.
    ``missing_hash`` is the first full block of the request that is not cached, if there is one.

    Of a model that keeps states a match ends at ``source``, whose state is kept, and the blocks of
    ``num_parted`` tokens were found: others had as much of the prompt, and its state is not kept.
    """

    nodes: list[PrefixNode]
    partial: PrefixNode | None
    num_partial_tokens: int
    num_tokens: int
    missing_hash: bytes | None
    source: PrefixNode | None = None
    num_parted: int = 0

    def without_partial(self) -> PrefixMatch:
        """The full blocks only: what to fall back on when there is no room for a copy."""
        num_tokens = self.num_tokens - self.num_partial_tokens
        match = PrefixMatch(self.nodes, None, 0, num_tokens, self.missing_hash)
        return match if self.source is None else match.at_state(self.num_parted)

    def cut(self, num_nodes: int, block_size: int) -> PrefixMatch:
        """The first ``num_nodes`` full blocks only, fewer than there are."""
        missing_hash = self.nodes[num_nodes].block_hash
        return PrefixMatch(self.nodes[:num_nodes], None, 0, num_nodes * block_size, missing_hash)

    def at_state(self, num_parted: int | None = None) -> PrefixMatch:
        """As much of it as a state is kept behind."""
        if num_parted is None:
            num_parted = self.num_tokens - self.num_partial_tokens
        if self.partial is not None and self.partial.state_slot is not None:
            return self._replace(source=self.partial, num_parted=num_parted)
        num_nodes = len(self.nodes)
        while num_nodes and self.nodes[num_nodes - 1].state_slot is None:
            num_nodes -= 1
        nodes = self.nodes[:num_nodes]
        num_tokens = sum(len(node.token_ids) for node in nodes)
        source = nodes[-1] if nodes else None
        return PrefixMatch(nodes, None, 0, num_tokens, self.missing_hash, source, num_parted)


NO_MATCH = PrefixMatch([], None, 0, 0, None)


class PrefixCache:
    """Index of cached blocks by content. Knows nodes and their blocks, not reference counts."""

    def __init__(
        self,
        block_size: int,
        secret: bytes | None = None,
        public_prefixes: Sequence[list[int]] = (),
        *,
        keeps_states: bool = False,
    ) -> None:
        """``public_prefixes`` are shared across salts, as far as they fill blocks.

        With ``keeps_states`` a match ends where a state is kept.
        """
        self._keeps_states = keeps_states
        self._block_size = block_size
        whole = [ids[: len(ids) // block_size * block_size] for ids in public_prefixes]
        self._public = sorted(filter(None, whole), key=len, reverse=True)
        self._public_salt = secrets.token_hex(32)  # nobody else's
        key = secrets.token_bytes(32) if secret is None else secret
        self._root_hasher = blake2b(key=key, digest_size=16, person=b"root")
        self._block_hasher = blake2b(key=key, digest_size=16, person=b"block")
        self._gate_hasher = blake2b(key=key, digest_size=16, person=b"gate")
        self._roots: dict[str, PrefixNode] = {}
        self._salts: dict[PrefixNode, str] = {}  # of roots and gates
        self._index: dict[bytes, PrefixNode] = {}

    def recognise(self, request: Request) -> None:
        """Note how many leading blocks of a new request's prompt are public, for it to share."""
        if not self._public or not request.shares_public_prefixes:
            return
        token_ids, limit = request.token_ids, request.num_prompt_tokens
        for public in self._public:
            if len(public) <= limit and token_ids[: len(public)] == public:
                request.num_public_blocks = len(public) // self._block_size
                return

    def root_of(self, request: Request) -> PrefixNode:
        """The root of the path that a request's blocks are cached on; made when there is none."""
        return self.root(self._root_salt(request))

    def parent(self, request: Request, index: int, node: PrefixNode) -> PrefixNode:
        """Below which node a request's block goes that follows ``node``: maybe through a gate."""
        if not index or index != request.num_public_blocks:
            return node
        gate = self._find_gate(request, node)
        if gate is None:
            assert node.block_hash is not None
            gate = PrefixNode(node, [], self._gate_hash(node.block_hash, request.cache_salt))
            assert gate.block_hash is not None
            self._index[gate.block_hash] = gate
            self._salts[gate] = request.cache_salt
            _add_child(node, gate)
        return gate

    def _find_gate(self, request: Request, node: PrefixNode) -> PrefixNode | None:
        assert node.block_hash is not None
        gate = self._index.get(self._gate_hash(node.block_hash, request.cache_salt))
        return gate if gate is not None and gate.parent is node and not gate.token_ids else None

    def _root_salt(self, request: Request) -> str:
        return self._public_salt if request.num_public_blocks else request.cache_salt

    def root(self, salt: str) -> PrefixNode:
        """The root that requests with this salt share; made when there is none."""
        node = self._roots.get(salt)
        if node is None:
            node = PrefixNode(None, [], self._root_hash(salt))
            self._roots[salt] = node
            self._salts[node] = salt
        return node

    def hash_blocks(self, request: Request, num_blocks: int) -> None:
        """Extend ``request.block_hashes`` to its first ``num_blocks``, as far as they are full."""
        hashes, token_ids, size = request.block_hashes, request.token_ids, self._block_size
        num_blocks = min(num_blocks, len(token_ids) // size)
        if len(hashes) >= num_blocks:
            return
        block_hash = hashes[-1] if hashes else self._root_hash(self._root_salt(request))
        num_public = request.num_public_blocks
        data = array("q", token_ids[len(hashes) * size : num_blocks * size])
        block_bytes = size * data.itemsize
        raw = data.tobytes()
        for start in range(0, len(raw), block_bytes):
            if num_public and len(hashes) == num_public:
                block_hash = self._gate_hash(block_hash, request.cache_salt)
            block_hash = self._hash(block_hash, raw[start : start + block_bytes])
            hashes.append(block_hash)

    def match(self, request: Request, max_num_hashed: int | None = None) -> PrefixMatch | None:
        """The longest cached prefix that leaves at least one token to compute.

        Hashes no further than the first block that is not cached. ``None`` if that takes more than
        ``max_num_hashed`` blocks hashed and compared: the next call goes on where this one stopped.
        Mutates nothing but ``request.block_hashes`` and ``request.matched_nodes``. Raises nothing.
        """
        hashes, token_ids, size = request.block_hashes, request.token_ids, self._block_size
        limit = len(token_ids) - 1
        num_full = len(token_ids) // size
        nodes = request.matched_nodes = _still_cached(request.matched_nodes, limit // size)
        end = num_full if max_num_hashed is None else len(nodes) + max_num_hashed
        node = nodes[-1] if nodes else self._roots.get(self._root_salt(request))
        num_public = request.num_public_blocks
        missing_hash = None
        for i in range(len(nodes), num_full):
            if i >= end:
                return None
            if i >= len(hashes):
                self.hash_blocks(request, min(i + _NUM_HASHED_AHEAD, end))
            block_hash = hashes[i]
            if num_public and i == num_public and node is not None:
                node = self._find_gate(request, node)
            child = None if node is None else self._index.get(block_hash)
            if (
                child is None
                or (child.block is None and child.host_block_id is None)
                or child.parent is not node
                or child.token_ids != token_ids[i * size : (i + 1) * size]
            ):
                missing_hash = block_hash
                break
            if (i + 1) * size > limit:
                break
            nodes.append(child)
            node = child
        num_matched = len(nodes) * size
        if nodes and len(nodes) == num_public:
            node = self._find_gate(request, nodes[-1])
        partial, num_partial = None, 0
        if node is not None:
            rest = token_ids[num_matched : min(num_matched + size, limit)]
            partial, num_partial = self._best_child(node, rest, with_state=self._keeps_states)
        match = PrefixMatch(nodes, partial, num_partial, num_matched + num_partial, missing_hash)
        return match.at_state() if self._keeps_states else match

    def insert(
        self, parent: PrefixNode, token_ids: list[int], block_hash: bytes, block: KVCacheBlock
    ) -> PrefixNode:
        """Cache a full block; returns its content's node, which an older block may already hold."""
        # A request that shares the block has cached it already, maybe beside one of the same hash.
        node = block.node or self._index.get(block_hash)
        if node is None or node.parent is not parent or node.token_ids != token_ids:
            node = PrefixNode(parent, token_ids, block_hash)
            self._index.setdefault(block_hash, node)
            _add_child(parent, node)
        self.adopt(node, block)
        return node

    def adopt(self, node: PrefixNode, block: KVCacheBlock) -> None:
        """Let ``block``, which holds the node's content, stand for a node that has no block."""
        if node.block is None:
            assert block.node is None, f"{block} holds something else"
            node.block = block
            block.node = node

    def insert_tail(
        self, parent: PrefixNode, token_ids: list[int], block: KVCacheBlock
    ) -> PrefixNode | None:
        """Cache a block's first tokens, unless a child of ``parent`` starts with them already.

        Where states are kept, only one that has no more: a longer one's state is another. Returns
        the child with just these tokens, if there is one.
        """
        child, num_matching = self._best_child(parent, token_ids)
        if child is not None and num_matching == len(token_ids):
            if child.token_ids == token_ids:
                return child
            if not self._keeps_states:
                return None
        node = PrefixNode(parent, token_ids, None)
        _add_child(parent, node)
        self.adopt(node, block)
        return node

    def detach(self, node: PrefixNode) -> None:
        """Forget where the node's content lies: its block is taken for something else."""
        assert node.block is not None
        node.block.node = None
        node.block = None
        self.prune(node)

    def pin(self, node: PrefixNode) -> None:
        """Keep the path to ``node`` in the tree: a request will cache blocks below it."""
        node.num_pins += 1

    def unpin(self, node: PrefixNode) -> None:
        """Undo one ``pin``."""
        assert node.num_pins > 0
        node.num_pins -= 1
        self.prune(node)

    def prune(self, node: PrefixNode) -> None:
        """Remove a node that leads nowhere, and its ancestors for as long as the same is true."""
        while _is_nowhere(node) and not node.children and not node.num_pins:
            parent = node.parent
            if parent is None:
                del self._roots[self._salts.pop(node)]
                return
            if node.block_hash is not None and self._index.get(node.block_hash) is node:
                del self._index[node.block_hash]
            if not node.token_ids:
                del self._salts[node]
            siblings = parent.children[_place(node)]
            del siblings[node]
            if not siblings:
                del parent.children[_place(node)]
            node = parent

    def _best_child(
        self, node: PrefixNode, token_ids: list[int], *, with_state: bool = False
    ) -> tuple[PrefixNode | None, int]:
        """The child with a block that shares most leading tokens; of equals the newest.

        ``with_state``: only of those that are shared whole, and whose state is kept.
        """
        best, num_best = None, 0
        if token_ids and token_ids[0] in node.children:
            candidates = reversed(node.children[token_ids[0]])
            for child, _ in zip(candidates, range(MAX_PARTIAL_CANDIDATES), strict=False):
                if child.block is None:
                    continue
                num_common = num_common_tokens(child.token_ids, token_ids)
                if with_state and (child.state_slot is None or num_common < len(child.token_ids)):
                    continue
                if num_common > num_best:
                    best, num_best = child, num_common
                    if num_best == len(token_ids):
                        break
        return best, num_best

    def _root_hash(self, salt: str) -> bytes:
        hasher = self._root_hasher.copy()
        hasher.update(salt.encode("utf-8", "surrogatepass"))
        return hasher.digest()

    def _gate_hash(self, parent_hash: bytes, salt: str) -> bytes:
        hasher = self._gate_hasher.copy()
        hasher.update(parent_hash + salt.encode("utf-8", "surrogatepass"))
        return hasher.digest()

    def _hash(self, parent_hash: bytes, block: bytes) -> bytes:
        hasher = self._block_hasher.copy()
        hasher.update(parent_hash + block)
        return hasher.digest()

    def nodes(self) -> Iterator[PrefixNode]:
        """Every node there is, parents before their children."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            if node.children:
                for children in node.children.values():
                    stack.extend(children)

    def check_integrity(self, num_pins: Mapping[PrefixNode, int]) -> None:
        """Assert that every node is where it belongs, leads somewhere and has these pins."""
        index, indexed = self._index, 0
        for node in self.nodes():
            block, block_hash, children = node.block, node.block_hash, node.children
            assert node.num_pins == num_pins.get(node, 0), "pins and requests disagree"
            if block is not None:
                assert block.node is node, f"{block}: cached twice"
            else:
                alive = children or node.num_pins or node.host_block_id is not None
                assert alive, "a node that leads nowhere was kept"
            if block_hash is not None:
                indexed += index.get(block_hash) is node
            elif node.parent is not None:
                assert not children, "a tail cannot have children"
                assert block is not None, "a tail without a block was kept"
                assert node.host_block_id is None, "a tail in host memory"
                assert len(node.token_ids) < self._block_size, "a full block cached as a tail"
            if children:
                for first, under in children.items():
                    assert under, "an empty list of children was kept"
                    for child in under:
                        assert child.parent is node, "a node under a parent that is not its own"
                        assert _place(child) == first, "a node under another's first token"
        assert indexed == len(self._index), "the index holds a node that is not in the tree"


def _still_cached(nodes: list[PrefixNode], max_nodes: int) -> list[PrefixNode]:
    """Of a path that was found before, what can be found again: a node that is evicted stays so."""
    num_cached = min(len(nodes), max_nodes)
    for i, node in enumerate(nodes):
        if node.block is None and node.host_block_id is None:
            num_cached = min(i, num_cached)
            break
    return nodes[:num_cached]


def _is_nowhere(node: PrefixNode) -> bool:
    return node.block is None and node.host_block_id is None


def _place(node: PrefixNode) -> int:
    """What a node is found under among its parent's children."""
    return node.token_ids[0] if node.token_ids else _GATE


def _add_child(parent: PrefixNode, node: PrefixNode) -> None:
    parent.children.setdefault(_place(node), {})[node] = None


def num_common_tokens(a: list[int], b: list[int], limit: int | None = None) -> int:
    """Length of the longest common prefix, at most ``limit``."""
    num = min(len(a), len(b)) if limit is None else limit
    if a[:num] == b[:num]:
        return num
    return next(i for i in range(num) if a[i] != b[i])
