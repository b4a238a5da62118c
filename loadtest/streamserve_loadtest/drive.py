"""Plays a workload against a server.

The plan (who comes when, with which prompt, and who leaves early) is drawn from the seed before the
first request is sent; only later turns are written while the run goes on, for they follow an
answer.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from streamserve_loadtest.arrivals import arrival_times
from streamserve_loadtest.client import Target, exchange
from streamserve_loadtest.prompts import Message, PromptMaker
from streamserve_loadtest.records import Record, Run
from streamserve_loadtest.workloads import ClosedLoop, Group, Kind, OpenLoop, Workload

Progress = Callable[[int, int], None]  # requests that ended, tokens so far

_PLANNED_AHEAD = 2  # conversations of a background client written before the start


@dataclass(slots=True)
class Conversation:
    """One conversation as planned. ``cancelled`` holds the turns whose reader leaves early."""

    name: str
    kind: Kind
    messages: list[Message]
    rng: random.Random
    cancelled: frozenset[int] = frozenset()


@dataclass(slots=True)
class GroupPlan:
    """A group's conversations, and when they arrive (open loop) or per client (closed)."""

    group: Group
    arrivals: list[float] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    clients: list[Iterator[Conversation]] = field(default_factory=list)


class Planner:
    """Draws a round's conversations: the same seed, round and rate, the same prompts."""

    def __init__(
        self, prompts: PromptMaker, seed: int, round_number: int, rate: float | None = None
    ) -> None:
        self._prompts = prompts
        self._seed = seed
        # A server's cache holds what it met in the rounds, and at the rates, before.
        self._words = f"{round_number}" if rate is None else f"{round_number}/{rate:g}"

    def plan(self, group: Group) -> GroupPlan:
        """Everything about a group that does not depend on the server."""
        plan = GroupPlan(group)
        if isinstance(group.load, OpenLoop):
            # Not of the round: every server and every rate meets the same arrivals.
            plan.arrivals = arrival_times(group.load, random.Random(f"{self._seed}/{group.name}"))
            plan.conversations = [self.conversation(group, i) for i in range(len(plan.arrivals))]
        else:
            plan.clients = [
                self._client(group, group.load, client) for client in range(group.load.clients)
            ]
        return plan

    def _client(self, group: Group, load: ClosedLoop, client: int) -> Iterator[Conversation]:
        indices = range(client, load.clients * load.conversations, load.clients)
        ahead = _PLANNED_AHEAD if group.is_background else load.conversations
        ready = [self.conversation(group, index) for index in indices[:ahead]]
        return _chain(ready, (self.conversation(group, index) for index in indices[ahead:]))

    def conversation(self, group: Group, index: int) -> Conversation:
        """The ``index``-th conversation of a group, its first turn written."""
        name = f"{group.name}/{index}"
        # The kind and who leaves do not change with the round and the rate, the words do.
        draw = random.Random(f"{self._seed}/{name}")
        [kind] = draw.choices(group.kinds, [kind.share for kind in group.kinds])
        cancelled = frozenset(
            turn for turn in range(len(kind.turns)) if draw.random() < group.cancel_share
        )
        rng = random.Random(f"{self._seed}/{self._words}/{name}")
        messages = self.prefix(kind)
        messages.append(self._prompts.fill(messages, "user", kind.turns[0].prompt_tokens, rng))
        return Conversation(name, kind, messages, rng, cancelled)

    def prefix(self, kind: Kind) -> list[Message]:
        """The system prompt that all of a kind share, in every round."""
        if not kind.prefix_tokens:
            return []
        rng = random.Random(f"{self._seed}/prefix/{kind.name}")
        return [self._prompts.fill([], "system", kind.prefix_tokens, rng)]


def _chain(ready: list[Conversation], later: Iterator[Conversation]) -> Iterator[Conversation]:
    yield from ready
    yield from later


class Driver:
    """One run of one workload."""

    def __init__(
        self,
        target: Target,
        workload: Workload,
        prompts: PromptMaker,
        *,
        seed: int = 0,
        round_number: int = 0,
        timeout_s: float = 600.0,
        on_progress: Progress | None = None,
    ) -> None:
        self._target = target
        self._workload = workload
        self._prompts = prompts
        self._seed = seed
        self._round = round_number
        self._timeout_s = timeout_s
        self._on_progress = on_progress
        self._records: list[Record] = []
        self._epoch = 0.0

    async def run(self, server: str = "", rate: float | None = None) -> Run:
        """Play it to the end. Errors are in the records."""
        planner = Planner(self._prompts, self._seed, self._round, rate)
        plans = [planner.plan(group) for group in self._workload.groups]
        cpu, self._epoch = time.process_time(), time.perf_counter()
        background = [asyncio.create_task(self._play(p)) for p in plans if p.group.is_background]
        progress = asyncio.create_task(self._tell_progress())
        try:
            async with asyncio.TaskGroup() as tasks:
                for plan in plans:
                    if not plan.group.is_background:
                        tasks.create_task(self._play(plan))
        finally:
            for task in (*background, progress):
                task.cancel()
            await asyncio.gather(*background, progress, return_exceptions=True)
        seconds = time.perf_counter() - self._epoch
        share = (time.process_time() - cpu) / seconds
        return Run(server, self._workload.name, self._round, rate, self._records, seconds, share)

    async def _play(self, plan: GroupPlan) -> None:
        await self._sleep_until(plan.group.start_s)
        async with asyncio.TaskGroup() as tasks:
            for client in plan.clients:
                tasks.create_task(self._closed_client(plan.group, client))
            for arrival, conversation in zip(plan.arrivals, plan.conversations, strict=True):
                due_at = plan.group.start_s + arrival
                await self._sleep_until(due_at)
                tasks.create_task(self._converse(plan.group, conversation, due_at))

    async def _closed_client(self, group: Group, conversations: Iterator[Conversation]) -> None:
        for conversation in conversations:
            await self._converse(group, conversation, self._now())

    async def _converse(self, group: Group, conversation: Conversation, due_at: float) -> None:
        messages = conversation.messages
        for number, turn in enumerate(conversation.kind.turns):
            if number:
                messages.append(
                    self._prompts.fill(messages, "user", turn.prompt_tokens, conversation.rng)
                )
                due_at = self._now()
            is_cancelled = number in conversation.cancelled
            record = Record(
                group=group.name,
                kind=conversation.kind.name,
                conversation=conversation.name,
                turn=number,
                planned_prompt_tokens=turn.prompt_tokens + conversation.kind.prefix_tokens,
                planned_output_tokens=turn.output_tokens,
                due_at=due_at,
            )
            self._records.append(record)
            text = await exchange(
                self._target,
                self._target.request_bytes(messages, turn.output_tokens),
                record,
                epoch=self._epoch,
                cancel_after=group.cancel_after if is_cancelled else None,
                timeout_s=self._timeout_s,
            )
            if record.error or record.is_cancelled:
                return
            messages.append({"role": "assistant", "content": text})

    def _now(self) -> float:
        return time.perf_counter() - self._epoch

    async def _sleep_until(self, moment: float) -> None:
        if (delay := moment - self._now()) > 0:
            await asyncio.sleep(delay)

    async def _tell_progress(self) -> None:
        while self._on_progress is not None:
            await asyncio.sleep(1.0)
            num_ended = sum(1 for record in self._records if record.ended_at)
            self._on_progress(num_ended, sum(len(r.chunk_times) for r in self._records))


async def warm_up(
    target: Target, workload: Workload, prompts: PromptMaker, *, timeout_s: float = 600.0
) -> Record:
    """One short answer for each kind of conversation; returns the last one's record."""
    planner = Planner(prompts, seed=0, round_number=-1)
    record = Record("warm-up", "", "", 0, 0, 4)
    for group in workload.groups:
        for kind in group.kinds:
            record = Record("warm-up", kind.name, "", 0, 0, 4)
            conversation = planner.conversation(Group(group.name, (kind,), group.load), index=0)
            request = target.request_bytes(conversation.messages, 4)
            await exchange(target, request, record, epoch=time.perf_counter(), timeout_s=timeout_s)
    return record
