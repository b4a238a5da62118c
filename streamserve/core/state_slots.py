"""Slots for states: what layers keep of a sequence besides its KV, in one place of constant size.

A request that runs has a slot of its own, which holds its state after all that was computed. A
state cannot be cut, as a block table can: a prefix is worth something only with the state that was
kept behind exactly its last token. So states are kept, in slots that nobody runs in, at few places:

    near a prompt's end    the next turn of a chat begins with nearly all of it
    where prompts part     a system prompt that others have had: where the first one goes on alone
    behind an answer       the slot of a request that ends; the next turn goes on from there

Each stands for a node of the prefix tree, whole, and is gone when that node's block is taken for
something else. The slot that was not used for longest is taken first.

A slot may be written by the very next step, whoever has it: steps run one after the other, and
copies come before everything else in a step.
"""

from __future__ import annotations

from collections import OrderedDict

from streamserve.core.block_pool import PrefixNode
from streamserve.core.plan import StateCopy

_LAST_TOKENS = 8
"""Of a prompt, that the next turn need not have: where the answer begins, or thoughts do."""

MOST_PLACES = 4
"""Of one prompt: a state may be as large as the KV of thousands of tokens."""


def place_to_keep(num_tokens: int, block_size: int) -> int:
    """Near the end of a prompt: whole blocks of it, at least `_LAST_TOKENS` before the end."""
    return max(num_tokens - _LAST_TOKENS, 0) // block_size * block_size


class StateSlots:
    """Who has which slot. Integers only; O(1) each."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_evictions = 0
        self._free = list(reversed(range(num_slots)))
        self._kept: OrderedDict[int, PrefixNode] = OrderedDict()  # least recently used first
        self._sources: dict[int, PrefixNode] = {}  # kept, and read by the plan that is being made
        self._copies: list[StateCopy] = []

    @property
    def num_kept(self) -> int:
        """States that are kept for whoever has their prefix."""
        return len(self._kept) + len(self._sources)

    @property
    def num_spare(self) -> int:
        """Slots that `take` would give, one after the other."""
        return len(self._free) + len(self._kept)

    @property
    def has_room(self) -> bool:
        """Whether one more request could run now."""
        return bool(self._free or self._kept)

    def begin(self, source: PrefixNode | None) -> int:
        """A slot for a request that starts from ``source``, or from nothing. There must be room.

        Where the source's slot is the last one that can be taken, the request goes on in it.
        """
        kept = None if source is None else source.state_slot
        if kept is not None and kept in self._kept and (self._free or len(self._kept) > 1):
            self._sources[kept] = self._kept.pop(kept)
        slot = self.take()
        assert slot is not None
        if kept is not None and kept != slot:
            self._copies.append(StateCopy(kept, slot))
        return slot

    def take(self) -> int | None:
        """A slot for something new: a free one, or else what was not used for longest."""
        if self._free:
            return self._free.pop()
        if not self._kept:
            return None
        slot, node = self._kept.popitem(last=False)
        node.state_slot = None
        self.num_evictions += 1
        return slot

    def keep(self, node: PrefixNode, slot: int) -> None:
        """``slot`` holds the state behind all of the node's tokens; or give it back."""
        if node.block is None or node.state_slot is not None:
            self.give_back(slot)  # nobody could find it, or it is there already
            return
        node.state_slot = slot
        self._kept[slot] = node

    def give_back(self, slot: int) -> None:
        """Nobody needs what is in a slot."""
        self._free.append(slot)

    def forget(self, node: PrefixNode) -> None:
        """The node's block is taken for something else: its state can be found no more."""
        slot = node.state_slot
        if slot is None:
            return
        node.state_slot = None
        if self._kept.pop(slot, None) is not None:
            self._free.append(slot)
        # else the plan being made reads it: it is free behind that.

    def take_copies(self) -> list[StateCopy]:
        """The copies that the plan being made must do; what they read is most recently used."""
        for slot, node in self._sources.items():
            if node.state_slot == slot:
                self._kept[slot] = node
            else:
                self._free.append(slot)
        self._sources.clear()
        copies, self._copies = self._copies, []
        return copies

    def check_integrity(self, held: list[int], nodes: list[PrefixNode]) -> None:
        """Assert that each slot is in one place: held by a request, kept for a node, or free."""
        kept = {**self._kept, **self._sources}
        assert sorted([*self._free, *kept, *held]) == list(range(self.num_slots)), "slots lost"
        assert not self._copies or self._sources, "copies of nothing"
        for slot, node in self._kept.items():
            assert node.state_slot == slot, "kept for a node that has another"
            assert node.block is not None, "kept where nobody can find it"
        with_state = [node for node in nodes if node.state_slot is not None]
        assert len(with_state) == sum(node.state_slot == slot for slot, node in kept.items())
