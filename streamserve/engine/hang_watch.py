"""Whether the engine hangs: its step counter stands still although there is work for it."""

from __future__ import annotations

import logging
import sys
import threading
import traceback

from streamserve.core.clock import Clock
from streamserve.engine.async_engine import AsyncEngine

logger = logging.getLogger(__name__)


class HangWatch:
    """Looks at an engine from time to time; the step loop knows nothing of it.

    A busy engine steps, an idle one has no work: one that does neither for ``limit_s`` hangs. The
    first time that it does, every thread's stack goes into the log. Event-loop thread only.
    """

    def __init__(self, engine: AsyncEngine, clock: Clock, limit_s: float) -> None:
        self._engine = engine
        self._clock = clock
        self._limit_s = limit_s
        self._num_steps = -1
        self._since = clock()
        self._is_reported = False

    @property
    def limit_s(self) -> float:
        """How long a step may take."""
        return self._limit_s

    @property
    def is_hung(self) -> bool:
        """Whether the engine hangs now."""
        return self.stalled_s() >= self._limit_s

    def stalled_s(self) -> float:
        """For how long the engine has had work and made no step, as far as it was looked at."""
        now = self._clock()
        num_steps = self._engine.num_steps
        if num_steps != self._num_steps or not self._engine.has_work:
            self._num_steps = num_steps
            self._since = now
            self._is_reported = False
        stalled_s = now - self._since
        if stalled_s >= self._limit_s and not self._is_reported:
            self._is_reported = True
            logger.critical("no step has ended for %.0f s\n%s", stalled_s, _stacks())
        return stalled_s


def _stacks() -> str:
    """What each thread is doing, the main thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
    )
