"""SSE comments before the first token, if a stream asks for them: ``include_progress``.

::

    : progress {"index":0,"state":"queued","place":3}
    : progress {"index":0,"state":"prefill","computed_tokens":512,"prompt_tokens":2048}
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import orjson

from streamserve.engine.progress import RequestProgress
from streamserve.engine.stream import RequestStream

INTERVAL_S = 0.2


class ProgressComments:
    """Writes what has changed every ``INTERVAL_S``, until each stream has its first token.

    ``write_now`` says whether there was room; what found none is old news by the next time.
    """

    def __init__(
        self,
        streams: Sequence[RequestStream],
        progress_of: Callable[[str], RequestProgress | None],
        write_now: Callable[[bytes], bool],
    ) -> None:
        self._waiting = dict(enumerate(streams))
        self._progress_of = progress_of
        self._write_now = write_now
        self._said: dict[int, RequestProgress] = {}
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Say where the streams stand now, and go on."""
        for index, stream in list(self._waiting.items()):
            progress = self._progress_of(stream.request_id)
            if progress is None or stream.timings.first_token is not None:
                del self._waiting[index]
            elif progress != self._said.get(index) and self._write_now(comment(index, progress)):
                self._said[index] = progress
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(INTERVAL_S, self.start)

    def stop(self) -> None:
        """Say no more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()


def comment(index: int, progress: RequestProgress) -> bytes:
    """The comment about one choice."""
    if progress.place:
        content = {"index": index, "state": "queued", "place": progress.place}
    else:
        content = {
            "index": index,
            "state": "prefill",
            "computed_tokens": progress.num_computed_tokens,
            "prompt_tokens": progress.num_prompt_tokens,
        }
    return b": progress " + orjson.dumps(content) + b"\n\n"
