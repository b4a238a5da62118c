"""What is kept of responses: so many, so many bytes, and no more than somebody holds."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from streamserve.api.responses.store import ResponseStore, Stored, Turn

COUNT, BYTES = 4, 300


class StoreMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.store = ResponseStore(COUNT, BYTES)
        self.made: list[str] = []

    @rule(
        size=st.integers(0, 60),
        owner=st.sampled_from("ab"),
        parent=st.integers(0, 8),
        has_events=st.booleans(),
    )
    def put(self, size, owner, parent, has_events):
        """A response, perhaps one that goes on with another that is there."""
        response_id = f"resp_{len(self.made)}"
        before = self.store.get(self.made[-parent], owner) if 0 < parent <= len(self.made) else None
        said = b"[%d]" % (10 ** (size // 2))
        turn = Turn(response_id, None if before is None else before.turn, b"[1]", said)
        events = (b"x" * size,) if has_events else None
        self.store.put(response_id, Stored(owner, b"{}", turn, events))
        self.made.append(response_id)
        if turn.num_bytes + 2 * size + 2 < BYTES // COUNT and before is None:
            assert self.store.get(response_id, owner) is not None

    @rule(index=st.integers(0, 20), owner=st.sampled_from("ab"))
    def delete(self, index, owner):
        if index < len(self.made):
            response_id = self.made[index]
            found = self.store.get(response_id, owner) is not None
            assert self.store.delete(response_id, owner) is found
            assert self.store.get(response_id, owner) is None

    @invariant()
    def is_sound(self):
        self.store.check_integrity()
        kept = [i for i in self.made if self.store.get(i, "a") or self.store.get(i, "b")]
        assert len(kept) == len(self.store)

    def teardown(self):
        for response_id in self.made:
            self.store.delete(response_id, "a")
            self.store.delete(response_id, "b")
        assert self.store.num_bytes == 0


TestStore = StoreMachine.TestCase


def test_what_is_too_large_by_itself_costs_nobody_anything():
    store = ResponseStore(8, 100)
    kept = Turn("k1", None, b"[]", b"[]")
    store.put("resp_1", Stored("", b"{}", kept))
    for large in (
        Stored("", b"x" * 97, Turn("k2", None, b"[]", b"[]")),
        Stored(
            "",
            b"{}",
            Turn("k3", Turn("k2", None, b"[%d]" % 10**60, b"[]"), b"[]", b"[%d]" % 10**40),
        ),
        Stored("", b"{}", Turn("k4", None, b"[]", b"[]"), (b"x" * 95,)),
    ):
        store.put("resp_2", large)
        assert len(store) == 1
    store.put("resp_2", Stored("", b"x" * 90, Turn("k5", kept, b"[]", b"[]")))
    assert len(store) == 2
    assert store.num_bytes == 6 + 94


def test_a_turn_outlives_its_response_while_another_goes_on_with_it():
    store = ResponseStore(1, 1000)
    first = Turn("k1", None, b'[{"type":"message"}]', b'[{"id":"o","type":"message"}]')
    store.put("resp_1", Stored("", b"{}", first))
    second = Turn("k2", first, b"[]", b'[{"id":"p"}]')
    store.put("resp_2", Stored("", b"{}", second))
    assert store.get("resp_1", "") is None
    assert second.packed() == b'[{"type":"message"},{"id":"o","type":"message"},{"id":"p"}]'
    assert [item["id"] for item in second.all_input()] == ["msg_k1_i0", "o"]
    assert store.num_bytes == first.num_bytes + second.num_bytes + 2
