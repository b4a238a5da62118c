"""A whole server without a model: what everything but the model costs.

    python -m loadtest.null_server --port 8000

The ``NullRunner`` gives one token to each stream in each step, and the next step starts when every
stream's mailbox is empty, so no two tokens of a stream ever share a frame.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from streamserve.api.app import ApiApp, create_app
from streamserve.api.server import serve
from streamserve.config import ApiConfig, CacheConfig, SchedulerConfig
from streamserve.core.clock import monotonic
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.scheduler import Scheduler
from streamserve.engine.async_engine import AsyncEngine
from streamserve.engine.garbage import freeze_gc
from streamserve.engine.null_runner import NullRunner, Pace
from streamserve.engine.preprocess import Preprocessor
from streamserve.engine.stream import RequestStream
from streamserve.engine.text_source import TextSource, byte_text

MODEL_NAME = "null"
MAX_MODEL_LEN = 2**20
_TEXT = " the quick brown fox jumps over the lazy dog"


class StreamList:
    """The live streams of an engine, and whether all of them have been read."""

    def __init__(self) -> None:
        self._streams: list[RequestStream] = []

    def add(self, stream: RequestStream) -> None:
        """Watch one more stream until it ends."""
        self._streams.append(stream)

    def are_drained(self) -> bool:
        """Whether every mailbox is empty. Forgets what has ended."""
        has_ended = False
        for stream in self._streams:
            if stream.has_ended:
                has_ended = True
            elif not stream.is_drained:
                return False
        if has_ended:
            self._streams = [stream for stream in self._streams if not stream.has_ended]
        return True


class WatchedEngine(AsyncEngine):
    """An engine that lists its streams."""

    streams: StreamList

    def submit(self, *args: Any, **kwargs: Any) -> RequestStream:
        stream = super().submit(*args, **kwargs)
        self.streams.add(stream)
        return stream


def pace_of_readers(streams: StreamList) -> Pace:
    """A step ends when the tokens of the one before have been read."""

    def pace(resolve: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()

        def check() -> None:
            if streams.are_drained():
                resolve()
            else:
                loop.call_soon(check)

        loop.call_soon(check)

    return pace


class DeviceOfTime:
    """A ``Pace`` of steps that take ``step_s`` each, one after the other, in a thread of its own.

    As beside a real device a step may be queued while the one before runs.
    """

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._queued: SimpleQueue[tuple[float, Callable[[], None]]] = SimpleQueue()
        threading.Thread(target=self._run, name="device-of-time", daemon=True).start()

    def __call__(self, resolve: Callable[[], None]) -> None:
        """Queue a step, whose end ``resolve`` tells."""
        self._queued.put((monotonic(), resolve))

    def _run(self) -> None:
        end = 0.0
        while True:
            queued_at, resolve = self._queued.get()
            end = max(end, queued_at) + self._step_s
            time.sleep(max(0.0, end - monotonic()))
            resolve()


def build_app(
    config: ApiConfig,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int = 8192,
    step_s: float | None = None,
    max_steps_in_flight: int = 1,
    tokenizer_path: str | None = None,
) -> ApiApp:
    """The application over a ``NullRunner``, paced by its readers unless ``step_s`` is given."""
    streams = StreamList()
    pace = pace_of_readers(streams) if step_s is None else DeviceOfTime(step_s)
    load_text = byte_text if tokenizer_path is None else TextSource(Path(tokenizer_path))
    tokenizer, template = load_text()
    token_ids = tokenizer.encode(_TEXT, add_special_tokens=False)
    cache = CacheConfig(num_blocks=2**16, block_size=16)
    scheduler_config = SchedulerConfig(
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_steps_in_flight=max_steps_in_flight,
    )
    engine = WatchedEngine(
        scheduler=Scheduler(scheduler_config, KVCacheManager(cache), clock=monotonic),
        runner=NullRunner(tuple(token_ids), pace=pace),
        tokenizer=tokenizer,
        eos_token_ids=frozenset(),
        max_model_len=MAX_MODEL_LEN,
    )
    engine.streams = streams
    return create_app(
        engine=engine,
        preprocessor=Preprocessor(tokenizer, template),
        tokenizer=tokenizer,
        config=config,
        max_model_len=MAX_MODEL_LEN,
        load_text=load_text,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until Ctrl-C; prints the URL when ready."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.null_server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--step-ms", type=float, help="of a step, instead of the readers' pace")
    parser.add_argument("--steps-in-flight", type=int, default=1, help="2: as beside a GPU")
    parser.add_argument("--tokenizer", help="directory of a checkpoint, instead of bytes")
    parser.add_argument("--drain-timeout", type=float, default=1.0, help="seconds")
    parser.add_argument("--profile", help="write a cProfile of the run into this file")
    args = parser.parse_args(argv)
    config = ApiConfig(
        served_model_names=(MODEL_NAME,),
        host=args.host,
        port=args.port,
        drain_timeout_s=args.drain_timeout,
    )
    step_s = None if args.step_ms is None else args.step_ms / 1e3
    app = build_app(
        config,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        step_s=step_s,
        max_steps_in_flight=args.steps_in_flight,
        tokenizer_path=args.tokenizer,
    )

    def ready(url: str) -> None:
        freeze_gc()
        sys.stdout.write(f"{url}\n")
        sys.stdout.flush()

    if args.profile is None:
        serve(app, config, on_ready=ready)
        return
    import cProfile

    with cProfile.Profile() as profile:
        serve(app, config, on_ready=ready)
    profile.dump_stats(args.profile)


if __name__ == "__main__":
    main()
