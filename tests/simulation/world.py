"""A seed makes a world: an engine on a faulty device, and clients who come, read, stall and leave.

`run` plays it on virtual time and checks what was promised:

- every stream ends once: with its answer, with the beginning of it where it was cut, or with an
  error that its request has earned (it failed alone, or the device is dead);
- an answer is that of the request alone in endless memory, token by token;
- at every step the books balance, and what is cached is what is there;
- in the end the pool is full, and nobody is remembered.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from streamserve.config import CacheConfig, SchedulerConfig
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.policy import POLICIES
from streamserve.core.sampling_params import BeamSearchParams, SamplingParams
from streamserve.core.scheduler import Scheduler
from streamserve.engine.async_engine import AsyncEngine
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.errors import ConfigError
from tests.simulation.clients import Client, Reading
from tests.simulation.device import Faults, SimulatedDevice, base_of
from tests.simulation.expected import EOS
from tests.simulation.virtual_time import AwaitPoints, VirtualLoop
from tests.unit.simulated import VOCAB_SIZE, drafting, guesses

MAX_MODEL_LEN = 48
_TURNS_TO_HEAR = 3  # of the event loop: the runner's word, the step loop's end, and this task's own


@dataclass
class World:
    """What a seed has made, before anything happens."""

    seed: int
    cache: CacheConfig
    config: SchedulerConfig
    faults: Faults
    max_step_s: float
    clients: list[Client]
    accuracy: int | None  # of drafts, in three; prompt lookup without
    stop_at: float | None = None  # the engine is stopped in the middle
    drain_s: float = 0.0
    dies_at_s: float | None = None  # the device, whatever it does then


def make_world(seed: int) -> World:
    """The same world for the same seed."""
    rng = random.Random(seed)
    for _ in range(100):
        try:
            cache, config = _make_configs(rng)
            break
        except ConfigError:
            continue
    num_clients = rng.randint(1, 10)
    clients = _make_clients(rng, num_clients, cache, config)
    faults = Faults()
    if rng.random() < 0.6:
        faults = Faults(
            rate=rng.choice([0.0, 0.02, 0.1, 0.3]),
            launch_share=rng.choice([0.0, 0.5]),
            contagious=rng.random() < 0.3,
            culprits=frozenset(c.request_id for c in clients if rng.random() < 0.15),
            max_tokens=rng.choice([None, None, 4, 8]),
            dies_at=rng.randint(0, 40) if rng.random() < 0.05 else None,
        )
    return World(
        seed,
        cache,
        config,
        faults,
        max_step_s=rng.choice([0.0, 0.01, 0.1]),
        clients=clients,
        accuracy=rng.choice([None, 0, 2, 3]),
        stop_at=rng.uniform(0.0, 2.0) if rng.random() < 0.1 else None,
        drain_s=rng.choice([0.0, 0.5, 100.0]),
        dies_at_s=rng.uniform(0.0, 4.0) if rng.random() < 0.1 else None,
    )


def _make_configs(rng: random.Random) -> tuple[CacheConfig, SchedulerConfig]:
    block_size = rng.choice([1, 2, 4, 5])
    caching = rng.random() < 0.85
    num_state_slots = rng.choice([1, 2, 4, 12]) if rng.random() < 0.3 else 0
    cache = CacheConfig(
        num_blocks=-(-rng.choice([16, 24, 60, 200]) // block_size),
        block_size=block_size,
        enable_prefix_caching=caching,
        num_host_blocks=rng.choice([0, 0, 3, 20]) if caching and not num_state_slots else 0,
        max_transfers_per_step=rng.randint(1, 4),
        num_state_slots=num_state_slots,
    )
    speculates = rng.random() < (0.7 if num_state_slots else 0.3)
    config = SchedulerConfig(
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=rng.randint(1, 6),
        max_num_batched_tokens=rng.randint(2, 24),
        max_num_waiting=rng.choice([2, 12]),
        max_steps_in_flight=rng.choice([1, 2]),
        policy=rng.choice(sorted(POLICIES)),
        cascade_overhead_tokens=rng.randint(0, 5),
        speculative=drafting(rng.choice([1, 3])) if speculates else None,
    )
    return cache, config


def _make_clients(
    rng: random.Random, count: int, cache: CacheConfig, config: SchedulerConfig
) -> list[Client]:
    max_model_len = min(MAX_MODEL_LEN, cache.num_blocks * cache.block_size)
    prefixes = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 16))] for _ in range(2)]
    clients = []
    now = 0.0
    for number in range(count):
        now += rng.choice([0.0, 0.0, 0.05, 0.5]) * rng.random()
        prompt = rng.choice(prefixes) + [rng.randrange(3) for _ in range(rng.randint(1, 5))]
        prompt = prompt[: max_model_len - 2]
        has_stops = rng.random() < 0.3
        params = SamplingParams(
            temperature=0.0,
            max_tokens=rng.randint(1, min(14, max_model_len - len(prompt))),
            min_tokens=0,
            ignore_eos=rng.random() < 0.7,
            stop=("\3", "\1\2") if has_stops else (),
            stop_token_ids=(5,) if rng.random() < 0.2 else (),
        )
        kind = rng.random()
        n = rng.randint(2, 3) if kind < 0.3 else 1
        beams = None
        if kind < 0.12 and not cache.num_state_slots:
            beams = BeamSearchParams(beam_width=rng.randint(n, 3))
        if beams is not None:
            params = SamplingParams(temperature=0.0, max_tokens=min(params.max_tokens, 6))
        clients.append(
            Client(
                request_id=f"r{number}",
                arrival=now,
                prompt=prompt,
                params=params,
                n=n,
                beams=beams,
                priority=rng.randint(0, 2),
                cache_salt=rng.choice(["", "", "", "tenant"]),
                reading=_make_reading(rng),
                max_model_len=max_model_len,
            )
        )
    return clients


def _make_reading(rng: random.Random) -> Reading:
    return Reading(
        pause_s=rng.choice([0.0, 0.0, 0.02, 0.5]),
        has_sink=rng.random() < 0.3,
        leaves_after=rng.randint(0, 6) if rng.random() < 0.2 else None,
        is_aborted_at=rng.random() * 0.5 if rng.random() < 0.1 else None,
        max_unread_bytes=rng.choice([None, 40, 100]),
    )


class Play:
    """One run of a world. ``cut_at``: at that await point of anybody, a client's task is cancelled.

    It is the client whose await it is, or else one that is drawn.
    """

    def __init__(self, world: World, cut_at: int | None = None) -> None:
        self.world = world
        self.loop = VirtualLoop()
        self.points = AwaitPoints(self._disconnect, cut_at)
        self._rng = random.Random(world.seed + 1)
        self._visits: dict[asyncio.Task[Any], Client] = {}
        self.kv = KVCacheManager(world.cache, secret=b"test")
        propose = None if world.accuracy is None else guesses(world.accuracy)
        self.scheduler = Checked(world.config, self.kv, self.loop.time, None, propose)
        self.device = SimulatedDevice(
            world.cache, world.config, world.faults, self._rng, world.max_step_s
        )
        self.scheduler.device = self.device
        self.died_idle = False

    def run(self) -> Play:
        """Play it to its end. Raises AssertionError, or what else goes wrong."""
        loop = self.loop
        loop.set_task_factory(self.points.task_factory)
        loop.set_exception_handler(self._unhandled)
        try:
            loop.run_until_complete(self._main())
        except BaseException:
            if self.device.broken is not None:
                raise self.device.broken from None
            raise
        finally:
            loop.close()
        return self

    async def _main(self) -> None:
        world = self.world
        self.engine = AsyncEngine(
            scheduler=self.scheduler,
            runner=self.device,
            tokenizer=ByteTokenizer(),
            eos_token_ids=frozenset({EOS}),
            max_model_len=MAX_MODEL_LEN,
            clock=self.loop.time,
            seed=world.seed,
            idle_delay_s=1000.0,
        )
        await self.engine.start()
        for client in world.clients:
            self.device.runner.salts[client.request_id] = client.cache_salt
            task = asyncio.create_task(client.visit(self.engine, self.device.deserted))
            self._visits[task] = client
        if world.stop_at is not None:
            self.loop.call_later(world.stop_at, self._stop)
        if world.dies_at_s is not None:
            self.loop.call_later(world.dies_at_s, self._kill_device)
        for result in await asyncio.gather(*self._visits, return_exceptions=True):
            if result is not None and not isinstance(result, asyncio.CancelledError):
                raise result
        if world.dies_at_s is not None and world.stop_at is None:
            await self._until_it_is_known(world.dies_at_s)
        await self.engine.stop()
        self._check_end()

    def happened(self) -> Counter[str]:
        """How much there was of what the worlds are made for, once it is over."""
        stats, kv = self.engine.stats(), self.kv.stats
        heard = [heard for client in self.world.clients for heard in client.heard]
        return Counter(
            {
                "await points": self.points.num_seen,
                "pauses": self.scheduler.num_pauses,
                "preemptions": stats.num_preemptions,
                "failed steps": stats.num_failed_steps,
                "requests rolled back": stats.num_rolled_back,
                "drafts": stats.speculation.num_drafts,
                "states moved": self.device.runner.num_state_moves,
                "block copies": kv.num_block_copies,
                "prefix hits": kv.num_hit_tokens,
                "evictions": kv.num_evictions,
                "loads from the host": kv.num_host_hit_tokens,
                "kv tokens shared": stats.kv_tokens_saved,
                "texts sunk": sum(h.num_sunk for h in heard),
                "answers": sum(h.finish_reason in ("stop", "length") for h in heard),
                "beams": sum(c.beams is not None and c.heard[:1] != [] for c in self.world.clients),
                "aborts": sum(h.finish_reason == "abort" for h in heard),
                "errors": sum(h.error is not None for h in heard),
                "refusals": sum(c.refusal is not None for c in self.world.clients),
                "readers who left": sum(c.has_left for c in self.world.clients),
                "dead engines": self.engine.is_dead,
                "deaths of idle devices": self.died_idle,
            }
        )

    def _stop(self) -> None:
        self._stopping = asyncio.create_task(self.engine.stop(drain_timeout_s=self.world.drain_s))

    def _kill_device(self) -> None:
        self.died_idle = (
            self.engine.is_idle and not self.engine.is_dead and not self.device.is_closed
        )
        self.device.die()

    async def _until_it_is_known(self, dies_at_s: float) -> None:
        """Nobody asks for anything any more: the engine hears of it all the same, at once."""
        await asyncio.sleep(max(0.0, dies_at_s - self.loop.time()))
        while self.device.num_queued:  # for somebody who has left
            await asyncio.sleep(self.world.max_step_s)
        for _ in range(_TURNS_TO_HEAR):
            await asyncio.sleep(0)
        assert self.device.is_dead
        assert self.engine.is_dead, "the device has died, and nobody knows"

    def _disconnect(self, task: asyncio.Task[Any]) -> None:
        if task not in self._visits:
            there = [t for t, c in self._visits.items() if c.has_come and not t.done()]
            if not there:
                return
            task = self._rng.choice(there)
        task.cancel()

    def _unhandled(self, loop: object, context: dict[str, Any]) -> None:
        if self.device.broken is None:
            self.device.broken = context.get("exception") or AssertionError(context["message"])

    def _check_end(self) -> None:
        device, engine = self.device, self.engine
        assert device.broken is None
        assert device.is_closed
        is_lost = device.is_dead or self.world.faults.dies_at is not None
        is_hopeless = is_lost or "probe" in device.failed_alone
        assert not engine.is_dead or is_hopeless, engine.dead_reason
        for client in self.world.clients:
            client.check(
                device.failed_alone,
                engine.is_dead,
                self.world.faults.culprits,
                self.scheduler.ends,
                self.world.config.speculative is not None,
            )
        if not engine.is_dead:
            assert engine.is_idle
            assert engine.stats().num_failed_steps == device.num_failed, "miscounted"
            assert not self.scheduler.has_unfinished
            assert not self.scheduler.recovery.is_active
            self.scheduler.check_integrity()
            assert self.kv.num_free_blocks == self.kv.num_blocks, "blocks are lost"
            assert not self.kv._holdings
        stats = engine.stats()
        assert stats.num_running + stats.num_waiting == 0 or engine.is_dead


class Checked(Scheduler):
    """A scheduler whose books are checked at every step, by the device, too."""

    device: SimulatedDevice

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ends: dict[str, list[int]] = {}
        self.num_booked = 0

    def finish(self, request, reason, **kwargs):
        is_first = super().finish(request, reason, **kwargs)
        if is_first:
            assert request.request_id not in self.ends, "ended twice"
            self.ends[request.request_id] = list(request.token_ids)
        return is_first

    def schedule(self):
        plan = super().schedule()
        self._check()
        return plan

    def update(self, output):
        updates = super().update(output)
        self.num_booked += 1
        self._check()
        return updates

    def fail_step(self, step_id, **kwargs):
        failed = super().fail_step(step_id, **kwargs)
        self.num_booked += 1
        self._check()
        return failed

    def _check(self) -> None:
        try:
            self.check_integrity()
            for holding in self.kv_cache._holdings.values():
                request = holding.request
                is_deserted = base_of(request.request_id) in self.device.deserted
                assert not is_deserted or request.num_steps_in_flight, "held for nobody"
            if self.num_booked == self.device.num_ended and not self.num_steps_in_flight:
                self.device.runner.check_cached(self.kv_cache)
        except AssertionError as error:
            self.device.broken = self.device.broken or error
            raise


def play(seed: int, cut_at: int | None = None) -> Play:
    """Make a world and play it; what fails says how to see it again."""
    run = Play(make_world(seed), cut_at)
    try:
        return run.run()
    except BaseException as error:
        where = "" if cut_at is None else f" --cut-at {cut_at}"
        error.add_note(f"see it again: python -m tests.simulation --seed {seed}{where}")
        raise
