"""A device made of Python lists, which believes nothing: it proves what the scheduler plans.

Memory holds one cell per KV slot. A token's cell is (position, token, hash of all cells before
it), as real KV depends on everything before it. A sampled token is a hash of the cells *read
through the block table*, so that a wrong block gives a wrong token, here and ever after.

A step in flight may touch memory at any time between launch and retirement, so its writes happen
at both ends; one that fails leaves rubbish where it wrote.
"""

from collections import deque
from dataclasses import dataclass, field

from streamserve.config import CacheConfig, SchedulerConfig
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.plan import PENDING_TOKEN, ModelRunnerOutput, SchedulerOutput
from streamserve.core.prefix_groups import find_groups
from streamserve.core.request import Request
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.scheduler import Scheduler
from streamserve.core.step_time import StepTimeModel
from tests.unit.naive_groups import best_gain, gain_of

VOCAB_SIZE = 11
Cell = tuple[int, int, int]  # position, token, hash of the cells before


def naive_next_token(token_ids: list[int]) -> int:
    """What a device with endless memory would sample after these tokens."""
    context = 0
    for position, token in enumerate(token_ids):
        context = hash((context, (position, token, context)))
    return context % VOCAB_SIZE


def naive_output(request: Request, num_tokens: int) -> list[int]:
    """The first ``num_tokens`` output tokens of a request that nothing disturbs or ends."""
    token_ids = request.token_ids[: request.num_prompt_tokens]
    for _ in range(num_tokens):
        token_ids.append(naive_next_token(token_ids))
    return token_ids[request.num_prompt_tokens :]


@dataclass
class SimulatedRequest:
    """What a runner keeps about a request between two steps."""

    salt: str
    block_table: list[int] = field(default_factory=list)
    end: int | None = None  # where its next tokens must start
    last_sample: int | None = None
    last_step_id: int = -1


@dataclass
class SimulatedStep:
    """A step that was launched."""

    plan: SchedulerOutput
    sampled: list[list[int]]
    writes: list[tuple[int, int, Cell]]  # block, offset, cell
    writers: dict[int, str]  # block -> the request that writes into it
    copied: dict[int, int] = field(default_factory=dict)  # source -> leading tokens that count


class SimulatedRunner:
    """``salts`` maps request ids to cache salts: the harness knows them, a plan does not."""

    def __init__(self, num_blocks: int, block_size: int, config: SchedulerConfig) -> None:
        self.memory: list[list[Cell | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.salt_of_block: list[set[str]] = [set() for _ in range(num_blocks)]
        self.block_size = block_size
        self.max_tokens = config.max_num_batched_tokens
        self.has_cascade = config.enable_cascade_attention
        self.cascade_overhead_tokens = config.cascade_overhead_tokens
        self.salts: dict[str, str] = {}
        self.requests: dict[str, SimulatedRequest] = {}
        self.in_flight: deque[SimulatedStep] = deque()
        self.num_computed_tokens = 0
        self.num_copies = 0

    def launch(self, plan: SchedulerOutput) -> None:
        assert 0 < plan.num_tokens <= self.max_tokens
        for request_id in plan.released_ids:
            del self.requests[request_id]
        for new in plan.new_requests:
            assert new.request_id not in self.requests
            self.requests[new.request_id] = SimulatedRequest(self.salts[new.request_id])
        step = SimulatedStep(plan, [], [], {})
        self._copy(step)
        seen = set()
        for scheduled in plan.scheduled:
            assert scheduled.request_id not in seen
            seen.add(scheduled.request_id)
            self._forward(scheduled, step)
        self._check_groups(plan)
        self._check_overlaps(step)
        self.in_flight.append(step)
        self.num_computed_tokens += plan.num_tokens
        self.num_copies += len(plan.block_copies)

    def retire(self) -> ModelRunnerOutput:
        """The oldest step's result; its writes land once more, as late as they may."""
        step = self.in_flight.popleft()
        for block_id, offset, cell in step.writes:
            self.memory[block_id][offset] = cell
        return ModelRunnerOutput(step.plan.step_id, step.sampled)

    def fail(self, index: int) -> int:
        """Let a step in flight fail; returns its id. What it wrote is rubbish."""
        step = self.in_flight[index]
        del self.in_flight[index]
        for block_id, offset, _ in step.writes:
            self.memory[block_id][offset] = None
        for _, dst in step.plan.block_copies:
            self.memory[dst] = [None] * self.block_size
        return step.plan.step_id

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
        request.last_step_id = step.plan.step_id
        request.last_sample = None
        if scheduled.sample:
            request.last_sample = self._context(request, end) % VOCAB_SIZE
        step.sampled.append([] if request.last_sample is None else [request.last_sample])

    def _write(
        self, name: str, request: SimulatedRequest, position: int, token: int, step: SimulatedStep
    ) -> None:
        block_id = request.block_table[position // self.block_size]
        offset = position % self.block_size
        if offset == 0:
            self.salt_of_block[block_id] = set()
        self.salt_of_block[block_id].add(request.salt)
        cell = (position, token, self._context(request, position))
        self.memory[block_id][offset] = cell
        step.writes.append((block_id, offset, cell))
        writer = step.writers.setdefault(block_id, name)
        assert writer == name or writer.startswith("copy"), "two requests write into one block"
        step.writers[block_id] = name

    def _context(self, request: SimulatedRequest, num_tokens: int) -> int:
        """Hash of the first cells as the block table shows them."""
        context = 0
        for position in range(num_tokens):
            block_id = request.block_table[position // self.block_size]
            assert self.salt_of_block[block_id] <= {request.salt}, "shared across salts"
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
        """Nobody writes where a step in flight writes, or over what one copies.

        The owner of a forked tail may append behind the tokens that are copied.
        """
        for other in self.in_flight:
            for block_id, writer in other.writers.items():
                assert step.writers.get(block_id, writer) == writer, "reused while in flight"
        for copying in (*self.in_flight, step):
            for writing in (*self.in_flight, step):
                for block_id, offset, _ in writing.writes:
                    assert offset >= copying.copied.get(block_id, 0), "a source is overwritten"


class Harness:
    """A scheduler, its cache and a simulated device, driven by hand."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        enable_prefix_caching: bool = True,
        step_time: StepTimeModel | None = None,
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
        )
        self.now = 0.0
        self.kv = KVCacheManager(cache_config, secret=b"test")
        self.scheduler = Scheduler(self.config, self.kv, lambda: self.now, step_time)
        self.runner = SimulatedRunner(num_blocks, block_size, self.config)
        self.num_requests = 0
        self.updates = []
        self.failed: list[Request] = []

    def request(
        self, prompt: list[int], *, salt: str = "", priority: int = 0, **params: object
    ) -> Request:
        """A request with an id of its own, not added."""
        self.num_requests += 1
        self.now += 1.0
        request = Request(
            f"r{self.num_requests}",
            prompt,
            SamplingParams(temperature=0.0, **({"max_tokens": 4} | params)),
            arrival_time=self.now,
            seed=0,
            cache_salt=salt,
            priority=priority,
            eos_token_ids=frozenset({0}) if params.get("ignore_eos") is False else frozenset(),
        )
        self.runner.salts[request.request_id] = salt
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
        updates = self.scheduler.update(self.runner.retire())
        self.updates.extend(updates)
        return updates

    def fail(self, index: int = 0) -> list[Request]:
        failed = self.scheduler.fail_step(self.runner.fail(index))
        self.failed.extend(failed)
        return failed

    def check_integrity(self) -> None:
        """Every invariant there is, and that every cached block holds what it is cached as."""
        self.scheduler.check_integrity()
        for salt, root in self.kv._cache._roots.items():
            stack = [(root, 0, 0)]
            while stack:
                node, position, context = stack.pop()
                for offset, token in enumerate(node.token_ids):
                    cell = (position, token, context)
                    context = hash((context, cell))
                    position += 1
                    if node.block is not None:
                        block_id = node.block.block_id
                        assert self.runner.memory[block_id][offset] == cell, "cached, not there"
                        assert self.runner.salt_of_block[block_id] <= {salt}, "another's salt"
                for children in node.children.values():
                    stack.extend((child, position, context) for child in children)

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
