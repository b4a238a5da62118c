"""Scheduler and KV cache together, against a naive model, under every order of events."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from streamserve.core.pooling import Pooling
from streamserve.core.request import FinishReason, Request, RequestStatus
from streamserve.errors import ContextLengthError, QueueFullError
from tests.unit.simulated import (
    VOCAB_SIZE,
    Harness,
    drafting,
    guesses,
    naive_next_token,
    naive_output,
)

TOKENS = st.integers(0, 2)  # few, so that prompts share by chance, too
SALTS = st.sampled_from(["", "", "", "tenant", "other"])
INDEX = st.integers(0, 10**6)


def shared_tokens(prefix, length):
    return [(prefix * i * i + i) % VOCAB_SIZE for i in range(length)]


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, steps, forks, chooses, aborts and fails; after each rule everything must add up."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []
        self.idle: list[Request] = []  # their next token is to be chosen
        self.suspected: set[str] = set()  # requests that were in a failed step
        self.ends: dict[str, tuple[FinishReason, list[int]]] = {}

    @initialize(
        num_blocks=st.integers(4, 24),
        block_size=st.sampled_from([1, 2, 4, 5]),
        budget=st.integers(1, 24),
        max_num_seqs=st.integers(1, 6),
        depth=st.sampled_from([1, 2]),
        policy=st.sampled_from(["sjf", "fcfs", "priority", "fair"]),
        caching=st.sampled_from([True, True, True, False]),
        weak_hash=st.sampled_from([False, False, True]),
        cascade_overhead=st.integers(0, 5),
        num_host_blocks=st.sampled_from([0, 0, 1, 3, 10, 40]),
        max_transfers=st.integers(1, 4),
        num_drafts=st.sampled_from([0, 0, 1, 3, 5]),
        accuracy=st.integers(0, 4),
        public_lengths=st.lists(st.integers(1, 12), max_size=2),
        num_state_slots=st.sampled_from([0, 0, 1, 2, 5, 20]),
    )
    def start(
        self,
        num_blocks,
        block_size,
        budget,
        max_num_seqs,
        depth,
        policy,
        caching,
        weak_hash,
        cascade_overhead,
        num_host_blocks,
        max_transfers,
        num_drafts,
        accuracy,
        public_lengths=(),
        num_state_slots=0,
    ):
        if num_state_slots:  # host memory is not for a model that keeps states
            num_host_blocks = 0
        self.keeps_states = num_state_slots > 0
        self.harness = Harness(
            num_blocks=num_blocks,
            block_size=block_size,
            enable_prefix_caching=caching,
            num_host_blocks=num_host_blocks if caching else 0,
            max_transfers_per_step=max_transfers,
            max_model_len=60,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_num_waiting=12,
            max_steps_in_flight=depth,
            policy=policy,
            cascade_overhead_tokens=cascade_overhead,
            speculative=drafting(num_drafts) if num_drafts else None,
            propose=None if accuracy == 4 else guesses(accuracy),
            public_prefixes=[shared_tokens(1, length) for length in public_lengths],
            num_state_slots=num_state_slots,
        )
        if weak_hash:  # collisions all the time: they may cost hits, never serve a wrong one
            self.harness.kv._cache._hash = lambda parent, token_ids: bytes([sum(token_ids) % 3])

    @property
    def live(self) -> list[Request]:
        return [r for r in self.requests if not r.is_finished]

    def _params(self, max_tokens, min_tokens, stops):
        return {
            "max_tokens": max_tokens,
            "min_tokens": min(min_tokens, max_tokens),
            "stop_token_ids": (3,) if stops else (),
            "ignore_eos": not stops,
        }

    def _add(self, prompt, salt, priority, params) -> Request | None:
        tenant = str(len(self.requests) % 3)
        request = self.harness.request(
            prompt,
            salt=salt,
            priority=priority,
            tenant=tenant,
            weight=1 + priority,
            **params,
        )
        try:
            self.harness.scheduler.add(request)
        except (ContextLengthError, QueueFullError):
            return None
        self.requests.append(request)
        return request

    @rule(
        prefix=st.integers(0, 3),
        prefix_length=st.integers(0, 30),
        suffix=st.lists(TOKENS, min_size=1, max_size=6),
        salt=SALTS,
        priority=st.integers(0, 2),
        max_tokens=st.integers(1, 20),
        min_tokens=st.integers(0, 4),
        stops=st.booleans(),
        copies=st.sampled_from([1, 1, 1, 3]),
    )
    def add(
        self, prefix, prefix_length, suffix, salt, priority, max_tokens, min_tokens, stops, copies
    ):
        shared = shared_tokens(prefix, prefix_length)
        params = self._params(max_tokens, min_tokens, stops)
        for _ in range(copies):
            self._add(shared + suffix, salt, priority, params)

    @precondition(lambda self: self.requests)
    @rule(
        index=INDEX,
        cut=st.integers(0, 3),
        suffix=st.lists(TOKENS, min_size=1, max_size=4),
        max_tokens=st.integers(1, 10),
    )
    def next_turn(self, index, cut, suffix, max_tokens):
        """Continue a conversation, or a part of one."""
        before = self.requests[index % len(self.requests)]
        prompt = before.token_ids[: len(before.token_ids) - cut] + suffix
        params = self._params(max_tokens, 0, False)
        self._add(prompt, before.cache_salt, before.priority, params)

    @precondition(lambda self: self.live and not self.keeps_states)
    @rule(
        index=INDEX,
        length=st.integers(0, 60),
        suffix=st.lists(TOKENS, max_size=3),
        max_tokens=st.integers(1, 8),
        same_salt=st.sampled_from([True, True, True, False]),
    )
    def fork(self, index, length, suffix, max_tokens, same_salt):
        parent = self.live[index % len(self.live)]
        prompt = (parent.token_ids[:length] or parent.token_ids[:1]) + suffix
        salt = parent.cache_salt if same_salt else parent.cache_salt + "'"
        params = self._params(max_tokens, 0, False)
        child = self.harness.request(prompt, salt=salt, priority=parent.priority, **params)
        try:
            self.harness.scheduler.fork(parent, child)
        except ContextLengthError:
            return
        self.requests.append(child)

    @rule(
        prompt=st.lists(TOKENS, min_size=1, max_size=30),
        salt=SALTS,
        num_others=st.integers(1, 5),
        max_tokens=st.integers(1, 8),
        stops=st.booleans(),
    )
    def add_choices(self, prompt, salt, num_others, max_tokens, stops):
        """Several answers to one prompt: the first computes it, the others share it."""
        params = self._params(max_tokens, 0, stops)
        source = self._add(prompt, salt, 0, params)
        if source is None:
            return
        others = [self.harness.request(prompt, salt=salt, **params) for _ in range(num_others)]
        self.harness.scheduler.add_choices(source, others)
        self.requests.extend(others)

    @precondition(lambda self: not self.keeps_states)
    @rule(
        prompt=st.lists(TOKENS, min_size=1, max_size=30),
        salt=SALTS,
        max_tokens=st.integers(1, 8),
    )
    def add_beam(self, prompt, salt, max_tokens):
        """A request whose tokens are chosen here."""
        request = self.harness.request(prompt, salt=salt, **self._params(max_tokens, 0, False))
        request.chooses_on_host, request.may_draft = True, False
        try:
            self.harness.scheduler.add(request)
        except (ContextLengthError, QueueFullError):
            return
        self.requests.append(request)

    @precondition(lambda self: self.live)
    @rule(index=INDEX, accuracy=st.integers(0, 3), most=st.integers(1, 5))
    def guide(self, index, accuracy, most):
        """What follows the tokens of one is known before they are computed, or almost."""
        request = self.live[index % len(self.live)]
        if request.forced is None:
            find = guesses(accuracy)
            self.harness.scheduler.guide(request, lambda limit: find(request, min(most, limit)))

    @rule(
        prefix=st.integers(0, 3),
        length=st.integers(1, 60),
        salt=SALTS,
        priority=st.integers(0, 2),
        kind=st.sampled_from(["last", "mean"]),
    )
    def add_pooled(self, prefix, length, salt, priority, kind):
        """A request that wants its prompt's vector, as long as the whole context may be."""
        prompt = [(prefix * i * i + i) % VOCAB_SIZE for i in range(length)]
        params = {**self._params(1, 0, False), "pooling": Pooling(kind=kind)}
        self._add(prompt, salt, priority, params)

    @precondition(lambda self: self.idle)
    @rule(index=INDEX, num_children=st.integers(0, 3))
    def choose(self, index, num_children):
        """Go on with one token, in as many requests as the search keeps of it."""
        request = self.idle.pop(index % len(self.idle))
        if request.is_finished:
            return
        scheduler = self.harness.scheduler
        token_id = naive_next_token(request.token_ids)
        if request.num_tokens + 1 >= request.max_num_tokens:
            assert scheduler.finish(request, FinishReason.STOP)
            self._end(request)
            return
        prompt = request.token_ids[: request.num_prompt_tokens]
        params = self._params(request.sampling_params.max_tokens, 0, False)
        for _ in range(num_children):
            child = self.harness.request(prompt, salt=request.cache_salt, **params)
            child.token_ids = [*request.token_ids, token_id]
            child.chooses_on_host, child.may_draft = True, False
            scheduler.fork(request, child)
            self.requests.append(child)
        scheduler.choose(request, token_id)

    @rule()
    def launch(self):
        self.harness.launch()

    @precondition(lambda self: self.harness.runner.in_flight)
    @rule()
    def retire(self):
        self._check_updates(self.harness.retire())

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps):
        for _ in range(num_steps):
            before = len(self.harness.updates)
            self.harness.step()
            self._check_updates(self.harness.updates[before:])

    @precondition(lambda self: self.harness.runner.in_flight)
    @rule(index=INDEX, out_of_memory=st.booleans())
    def fail(self, index, out_of_memory):
        """Whoever was in the step goes on, unless it was alone in it, for the second time."""
        in_flight = self.harness.runner.in_flight
        index %= len(in_flight)
        request_ids = [s.request_id for s in in_flight[index].plan.scheduled]
        failed = self.harness.fail(index, out_of_memory=out_of_memory)
        for request in failed:
            assert request.finish_reason is FinishReason.ERROR
            assert request_ids == [request.request_id]
            assert request.request_id in self.suspected
            self._end(request)
        self.suspected.update(request_ids)

    @precondition(lambda self: self.live)
    @rule(index=INDEX)
    def abort(self, index):
        request = self.live[index % len(self.live)]
        assert self.harness.scheduler.finish(request, FinishReason.ABORT)
        assert not self.harness.scheduler.finish(request, FinishReason.ABORT)
        self._end(request)

    @precondition(lambda self: self.live)
    @rule(index=INDEX)
    def pause(self, index):
        request = self.live[index % len(self.live)]
        if not request.chooses_on_host:
            self.harness.scheduler.pause(request)

    @precondition(lambda self: any(r.is_paused for r in self.live))
    @rule(index=INDEX)
    def resume(self, index):
        paused = [r for r in self.live if r.is_paused]
        self.harness.scheduler.resume(paused[index % len(paused)])

    @precondition(lambda self: any(r.num_output_tokens for r in self.live))
    @rule(index=INDEX, num_kept=st.integers(0, 20))
    def late_stop(self, index, num_kept):
        candidates = [r for r in self.live if r.num_output_tokens]
        request = candidates[index % len(candidates)]
        num_kept = min(num_kept, request.num_output_tokens)
        kept = request.output_token_ids[:num_kept]
        assert self.harness.scheduler.finish(
            request, FinishReason.STOP, num_output_tokens=num_kept, stop_reason="end"
        )
        assert request.output_token_ids == kept
        self._end(request)

    @rule()
    def drain(self):
        """Nobody starves: whatever the state, a bounded number of steps ends everything."""
        for request in self.live:
            self.harness.scheduler.resume(request)
        num_tokens = sum(r.max_num_tokens for r in self.live)
        num_steps = 20 + 8 * num_tokens * (1 + len(self.live))
        while self.harness.scheduler.has_unfinished or self.harness.runner.in_flight:
            self.step(1)
            while self.idle:
                self.choose(0, 0)
            num_steps -= 1
            assert num_steps > 0, "somebody starves"
        assert self.harness.kv.num_free_blocks == self.harness.kv.num_blocks
        assert all(r.is_finished for r in self.requests)

    def _check_updates(self, updates):
        for update in updates:
            request = update.request
            if request.chooses_on_host:
                sampled = self.harness.sampled[request.request_id]
                assert sampled == [naive_next_token(request.token_ids)], "a wrong block was read"
                self.idle.append(request)
                continue
            if request.sampling_params.pooling is not None:
                assert update.finish_reason is FinishReason.STOP
                expected = [request.num_tokens, naive_next_token(request.token_ids)]
                assert request.embedding.tolist() == expected, "a wrong block was read"
                self._end(request)
                continue
            output = request.output_token_ids
            assert update.new_token_ids == output[-len(update.new_token_ids) :]
            assert output == naive_output(request, len(output)), "a wrong block was read"
            assert update.finish_reason is request.finish_reason
            assert request.is_finished == self._should_end(request)
            if request.is_finished:
                self._end(request)

    def _should_end(self, request: Request) -> bool:
        params = request.sampling_params
        stops = set(params.stop_token_ids)
        if not params.ignore_eos:
            stops |= request.eos_token_ids
        late = request.output_token_ids[params.min_tokens :]
        return (
            any(token in stops for token in late)
            or request.num_output_tokens == params.max_tokens
            or request.num_tokens == self.harness.scheduler.max_model_len
        )

    def _end(self, request: Request) -> None:
        assert request.request_id not in self.ends, "finished twice"
        assert request.finish_reason is not None
        self.ends[request.request_id] = (request.finish_reason, list(request.token_ids))

    @invariant()
    def everything_adds_up(self):
        if not hasattr(self, "harness"):
            return
        self.harness.check_integrity()
        assert 0.0 <= self.harness.kv.usage <= 1.0
        for request in self.requests:
            assert request.is_finished == (request.request_id in self.ends)
            if request.is_finished:
                reason, token_ids = self.ends[request.request_id]
                assert (request.finish_reason, request.token_ids) == (reason, token_ids)
            elif request.status is not RequestStatus.RUNNING:
                assert not request.block_table

    def teardown(self):
        if hasattr(self, "harness"):
            self.drain()


def test_a_shared_block_is_cached_once_though_another_has_its_hash():
    """What the machine found: choices of two requests, whose first blocks have one hash."""
    machine = SchedulerMachine()
    limits = {"num_blocks": 6, "block_size": 2, "budget": 2, "max_num_seqs": 2, "depth": 1}
    none = {"cascade_overhead": 0, "num_host_blocks": 0, "num_drafts": 0, "accuracy": 0}
    machine.start(**limits, **none, policy="sjf", caching=True, weak_hash=True, max_transfers=1)
    params = {"salt": "", "stops": False}
    machine.add(0, 0, [1, 1], priority=0, max_tokens=1, min_tokens=0, copies=1, **params)
    machine.add_choices([0, 2], num_others=1, max_tokens=1, **params)
    machine.add_choices([0, 2, 0], num_others=1, max_tokens=2, **params)
    machine.drain()
    machine.everything_adds_up()
    assert len(machine.ends) == 5


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=max(300, settings.default.max_examples),
    stateful_step_count=max(40, settings.default.stateful_step_count),
)
