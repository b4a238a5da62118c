"""The API over a real engine and a ``NullRunner``, driven as an ASGI app or over real sockets."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import orjson

from streamserve.api.app import ApiApp, create_app
from streamserve.api.prompt_workers import TextLoader
from streamserve.api.server import ApiServer, bind_sockets
from streamserve.config import (
    ApiConfig,
    CacheConfig,
    EmbeddingConfig,
    SchedulerConfig,
    SpeculativeConfig,
)
from streamserve.core.clock import Clock, monotonic
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.scheduler import Scheduler
from streamserve.engine.adapters import AdapterBank, Adapters
from streamserve.engine.async_engine import AsyncEngine
from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.fault_injection import FaultInjectingRunner
from streamserve.engine.null_runner import NullRunner
from streamserve.engine.parsers.answer_format import AnswerFormat
from streamserve.engine.preprocess import Preprocessor
from tests.engine.fakes import patient_grammars

MODEL = "org/null-model"
CREATED = 1_700_000_000
TEXT = b"abcdefghij"
MAX_MODEL_LEN = 512


class HeldPace:
    """Steps end at once, or, while held, when the test says so. Event-loop thread only."""

    def __init__(self, *, is_held: bool = False) -> None:
        self.is_held = is_held
        self.waiting: list[Callable[[], None]] = []

    def __call__(self, resolve: Callable[[], None]) -> None:
        if self.is_held:
            self.waiting.append(resolve)
        else:
            resolve()

    async def step(self) -> None:
        """Let one step end."""
        await until(lambda: bool(self.waiting))
        self.waiting.pop(0)()

    def let_go(self) -> None:
        self.is_held = False
        while self.waiting:
            self.waiting.pop(0)()


class BrokenRunner(NullRunner):
    """Fails every step from the ``good_steps``-th on."""

    def __init__(self, good_steps: int) -> None:
        super().__init__(TEXT)
        self._num_left = good_steps

    def launch(self, plan: Any) -> None:
        if self._num_left == 0:
            raise RuntimeError("the device has burnt")
        self._num_left -= 1
        super().launch(plan)


class Api:
    """An application with its parts at hand. Build it on the event loop's thread or before."""

    def __init__(
        self,
        *,
        runner: NullRunner | None = None,
        token_ids: bytes = TEXT,
        is_held: bool = False,
        num_blocks: int = 256,
        num_host_blocks: int = 0,
        num_state_slots: int = 0,
        max_num_waiting: int = 64,
        max_num_seqs: int = 8,
        clock: Clock = monotonic,
        public_prefixes: Sequence[list[int]] = (),
        speculative: SpeculativeConfig | None = None,
        generation_config: dict[str, Any] | None = None,
        max_model_len: int = MAX_MODEL_LEN,
        load_text: TextLoader | None = None,
        template: str | ChatTemplate = "plain",
        answer_format: AnswerFormat | None = None,
        embedding: EmbeddingConfig | None = None,
        has_faults: bool = False,
        adapter_bank: AdapterBank | None = None,
        **config: Any,
    ) -> None:
        self.pace = HeldPace(is_held=is_held)
        self.tokenizer = ByteTokenizer()
        scheduler_config = SchedulerConfig(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_waiting=max_num_waiting,
            speculative=speculative,
        )
        self.kv_cache = KVCacheManager(
            CacheConfig(
                num_blocks=num_blocks,
                num_host_blocks=num_host_blocks,
                num_state_slots=num_state_slots,
                block_size=16,
            ),
            public_prefixes=public_prefixes,
        )
        self.runner = runner or NullRunner(tuple(token_ids), pace=self.pace)
        faults = FaultInjectingRunner(self.runner) if has_faults else None
        self.engine = AsyncEngine(
            scheduler=Scheduler(scheduler_config, self.kv_cache, clock=clock),
            runner=faults or self.runner,
            tokenizer=self.tokenizer,
            eos_token_ids=frozenset({257}),
            max_model_len=max_model_len,
            clock=clock,
            grammars=patient_grammars(self.tokenizer),
        )
        self.adapters = None if adapter_bank is None else Adapters(adapter_bank)
        if self.adapters is not None:
            self.adapters.serve(self.engine.uses_adapter)
        self.config = ApiConfig(
            **{"served_model_names": (MODEL, "alias"), "port": 0, "drain_timeout_s": 0.0, **config}
        )
        self.app: ApiApp = create_app(
            engine=self.engine,
            preprocessor=Preprocessor(
                self.tokenizer,
                ChatTemplate.builtin(template, special_tokens=self.tokenizer.special_tokens)
                if isinstance(template, str)
                else template,
            ),
            tokenizer=self.tokenizer,
            config=self.config,
            max_model_len=max_model_len,
            generation_config=generation_config,
            answer_format=answer_format or AnswerFormat(),
            clock=clock,
            embedding=embedding or EmbeddingConfig(),
            wall_clock=lambda: CREATED + 0.5,
            load_text=load_text,
            faults=faults,
            adapters=self.adapters,
        )

    @property
    def num_used_blocks(self) -> int:
        return self.kv_cache.num_blocks - self.kv_cache.num_free_blocks

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Api"]:
        """The engine runs; requests come in through ``call``."""
        await self.engine.start()
        try:
            yield self
        finally:
            self.pace.let_go()
            await self.engine.stop()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[tuple[str, int]]:
        """A real server on this event loop; yields its address."""
        ready = asyncio.Event()
        sockets = bind_sockets(self.config)
        address = sockets[0].getsockname()
        server = ApiServer(
            self.app, self.config, sockets=sockets, on_ready=lambda _url: ready.set()
        )
        task = asyncio.create_task(server.run())
        await ready.wait()
        try:
            yield address[0], address[1]
        finally:
            self.pace.let_go()
            server.request_shutdown()
            await task

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
    ) -> "Answer":
        """One request from its first byte to its last."""
        exchange = Exchange(self.app, method, path, body, headers=headers)
        await exchange.finished()
        return Answer(exchange.messages)

    async def chat(self, **fields: Any) -> "Answer":
        return await self.call("POST", "/v1/chat/completions", chat_body(**fields))

    async def message(self, **fields: Any) -> "Answer":
        return await self.call("POST", "/v1/messages", message_body(**fields))

    async def complete(self, **fields: Any) -> "Answer":
        return await self.call("POST", "/v1/completions", {"prompt": "Hi", **fields})


class Exchange:
    """One ASGI request in flight: what was sent so far, and a client that can leave or stall."""

    def __init__(
        self,
        app: Any,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
    ) -> None:
        # Not orjson: a client may send integers that it cannot write.
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        if body is None:
            raw = b""
        given = {"content-type": "application/json", **(headers or {})}
        self.messages: list[dict[str, Any]] = []
        self._body: list[dict[str, Any]] = [{"type": "http.request", "body": raw}]
        self._gone = asyncio.Event()
        self._changed = asyncio.Event()
        self._may_write = asyncio.Event()
        self._may_write.set()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path.partition("?")[0],
            "raw_path": path.partition("?")[0].encode(),
            "query_string": path.partition("?")[2].encode(),
            "root_path": "",
            "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in given.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "state": {},
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    def leave(self) -> None:
        """The client disconnects."""
        self._gone.set()

    def stall(self) -> None:
        """The client reads no more."""
        self._may_write.clear()

    def read_on(self) -> None:
        self._may_write.set()

    async def finished(self) -> None:
        async with asyncio.timeout(60):
            await self.task

    async def until(self, condition: Callable[["Exchange"], bool]) -> None:
        """Wait for messages until ``condition``."""
        async with asyncio.timeout(60):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.messages[1:])

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            return self._body.pop(0)
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self._may_write.wait()
        self.messages.append(message)
        self._changed.set()
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._gone.set()


class Answer:
    """A whole response."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        assert messages[0]["type"] == "http.response.start"
        assert not messages[-1].get("more_body", False), "the response has not ended"
        self.status: int = messages[0]["status"]
        self.headers = {k.decode(): v.decode() for k, v in messages[0]["headers"]}
        self.writes = [m.get("body", b"") for m in messages[1:]]
        self.body = b"".join(self.writes)

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return error_of(self.json)

    @property
    def events(self) -> list[Any]:
        return events_of(self.body)


def error_of(content: dict[str, Any]) -> dict[str, Any]:
    """The error in a body, in OpenAI's shape or in Anthropic's."""
    error: dict[str, Any] = content["error"]
    if content.get("type") == "error":
        assert set(content) <= {"type", "error", "request_id"}
        assert set(error) == {"type", "message"}
    else:
        assert set(content) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
    return error


def events_of(body: bytes) -> list[Any]:
    """The events of an SSE body: objects, and ``"[DONE]"``; comments as ``": …"``."""
    assert body.endswith(b"\n\n")
    events: list[Any] = []
    for block in body[:-2].split(b"\n\n"):
        if block.startswith(b":"):
            events.append(block.decode())
            continue
        assert block.startswith(b"data: "), block
        assert b"\n" not in block
        data = block.removeprefix(b"data: ")
        events.append("[DONE]" if data == b"[DONE]" else orjson.loads(data))
    return events


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **fields}


HI = {"role": "user", "content": "Hi"}


def message_body(**fields: Any) -> dict[str, Any]:
    """A body of `/v1/messages`."""
    return {"model": MODEL, "max_tokens": 300, "messages": [HI], **fields}


def text_of(events: list[Any], index: int = 0) -> str:
    """The text of one choice over all chunks."""
    text = ""
    for event in events:
        if isinstance(event, dict):
            for choice in event["choices"]:
                if choice["index"] == index:
                    text += (
                        choice["text"] if "text" in choice else choice["delta"].get("content", "")
                    )
    return text


def joined(deltas: list[dict[str, Any]], field: str) -> str:
    """What the deltas of a stream say in one of their fields."""
    return "".join(delta.get(field) or "" for delta in deltas)


async def until(condition: Callable[[], bool]) -> None:
    """Give the event loop turns until ``condition`` holds."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


@contextlib.contextmanager
def server_thread(**api: Any) -> Iterator[str]:
    """A real server on a thread and an event loop of its own, for blocking clients."""
    ready = threading.Event()
    urls: list[str] = []
    stops: list[Callable[[], None]] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        parts = Api(**api)

        def on_ready(url: str) -> None:
            urls.append(url)
            ready.set()

        server = ApiServer(parts.app, parts.config, on_ready=on_ready)
        stops.append(lambda: loop.call_soon_threadsafe(server.request_shutdown))
        await server.run()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert ready.wait(60)
        yield urls[0]
    finally:
        stops[0]()
        thread.join(60)
        assert not thread.is_alive()
