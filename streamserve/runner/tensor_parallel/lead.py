"""The first rank's runner: what it is asked to do, all ranks do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Protocol

from streamserve.core.clock import Clock, monotonic
from streamserve.core.death import Death
from streamserve.core.plan import Masks, ModelRunner, ModelRunnerOutput, SchedulerOutput
from streamserve.errors import DeviceDeadError
from streamserve.runner.tensor_parallel.messages import Call, Launch, Message, Sample

STEP_LIMIT_S = 300.0
"""No step takes so long: a rank hangs."""
_LOOK_EVERY_S = 1.0
_CLOSE_LIMIT_S = 20.0


class Followers(Protocol):
    """The other ranks, as the first one sees them."""

    @property
    def failure(self) -> DeviceDeadError | None:
        """Why no step can run any more."""
        ...

    def send(self, message: Message) -> None:
        """Tells all of them, in order. Never waits, also for one that is gone."""
        ...

    def on_failure(self, tell: Callable[[DeviceDeadError], None]) -> None:
        """Has ``tell`` called, once and on any thread, when one is gone or `fail` was called."""
        ...

    def fail(self, error: DeviceDeadError) -> None:
        """Ends them all at once, since they are out of step. Any thread; the first error counts."""
        ...

    def close(self) -> None:
        """Waits until they have ended, but not for ever. Idempotent."""
        ...


class LeadRunner:
    """``core.plan.ModelRunner`` over all ranks.

    Whatever fails in a step, on whichever rank, is the end of all steps: the others would wait for
    a sum that never comes.
    """

    def __init__(
        self,
        own: ModelRunner,
        followers: Followers,
        commands: Mapping[str, Callable[[], None]],
        *,
        release: Callable[[], None] = lambda: None,
        clock: Clock = monotonic,
    ) -> None:
        """``own`` is this rank's; ``release`` comes last of all."""
        self._own = own
        self._followers = followers
        self._commands = commands
        self._release = release
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[Future[ModelRunnerOutput], float]] = {}
        self._death = Death()
        self._is_closed = threading.Event()
        followers.on_failure(self._die)
        own.on_death(followers.fail)
        self._watch = threading.Thread(target=self._look, name="streamserve-ranks", daemon=True)
        self._watch.start()

    @property
    def num_compilations(self) -> int:
        """Of this rank: the others compile the same."""
        return self._own.num_compilations

    def launch(self, plan: SchedulerOutput) -> None:
        """See ``core.plan.ModelRunner``. Raises DeviceDeadError once a rank is gone."""
        self._raise_if_dead()
        self._own.launch(plan)
        self._followers.send(Launch(plan))

    def sample(self, step_id: int, masks: Masks | None = None) -> Future[ModelRunnerOutput]:
        """See ``core.plan.ModelRunner``. Raises DeviceDeadError once a rank is gone."""
        self._raise_if_dead()
        found = self._own.sample(step_id, masks)
        self._followers.send(Sample(step_id, bool(masks)))
        future: Future[ModelRunnerOutput] = Future()
        with self._lock:
            self._pending[step_id] = future, self._clock()
        found.add_done_callback(partial(self._resolve, step_id))
        if self._death.cause is not None:  # it came between the check and now
            self._die(self._death.cause)
        return future

    def on_death(self, hear: Callable[[DeviceDeadError], None]) -> None:
        """See ``core.plan.ModelRunner``. Any rank's is that of all."""
        self._death.on_death(hear)

    def call(self, name: str) -> None:
        """Has every rank do what has this name. Only between two steps."""
        self._raise_if_dead()
        self._followers.send(Call(name))
        self._commands[name]()

    def close(self) -> None:
        """Finish every step whose sample was asked for, then end all ranks. Idempotent."""
        if self._is_closed.is_set():
            return
        is_stuck = False
        if self._death.cause is None:
            self._own.close()
            self._is_closed.set()
            self._followers.send(None)
        else:
            # What the device thread waits for may never come: nobody waits for it for ever.
            self._is_closed.set()
            closing = threading.Thread(target=self._own.close, daemon=True)
            closing.start()
            closing.join(_CLOSE_LIMIT_S)
            is_stuck = closing.is_alive()
        self._followers.close()
        self._watch.join()
        self._commands = {}  # they hold the model
        if not is_stuck:
            self._release()

    def _resolve(self, step_id: int, found: Future[ModelRunnerOutput]) -> None:
        error = found.exception()
        if error is not None:
            dead = DeviceDeadError(f"a step failed on the first of several ranks: {error!r}")
            dead.__cause__ = error
            self._followers.fail(dead)
            return
        with self._lock:
            future, _ = self._pending.pop(step_id, (None, 0.0))
        if future is not None and future.set_running_or_notify_cancel():
            future.set_result(found.result())

    def _die(self, error: DeviceDeadError) -> None:
        self._death.tell(error)
        with self._lock:
            pending = [future for future, _ in self._pending.values()]
            self._pending.clear()
        for future in pending:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _raise_if_dead(self) -> None:
        if self._death.cause is not None:
            raise self._death.cause

    def _look(self) -> None:
        """Steps that do not end are the end of all."""
        while not self._is_closed.wait(_LOOK_EVERY_S):
            with self._lock:
                since = min((at for _, at in self._pending.values()), default=None)
            if since is not None and self._clock() - since > STEP_LIMIT_S:
                self._followers.fail(
                    DeviceDeadError(f"no step has ended on all ranks for {STEP_LIMIT_S:.0f} s")
                )
                return
