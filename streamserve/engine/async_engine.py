"""The step loop: one asyncio task that schedules, launches, and turns ids into text.

One turn::

    schedule -> launch -> text of the step before -> await the step's ids -> update
                          ^ overlaps with the forward

Where answers follow grammars, the masks of a step depend on the ids of the step before: its forward
is launched all the same, and it is sampled as soon as those ids are there.

Everything here runs on the event loop and is atomic between two awaits, so nothing needs a lock.
The device thread sees a plan and returns a result.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from concurrent.futures import Future
from contextlib import suppress

from streamserve.core.clock import Clock, monotonic
from streamserve.core.plan import ModelRunner, ModelRunnerOutput, SchedulerOutput
from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.scheduler import RequestUpdate, Scheduler
from streamserve.engine.admission import AdmissionLimits
from streamserve.engine.failures import is_out_of_memory, name_of
from streamserve.engine.front import EngineFront
from streamserve.engine.futures import call_soon, until_done
from streamserve.engine.garbage import collect_idle
from streamserve.engine.grammar import Grammars
from streamserve.engine.grammar_masks import GrammarError, GrammarMasks
from streamserve.engine.intake import Intake
from streamserve.engine.live import BeamGroup, Live, advance_beams
from streamserve.engine.progress import ProgressBoard
from streamserve.engine.stats import EngineStats, stats_of
from streamserve.engine.tokenizer import Tokenizer
from streamserve.errors import (
    DeviceDeadError,
    EngineError,
)

logger = logging.getLogger(__name__)

MAX_CONSECUTIVE_FAILED_STEPS = 3
_NO_STEP = "no step can run any more"
_STOP_GRACE_S = 10.0
"""How long ``stop`` waits for a step that is on the device after every request has ended."""


class _DeadError(Exception):
    """Leaves the step loop: the engine cannot go on."""


class AsyncEngine(EngineFront):
    """Serves requests with one scheduler and one runner. Event-loop thread only.

    A step that raises is rolled back, and its requests run alone, once: the streams of those that
    fail alone raise ``EngineError``, the others go on with the tokens they would have had. Once
    ``MAX_CONSECUTIVE_FAILED_STEPS`` have failed, a request of the engine's own runs alone. If that
    fails, too, or the device is lost, be it while nobody asks, or the scheduler itself raises and
    its accounting can no longer be trusted, the engine is dead: every stream and every later
    ``submit`` raises ``EngineDeadError`` with the reason.
    """

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: ModelRunner,
        tokenizer: Tokenizer,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        clock: Clock = monotonic,
        vocab_size: int | None = None,
        grammars: Grammars | None = None,
        seed: int | None = None,
        idle_delay_s: float = 1.0,
    ) -> None:
        """``vocab_size``: the model's rows, if not as many as the tokenizer has ids.

        ``grammars``, the engine's own from here on, may be warm already; there are some without.
        Requests without a seed draw theirs from ``seed``, in the order of their arrival.
        After ``idle_delay_s`` without work the accounting is checked and garbage collected.
        """
        vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        limits = AdmissionLimits(
            max_model_len=min(max_model_len, scheduler.max_model_len),
            vocab_size=vocab_size,
            num_tokenizer_ids=tokenizer.vocab_size,
            keeps_states=scheduler.kv_cache.keeps_states,
        )
        grammars = grammars or Grammars(tokenizer, eos_token_ids, vocab_size)
        intake = Intake(
            tokenizer, limits, eos_token_ids, grammars, clock, self.abort, self.hold, seed
        )
        masks = GrammarMasks(tokenizer.token_bytes, vocab_size)
        super().__init__(scheduler, tokenizer, grammars, intake, masks, clock)
        self._runner = runner
        self._idle_delay_s = idle_delay_s
        self._max_steps_in_flight = scheduler.config.max_steps_in_flight
        self.progress = ProgressBoard(self._live, clock).of  # of a request that has not ended
        self._in_flight: deque[tuple[int, Future[ModelRunnerOutput]]] = deque()
        self._unsampled: SchedulerOutput | None = None  # launched, its masks not yet known
        self._updates: list[RequestUpdate] = []  # of the last retired step, not yet text
        self._task: asyncio.Task[None] | None = None
        self._lost: DeviceDeadError | None = None  # the runner says so
        self._num_consecutive_failures = 0
        self._num_failed_steps = 0
        self._probe_id: str | None = None  # of the newest request of the engine's own
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0

    async def start(self) -> None:
        """Create the step loop's task. ``submit`` works before: requests then wait."""
        if self._task is not None:
            raise RuntimeError("the engine was started already")
        loop = asyncio.get_running_loop()
        self._runner.on_death(lambda error: call_soon(loop, self._hear_death, error))
        self._task = asyncio.create_task(self._run(), name="streamserve-step-loop")

    async def stop(self, *, drain_timeout_s: float = 0.0) -> None:
        """Refuse new requests, let the others finish until the timeout, then abort the rest.

        Idempotent; a second call with a shorter timeout cuts the first one's short. Closes the
        runner.
        """
        self._is_stopping = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=drain_timeout_s)
        self._grammars.close()
        for request_id in list(self._live):
            self.abort(request_id)
        if self._task is not None:
            _, late = await asyncio.wait([self._task], timeout=_STOP_GRACE_S)
            if late:
                logger.error("a step has hung for %g s: leaving it behind", _STOP_GRACE_S)
                self._task.cancel()
                return
        self._runner.close()

    @property
    def is_idle(self) -> bool:
        """Whether no request is live and no step in flight."""
        return not self._live and not self._in_flight

    @property
    def num_steps(self) -> int:
        """Steps that were launched."""
        return self._num_steps

    @property
    def has_work(self) -> bool:
        """Whether a step is due: something waits for a seat, or for the end of a step."""
        return bool(self._in_flight) or self._scheduler.num_waiting > 0

    def stats(self) -> EngineStats:
        """What there is to count. Cheap: may be called for every scrape and every log line."""
        live = dict.fromkeys(self._live.values())
        return stats_of(
            self._scheduler,
            num_steps=self._num_steps,
            num_failed_steps=self._num_failed_steps,
            num_preemptions=self._num_preemptions + sum(x.request.num_preemptions for x in live),
            prompt_tokens=self._num_prompt_tokens,
            generation_tokens=self._num_generation_tokens,
            num_compilations=self._runner.num_compilations,
        )

    # The step loop.

    async def _run(self) -> None:
        try:
            await self._step_loop()
        except asyncio.CancelledError:
            self._die("the step loop was cancelled", None)
            raise
        except _DeadError as error:
            self._die(str(error), error.__cause__)
        except Exception as error:
            self._publish()
            self._die("the step loop failed", error)
        except BaseException as error:
            self._die("the step loop failed", error)
            raise

    async def _step_loop(self) -> None:
        while self._dead_reason is None:
            if self._deadlines:
                self._fail_late()
            self._launch_steps()
            self._publish()
            if self._in_flight:
                await self._retire_step()
            elif self._is_stopping and not self._live:
                return
            elif self._lost is not None:
                raise _DeadError(_NO_STEP) from self._lost
            else:
                await self._wait_for_work()

    def _hear_death(self, error: DeviceDeadError) -> None:
        """The runner is dead: so is the engine, where it would launch a step or wait for work."""
        self._lost = error
        self._wake.set()

    def _launch_steps(self) -> None:
        """Fill the device's queue as far as the scheduler has something to launch."""
        if self._unsampled is not None and not self._sample_or_wait(self._unsampled):
            return
        while self._dead_reason is None and len(self._in_flight) < self._max_steps_in_flight:
            plan = self._scheduler.schedule()
            if plan is None:
                return
            try:
                self._runner.launch(plan)
            except Exception as error:
                self._fail_step(plan.step_id, error)
                continue
            if plan.new_requests:
                self._stamp_first_scheduled(plan)
            if not self._sample_or_wait(plan):
                return

    def _sample_or_wait(self, plan: SchedulerOutput) -> bool:
        """Sample a launched step; ``False``: its masks depend on a step that is in flight."""
        if self._masks and self._in_flight and not self._masks.are_known(plan):
            self._unsampled = plan
            return False
        self._unsampled = None
        self._sample(plan)
        return True

    def _sample(self, plan: SchedulerOutput) -> None:
        """Ask for the ids of a launched step, under the masks of those that have a grammar."""
        masks = None
        if self._masks:
            masks, failed = self._masks.fill(plan)
            if failed:
                self._publish()  # what the step before gave them comes first
            for request_id, error in failed.items():
                live = self._live.get(request_id)
                if live is not None and not self._fail_request(live, error):
                    return
        try:
            future = self._runner.sample(plan.step_id, masks)
        except Exception as error:
            self._fail_step(plan.step_id, error)
            return
        self._in_flight.append((plan.step_id, future))
        self._num_steps += 1

    def _stamp_first_scheduled(self, plan: SchedulerOutput) -> None:
        now = self._clock()
        for new in plan.new_requests:  # a preempted request is new to the runner again
            live = self._live[new.request_id]
            for stream in live.streams:
                if stream.timings.first_scheduled is None:
                    stream.timings.first_scheduled = now
                    if stream.on_scheduled is not None:
                        stream.on_scheduled(live.request.num_cached_tokens)

    async def _retire_step(self) -> None:
        """Wait for the oldest step in flight and book what it sampled."""
        step_id, future = self._in_flight[0]
        if future.done():
            # Readers and sockets get one turn of the event loop for every step.
            await asyncio.sleep(0)
        else:
            await until_done(future)
        self._in_flight.popleft()
        if self._dead_reason is not None:  # an abort or submit met a broken scheduler meanwhile
            return
        try:
            output = future.result()
        except Exception as error:
            self._fail_step(step_id, error)
            return
        self._num_consecutive_failures = 0
        self._updates = self._scheduler.update(output)
        if self._num_beam_groups:
            try:  # the choice comes before the next step is made
                self._updates, over = advance_beams(self._updates, self._live, self._scheduler)
            except Exception as error:
                self._die("the scheduler failed to fork a beam search", error)
                return
            for group in over:
                self._end_beams(group)
        if output.duration_s is not None and logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s", self._scheduler.pacer.last_report)

    def _end_beams(self, group: BeamGroup) -> None:
        """Give a beam search's streams their answers."""
        try:
            self._num_generation_tokens += group.put_outputs(self._clock())
        except Exception as error:
            self._fail_request(group, error)
        else:
            self._num_prompt_tokens += group.request.num_prompt_tokens
            self._end(group)

    def _publish(self) -> None:
        """Do the text work of the last retired step and leave the outputs in the mailboxes."""
        updates = self._updates
        if not updates:
            return
        self._updates = []
        now = self._clock()
        for request, token_ids, logprobs, finish_reason in updates:
            live = self._live[request.request_id]
            stream, processor = live.stream, live.processor
            sink = stream.ready_sink
            try:
                if sink is not None and finish_reason is None and processor.is_plain:
                    text = processor.text_of(token_ids)
                    if not text or sink(text):
                        stream.timings.last_token = now
                        self._num_generation_tokens += len(token_ids)
                        continue
                    output = processor.output(text, token_ids)
                else:
                    output = processor.process(
                        token_ids, logprobs, finish_reason, request.stop_reason
                    )
            except Exception as error:
                if not self._fail_request(live, error):
                    return
                continue
            timings = stream.timings
            if timings.first_token is None:
                timings.first_token = now
                self._num_prompt_tokens += request.num_prompt_tokens
            timings.last_token = now
            self._num_generation_tokens += len(output.token_ids)
            if output.finish_reason is not None:
                # A stop string: the token that the step in flight samples is discarded.
                if finish_reason is None and not self._finish(
                    live,
                    FinishReason.STOP,
                    num_output_tokens=processor.num_output_tokens,
                    stop_reason=output.stop_reason,
                ):
                    return
                self._end(live)
            stream.put(output)

    async def _wait_for_work(self) -> None:
        """Sleep until a request arrives or leaves; put the house in order if that takes long."""
        self._wake.clear()
        if self._live or self._is_stopping:
            limit_s = self._deadlines.seconds_left(self._clock()) if self._deadlines else None
            with suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self._wake.wait()
            return
        try:
            async with asyncio.timeout(self._idle_delay_s):
                await self._wake.wait()
        except TimeoutError:
            self._scheduler.check_integrity()
            await asyncio.sleep(0)
            if not self._wake.is_set():
                collect_idle()
            await self._wake.wait()

    def _fail_late(self) -> None:
        """End the requests whose limits of time have passed."""
        now = self._clock()
        if self._deadlines.seconds_left(now) > 0.0:
            return
        self._publish()  # what the step before gave them comes first
        for live, error in self._deadlines.missed(now):
            if not self._finish(live, FinishReason.ERROR):
                return
            self._end(live)
            if error.status == 503:  # it was not its own work that took too long
                error.retry_after_s = self._scheduler.seconds_to_seat
            live.fail(error)

    def _fail_request(self, live: Live, error: Exception) -> bool:
        """End one request whose text cannot be made. ``False``: as of ``_finish``."""
        logger.error("request %s failed in text work", live.request.request_id, exc_info=error)
        if not self._finish(live, FinishReason.ERROR):
            return False
        self._end(live)
        is_grammar = isinstance(error, GrammarError)
        reason = f"follow its grammar: {error}" if is_grammar else f"be decoded: {name_of(error)}"
        live.fail(EngineError(f"the output could not {reason}"))
        return True

    def _fail_step(self, step_id: int, error: Exception) -> None:
        """Roll a step back; end those that failed alone. Raises ``_DeadError`` if none can run."""
        logger.error("step %d failed", step_id, exc_info=error)
        self._publish()  # what the step before gave them comes first
        if self._dead_reason is not None:
            return
        self._num_failed_steps += 1
        if isinstance(error, DeviceDeadError):
            raise _DeadError(_NO_STEP) from error
        self._num_consecutive_failures += 1
        no_memory = is_out_of_memory(error)
        for request in self._scheduler.fail_step(step_id, out_of_memory=no_memory):
            if request.request_id == self._probe_id:
                raise _DeadError(
                    f"{self._num_consecutive_failures} steps in a row failed, the last one with"
                    " nothing in it but a token of the engine's own"
                ) from error
            live = self._live.get(request.request_id)
            # Of a beam search, one sequence's failure is that of all.
            if live is not None and self._finish(live, FinishReason.ERROR):
                self._end(live)
                live.fail(EngineError(f"the model step failed: {name_of(error)}"))
        if self._num_consecutive_failures >= MAX_CONSECUTIVE_FAILED_STEPS:
            self._send_probe()

    def _send_probe(self) -> None:
        """Run a request that nobody can have spoilt, before all others, unless one is on its way.

        Otherwise a few requests that fail wherever they run would be the end of all.
        """
        if self._probe_id in self._live:
            return
        self._probe_id = f"probe of the engine, step {self._num_steps}"
        params = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
        live = self._intake.one([0], params, 0, request_id=self._probe_id, cache_salt="probe")
        self._scheduler.add_probe(live.request)
        self._book(live)
