"""A device made of Python lists, which believes nothing: it proves what the scheduler plans.

Memory holds one cell per KV slot. A token's cell is (position, token, hash of all cells before
it), as real KV depends on everything before it. A sampled token is a hash of the cells *read
through the block table*, so that a wrong block gives a wrong token, here and ever after.

A step in flight may touch memory at any time between launch and retirement, so its writes happen
at both ends; one that fails leaves rubbish where it wrote. A transfer reads and writes as late as
it may: until then what it writes is rubbish, and what it reads must stay what it was.

Of a model that keeps states a slot holds (tokens, hash of their cells, salt), which must be what
the block table shows where a request goes on. Steps run one after the other, so a slot may be
written by the step behind one that reads it.
"""

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from streamserve.config import CacheConfig, SchedulerConfig, SpeculativeConfig
from streamserve.core.block_pool import PrefixNode
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.plan import PENDING_TOKEN, ModelRunnerOutput, SchedulerOutput
from streamserve.core.pooling import Pooling
from streamserve.core.prefix_groups import find_groups
from streamserve.core.request import Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.scheduler import Scheduler
from streamserve.core.speculation import Propose
from streamserve.core.step_time import StepTimeModel
from tests.unit.naive_groups import best_gain, gain_of

VOCAB_SIZE = 11
PUBLIC = "public"
Cell = tuple[int, int, int]  # position, token, hash of the cells before
Place = tuple[bool, int]  # on the device or in host memory; block id
State = tuple[int, int, str]  # tokens, hash of their cells, salt


def naive_context(token_ids: list[int]) -> int:
    """The hash of these tokens' cells."""
    context = 0
    for position, token in enumerate(token_ids):
        context = hash((context, (position, token, context)))
    return context


def naive_next_token(token_ids: list[int]) -> int:
    """What a device with endless memory would sample after these tokens."""
    return naive_context(token_ids) % VOCAB_SIZE


def naive_output(request: Request, num_tokens: int) -> list[int]:
    """The first ``num_tokens`` output tokens of a request that nothing disturbs or ends."""
    token_ids = request.token_ids[: request.num_prompt_tokens]
    for _ in range(num_tokens):
        token_ids.append(naive_next_token(token_ids))
    return token_ids[request.num_prompt_tokens :]


def drafting(num_drafts: int) -> SpeculativeConfig:
    """Prompt lookup of single tokens, which in a small vocabulary always finds something."""
    return SpeculativeConfig(
        num_speculative_tokens=num_drafts, prompt_lookup_min=1, prompt_lookup_max=2
    )


def guesses(accuracy: int) -> Propose:
    """Drafts of which about ``accuracy`` in three are right: the same for the same text."""

    def propose(request: Request, max_tokens: int) -> list[int]:
        token_ids = list(request.token_ids)
        for _ in range(max_tokens):
            is_right = hash((token_ids[-1], len(token_ids))) % 3 < accuracy
            token = naive_next_token(token_ids)
            token_ids.append(token if is_right else (token + 1) % VOCAB_SIZE)
        return token_ids[request.num_tokens :]

    return propose


@dataclass
class SimulatedRequest:
    """What a runner keeps about a request between two steps."""

    salt: str
    pooling: Pooling | None = None
    block_table: list[int] = field(default_factory=list)
    first: int | None = None  # of a pooled prompt: where its tokens started
    end: int | None = None  # where its next tokens must start
    last_sample: int | None = None
    last_step_id: int = -1
    is_spoilt: bool = False  # a step with it failed, and the host may not know yet
    num_public: int = 0
    state_slot: int | None = None

    def salt_of(self, index: int) -> str:
        """Whose a block is: of all, or of those with its salt."""
        return PUBLIC if index < self.num_public else self.salt


@dataclass
class SimulatedStep:
    """A step that was launched."""

    plan: SchedulerOutput
    sampled: list[list[int]]
    pooled: dict[str, array]
    writes: list[tuple[int, int, Cell | None]]  # block, offset, cell
    writers: dict[int, str]  # block -> the request that writes into it
    copied: dict[int, int] = field(default_factory=dict)  # source -> leading tokens that count
    touched: set[Place] = field(default_factory=set)  # what transfers write
    moved: dict[Place, list[Cell | None]] = field(default_factory=dict)  # what transfers read


class SimulatedRunner:
    """``salts`` maps request ids to cache salts: the harness knows them, a plan does not."""

    def __init__(self, cache: CacheConfig, config: SchedulerConfig) -> None:
        num_blocks, block_size = cache.num_blocks, cache.block_size
        self.memory: list[list[Cell | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.host_memory: list[list[Cell | None]] = [[] for _ in range(cache.num_host_blocks)]
        self.max_transfers = cache.max_transfers_per_step
        self.salt_of_block: list[set[str]] = [set() for _ in range(num_blocks)]
        self.salt_of_host_block: list[set[str]] = [set() for _ in self.host_memory]
        self.block_size = block_size
        self.max_tokens = config.max_num_batched_tokens
        self.has_cascade = config.enable_cascade_attention
        self.cascade_overhead_tokens = config.cascade_overhead_tokens
        self.states: list[State | None] = [None] * cache.num_state_slots
        self.salts: dict[str, str] = {}
        self.num_public: dict[str, int] = {}  # blocks, likewise
        self.requests: dict[str, SimulatedRequest] = {}
        self.in_flight: deque[SimulatedStep] = deque()
        self.num_computed_tokens = 0
        self.num_copies = 0
        self.num_state_copies = 0
        self.num_state_saves = 0
        self.num_state_moves = 0
        self.num_stores = 0
        self.num_loads = 0

    def launch(self, plan: SchedulerOutput) -> None:
        assert plan.num_tokens <= self.max_tokens
        assert plan.scheduled or plan.loads, "a step for nothing"
        assert len(plan.stores) <= self.max_transfers
        assert len(plan.loads) <= self.max_transfers or not self.in_flight
        for request_id in plan.released_ids:
            del self.requests[request_id]
        for new in plan.new_requests:
            assert new.request_id not in self.requests
            pooling = new.sampling_params.pooling
            request = SimulatedRequest(self.salts[new.request_id], pooling)
            request.num_public = self.num_public.get(new.request_id, 0)
            request.state_slot = new.state_slot
            assert (new.state_slot is not None) == bool(self.states), "a slot for nothing, or none"
            self.requests[new.request_id] = request
        self._move_states(plan)
        step = SimulatedStep(plan, [], {}, [], {})
        self._start_transfers(step)
        self._copy(step)
        self._copy_states(plan)
        seen = set()
        for scheduled in plan.scheduled:
            assert scheduled.request_id not in seen
            seen.add(scheduled.request_id)
            self._forward(scheduled, step)
        self._save_states(plan)
        self._check_groups(plan)
        self._check_overlaps(step)
        self.in_flight.append(step)
        self.num_computed_tokens += plan.num_tokens
        self.num_copies += len(plan.block_copies)
        self.num_state_copies += len(plan.state_copies)
        self.num_state_saves += len(plan.state_saves)
        self.num_stores += len(plan.stores)
        self.num_loads += len(plan.loads)

    def retire(self) -> ModelRunnerOutput:
        """The oldest step's result; its writes land once more, as late as they may."""
        step = self.in_flight.popleft()
        for block_id, offset, cell in step.writes:
            self.memory[block_id][offset] = cell
        for block_id, host_block_id in step.plan.stores:
            self.host_memory[host_block_id] = self._read(step, (True, block_id))
        for block_id, host_block_id in step.plan.loads:
            self.memory[block_id] = self._read(step, (False, host_block_id))
        return ModelRunnerOutput(step.plan.step_id, step.sampled, pooled=step.pooled)

    def fail(self, index: int) -> int:
        """Let a step in flight fail; returns its id. What it wrote is rubbish.

        So is all that steps behind it compute for its requests, in flight now or launched before
        the host hears of it.
        """
        step = self.in_flight[index]
        del self.in_flight[index]
        for block_id, offset, _ in step.writes:
            self.memory[block_id][offset] = None
        for _, dst in step.plan.block_copies:
            self.memory[dst] = [None] * self.block_size
        spoilt = {s.request_id for s in step.plan.scheduled}
        for request_id in spoilt & self.requests.keys():
            self.requests[request_id].is_spoilt = True
            if self.states:
                self.states[self.requests[request_id].state_slot] = None
        for any_step in (step, *list(self.in_flight)[index:]):
            for save in any_step.plan.state_saves:
                if any_step.plan.scheduled[save.place].request_id in spoilt:
                    self.states[save.slot] = None
        for later in list(self.in_flight)[index:]:
            for samples, s in zip(later.sampled, later.plan.scheduled, strict=True):
                if s.request_id in spoilt:
                    samples[:] = [(token + 1) % VOCAB_SIZE for token in samples]
                    if s.request_id in later.pooled:
                        later.pooled[s.request_id] = array("f", [-1.0, -1.0])
            later.writes[:] = [
                (block_id, offset, None if later.writers[block_id] in spoilt else cell)
                for block_id, offset, cell in later.writes
            ]
            for block_id, offset, cell in later.writes:
                self.memory[block_id][offset] = cell
        return step.plan.step_id

    def check_cached(self, kv: KVCacheManager) -> None:
        """Every cached block holds what it is cached as."""
        for root_salt, root in kv._cache._roots.items():
            stack = [(root, 0, 0, PUBLIC if root_salt == kv._cache._public_salt else root_salt)]
            while stack:
                node, position, context, salt = stack.pop()
                if not node.token_ids:
                    salt = salt if node is root else kv._cache._salts[node]
                cells = []
                for token in node.token_ids:
                    cells.append((position, token, context))
                    context = hash((context, cells[-1]))
                    position += 1
                self._check_cells(node, cells, salt)
                if node.state_slot is not None:
                    expected = position, context, salt
                    assert self.states[node.state_slot] == expected, "kept, not there"
                for children in node.children.values():
                    stack.extend((child, position, context, salt) for child in children)

    def _check_cells(self, node: PrefixNode, cells: list[Cell], salt: str) -> None:
        if node.block is not None:
            block_id = node.block.block_id
            assert self.memory[block_id][: len(cells)] == cells, "cached, not there"
            assert self.salt_of_block[block_id] <= {salt}, "another's salt"
        if node.host_block_id is not None:
            being_stored = any(
                node.host_block_id == host_block_id
                for step in self.in_flight
                for _, host_block_id in step.plan.stores
            )
            if not being_stored:
                assert self.host_memory[node.host_block_id] == cells, "stored, not there"

    def _start_transfers(self, step: SimulatedStep) -> None:
        plan = step.plan
        for block_id, _ in plan.stores:
            step.moved[True, block_id] = list(self.memory[block_id])
        for _, host_block_id in plan.loads:
            step.moved[False, host_block_id] = list(self.host_memory[host_block_id])
        assert len(step.moved) == len(plan.stores) + len(plan.loads), "read twice"
        assert all(None not in cells for cells in step.moved.values()), "stored before it was full"
        for block_id, host_block_id in plan.stores:
            self.host_memory[host_block_id] = []
            self.salt_of_host_block[host_block_id] = self.salt_of_block[block_id]
            step.touched.add((False, host_block_id))
        for block_id, host_block_id in plan.loads:
            self.memory[block_id] = [None] * self.block_size
            self.salt_of_block[block_id] = self.salt_of_host_block[host_block_id]
            step.touched.add((True, block_id))
        assert len(step.touched) == len(step.moved), "written twice"

    def _read(self, step: SimulatedStep, place: Place) -> list[Cell | None]:
        on_device, block_id = place
        cells = (self.memory if on_device else self.host_memory)[block_id]
        assert cells == step.moved[place], "it changed while it was copied"
        return list(cells)

    def _copy(self, step: SimulatedStep) -> None:
        copies = step.plan.block_copies
        sources = {copy.src for copy in copies}
        destinations = {copy.dst for copy in copies}
        assert len(destinations) == len(copies), "two copies into one block"
        assert not sources & destinations, "a block is source and destination in one plan"
        for src, dst in copies:
            step.writers[dst] = f"copy of {src}"
            self.salt_of_block[dst] = set(self.salt_of_block[src])
            self.memory[dst] = list(self.memory[src])

    def _move_states(self, plan: SchedulerOutput) -> None:
        moves = dict(plan.state_moves)
        assert len(moves) == len(plan.state_moves), "moved twice"
        new_ids = {new.request_id for new in plan.new_requests}
        for request_id, slot in moves.items():
            assert request_id not in new_ids, "moved before it has come"
            assert self.requests[request_id].state_slot != slot, "moved to where it is"
            self.requests[request_id].state_slot = slot
        self.num_state_moves += len(moves)

    def _copy_states(self, plan: SchedulerOutput) -> None:
        copies = plan.state_copies
        sources, destinations = {copy.src for copy in copies}, {copy.dst for copy in copies}
        assert len(destinations) == len(copies), "two copies into one slot"
        assert not sources & destinations, "a slot is source and destination in one plan"
        new_slots = {new.state_slot for new in plan.new_requests}
        assert destinations <= new_slots, "a copy for somebody who goes on"
        for src, dst in copies:
            self.states[dst] = self.states[src]

    def _save_states(self, plan: SchedulerOutput) -> None:
        slots = [r.state_slot for r in self.requests.values() if r.state_slot is not None]
        slots += [save.slot for save in plan.state_saves]
        assert len(set(slots)) == len(slots), "a slot has two owners"
        tokens = [save[:2] for save in plan.state_saves]
        assert len(set(tokens)) == len(tokens), "a token's state is saved twice"
        for place, position, slot in plan.state_saves:
            scheduled = plan.scheduled[place]
            end = scheduled.start + len(scheduled.token_ids)
            assert scheduled.start < position <= end, "saved in another step"
            self.states[slot] = self._state(self.requests[scheduled.request_id], position)

    def _state(self, request: SimulatedRequest, num_tokens: int) -> State | None:
        """What the state is where it should be: after these cells of the block table."""
        if request.is_spoilt:
            return None
        salt = request.salt_of((num_tokens - 1) // self.block_size)
        return num_tokens, self._context(request, num_tokens), salt

    def _go_on(self, request: SimulatedRequest, start: int, end: int) -> None:
        """A request's state, from before the step to behind it."""
        slot = request.state_slot
        if start and not request.is_spoilt:
            salt = request.salt_of((start - 1) // self.block_size)
            expected = start, self._context(request, start), salt
            assert self.states[slot] == expected, "goes on from another state"
        self.states[slot] = self._state(request, end)

    def _forward(self, scheduled, step: SimulatedStep) -> None:
        request = self.requests[scheduled.request_id]
        request.block_table.extend(scheduled.new_block_ids)
        for src, dst in step.plan.block_copies:
            if dst in scheduled.new_block_ids:
                index = (scheduled.start - 1) // self.block_size
                assert dst == request.block_table[index]
                num_copied = scheduled.start - index * self.block_size
                step.copied[src] = max(step.copied.get(src, 0), num_copied)
        assert len(set(request.block_table)) == len(request.block_table), "a block twice"
        assert request.end in (None, scheduled.start), "tokens skipped or computed twice"
        end = request.end = scheduled.start + len(scheduled.token_ids)
        assert len(request.block_table) * self.block_size >= end, "no room"
        token_ids = scheduled.token_ids
        if token_ids == [PENDING_TOKEN]:
            assert request.last_step_id == step.plan.step_id - 1
            assert request.last_sample is not None
            token_ids = [request.last_sample]
        for position, token in enumerate(token_ids, scheduled.start):
            self._write(scheduled.request_id, request, position, token, step)
        if self.states:
            self._go_on(request, scheduled.start, end)
        request.last_step_id = step.plan.step_id
        request.last_sample = None
        if request.pooling is not None:
            self._pool(scheduled, request, step)
            return
        samples = [
            self._context(request, end - i) % VOCAB_SIZE for i in reversed(range(scheduled.sample))
        ]
        if samples:
            num_kept = scheduled.num_kept(samples)
            request.end -= len(samples) - num_kept  # what was wrong is computed again
            del samples[num_kept:]
            # What is drafted is known to the host only.
            request.last_sample = samples[0] if scheduled.sample == 1 else None
        step.sampled.append(samples)

    def _pool(self, scheduled, request: SimulatedRequest, step: SimulatedStep) -> None:
        """The vector of a prompt says what it was, and where its first row was computed."""
        if request.first is None:
            request.first = scheduled.start
        assert request.first == 0 or not request.pooling.needs_every_row, "a row was not computed"
        step.sampled.append([])
        if scheduled.sample:
            token = self._context(request, request.end) % VOCAB_SIZE
            step.pooled[scheduled.request_id] = array("f", [request.end, token])

    def _write(
        self, name: str, request: SimulatedRequest, position: int, token: int, step: SimulatedStep
    ) -> None:
        block_id = request.block_table[position // self.block_size]
        offset = position % self.block_size
        if offset == 0:
            self.salt_of_block[block_id] = set()
        salt = request.salt_of(position // self.block_size)
        self.salt_of_block[block_id] = self.salt_of_block[block_id] | {salt}
        cell = None
        if not request.is_spoilt:
            cell = (position, token, self._context(request, position))
        self.memory[block_id][offset] = cell
        step.writes.append((block_id, offset, cell))
        writer = step.writers.setdefault(block_id, name)
        assert writer == name or writer.startswith("copy"), "two requests write into one block"
        step.writers[block_id] = name

    def _context(self, request: SimulatedRequest, num_tokens: int) -> int:
        """Hash of the first cells as the block table shows them."""
        context = 0
        if request.is_spoilt:
            return -1
        for position in range(num_tokens):
            block_id = request.block_table[position // self.block_size]
            salt = request.salt_of(position // self.block_size)
            assert self.salt_of_block[block_id] <= {salt}, "shared across salts"
            cell = self.memory[block_id][position % self.block_size]
            assert cell is not None, "read before it was written"
            context = hash((context, cell))
        return context

    def _check_groups(self, plan: SchedulerOutput) -> None:
        """What a group shares is the same memory for all members, and was there before the step."""
        tables = [self.requests[s.request_id].block_table for s in plan.scheduled]
        all_members = [i for group in plan.prefix_groups for i in group.members]
        assert len(set(all_members)) == len(all_members), "a request is in two groups"
        for members, num_blocks in plan.prefix_groups:
            assert len(members) > 1
            assert num_blocks > 0
            for i in members:
                assert tables[i][:num_blocks] == tables[members[0]][:num_blocks]
                assert num_blocks * self.block_size <= plan.scheduled[i].start
        if not self.has_cascade:
            assert not plan.prefix_groups
            return
        full = [
            table[: scheduled.start // self.block_size]
            for table, scheduled in zip(tables, plan.scheduled, strict=True)
        ]
        costs = (self.block_size, self.cascade_overhead_tokens)
        if len(full) > 7:  # too many groupings to try them all
            assert plan.prefix_groups == find_groups(full, *costs)
        else:
            assert gain_of(plan.prefix_groups, *costs) == best_gain(full, *costs)

    def _check_overlaps(self, step: SimulatedStep) -> None:
        """Nobody writes where a step in flight writes, or over what one copies; what a transfer
        writes is nobody else's, and what it reads nobody writes.

        The owner of a forked tail may append behind the tokens that are copied.
        """
        for other in self.in_flight:
            for block_id, writer in other.writers.items():
                assert step.writers.get(block_id, writer) == writer, "reused while in flight"
            assert not step.touched & (other.touched | other.moved.keys()), "a transfer's block"
            assert not other.touched & step.moved.keys(), "moved on before it has arrived"
        tables = {block_id for r in self.requests.values() for block_id in r.block_table}
        for any_step in (*self.in_flight, step):
            written = {(True, block_id) for block_id in any_step.writers}
            for moving in (*self.in_flight, step):
                assert not {block_id for on, block_id in moving.touched if on} & tables
                assert not written & moving.touched, "a load is overwritten"
        for copying in (*self.in_flight, step):
            for writing in (*self.in_flight, step):
                for block_id, offset, _ in writing.writes:
                    assert offset >= copying.copied.get(block_id, 0), "a source is overwritten"


def shares(plan: SchedulerOutput) -> dict[str, int]:
    """How many tokens of each request a plan computes."""
    return {s.request_id: len(s.token_ids) for s in plan.scheduled}


class Harness:
    """A scheduler, its cache and a simulated device, driven by hand."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        enable_prefix_caching: bool = True,
        num_host_blocks: int = 0,
        max_transfers_per_step: int = 2,
        num_state_slots: int = 0,
        step_time: StepTimeModel | None = None,
        propose: Propose | None = None,
        public_prefixes: Sequence[list[int]] = (),
        **config: object,
    ) -> None:
        defaults = {
            "max_model_len": 256,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 64,
            "cascade_overhead_tokens": 4,
            "policy": "fcfs",
        }
        self.config = SchedulerConfig(**(defaults | config))
        cache_config = CacheConfig(
            num_blocks=num_blocks,
            block_size=block_size,
            enable_prefix_caching=enable_prefix_caching,
            num_host_blocks=num_host_blocks,
            max_transfers_per_step=max_transfers_per_step,
            num_state_slots=num_state_slots,
        )
        self.now = 0.0
        self.kv = KVCacheManager(cache_config, secret=b"test", public_prefixes=public_prefixes)
        self.public_prefixes = public_prefixes
        self.scheduler = Scheduler(self.config, self.kv, lambda: self.now, step_time, propose)
        self.runner = SimulatedRunner(cache_config, self.config)
        self.num_requests = 0
        self.updates = []
        self.failed: list[Request] = []
        self.sampled: dict[str, list[int]] = {}  # by request id, in the last step that had it

    def request(
        self,
        prompt: list[int],
        *,
        salt: str = "",
        shares: bool | None = None,  # public prefixes; None: if it has a salt
        priority: int = 0,
        tenant: str = "",
        weight: float = 1.0,
        **params: object,
    ) -> Request:
        """A request with an id of its own, not added."""
        shares = bool(salt) if shares is None else shares
        self.num_requests += 1
        self.now += 1.0
        request = Request(
            f"r{self.num_requests}",
            prompt,
            SamplingParams(temperature=0.0, **({"max_tokens": 4} | params)),
            arrival_time=self.now,
            seed=0,
            cache_salt=salt,
            shares_public_prefixes=shares,
            priority=priority,
            tenant=tenant,
            weight=weight,
            eos_token_ids=frozenset({0}) if params.get("ignore_eos") is False else frozenset(),
        )
        self.runner.salts[request.request_id] = salt
        if shares:
            size = self.kv.block_size
            wholes = [ids[: len(ids) // size * size] for ids in self.public_prefixes]
            num_public = [len(ids) // size for ids in wholes if prompt[: len(ids)] == ids]
            self.runner.num_public[request.request_id] = max(num_public, default=0)
        return request

    def add(self, prompt: list[int], **kwargs: object) -> Request:
        request = self.request(prompt, **kwargs)
        self.scheduler.add(request)
        return request

    def launch(self) -> SchedulerOutput | None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.runner.launch(plan)
        return plan

    def retire(self) -> list:
        scheduled = self.runner.in_flight[0].plan.scheduled
        output = self.runner.retire()
        for one, token_ids in zip(scheduled, output.sampled_token_ids, strict=True):
            self.sampled[one.request_id] = token_ids
        updates = self.scheduler.update(output)
        self.updates.extend(updates)
        return updates

    def fail(self, index: int = 0, *, out_of_memory: bool = False) -> list[Request]:
        step_id = self.runner.fail(index)
        failed = self.scheduler.fail_step(step_id, out_of_memory=out_of_memory)
        self.failed.extend(failed)
        return failed

    def check_integrity(self) -> None:
        """Every invariant there is, and that every cached block holds what it is cached as."""
        self.scheduler.check_integrity()
        self.runner.check_cached(self.kv)

    def step(self) -> SchedulerOutput | None:
        """Launch what can be, then retire the oldest step if that is all one can do."""
        plan = self.launch()
        full = len(self.runner.in_flight) >= self.config.max_steps_in_flight
        if self.runner.in_flight and (full or plan is None):
            self.retire()
        self.check_integrity()
        return plan

    def run(self, max_steps: int = 1000) -> list[SchedulerOutput]:
        """Step until nothing is left; returns the plans."""
        plans = []
        while self.scheduler.has_unfinished or self.runner.in_flight:
            assert len(plans) < max_steps, "somebody starves"
            plan = self.step()
            if plan is not None:
                plans.append(plan)
        assert self.kv.num_free_blocks == self.kv.num_blocks, "blocks leaked"
        return plans
