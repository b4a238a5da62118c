"""How a runner says that it is dead, also while nobody asks it for anything."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from streamserve.errors import DeviceDeadError


class Death:
    """What is behind ``ModelRunner.on_death``. Any thread."""

    def __init__(self) -> None:
        self._told: Future[DeviceDeadError] = Future()

    @property
    def cause(self) -> DeviceDeadError | None:
        """Why no step can run any more; None: some can."""
        return self._told.result() if self._told.done() else None

    def on_death(self, hear: Callable[[DeviceDeadError], None]) -> None:
        """See ``core.plan.ModelRunner``."""
        self._told.add_done_callback(lambda told: hear(told.result()))

    def tell(self, cause: DeviceDeadError) -> None:
        """Tells all who listen; the first cause counts."""
        with suppress(InvalidStateError):
            self._told.set_result(cause)
