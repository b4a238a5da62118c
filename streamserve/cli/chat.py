"""``streamserve chat``: a terminal chat that streams, against a server or an engine of its own."""

from __future__ import annotations

import asyncio
import sys
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Protocol

import httpx
import orjson

from streamserve.cli.args import check_flags
from streamserve.cli.environment import api_key_of_environment, whole_text
from streamserve.cli.terminal import (
    Piece,
    Screen,
    forget_stdout,
    is_typed,
    prepare_typing,
    read_line,
    read_message,
)
from streamserve.core.sampling_params import SamplingParams
from streamserve.errors import StreamServeError

Message = dict[str, str]

_HELP = """/system TEXT  set the system prompt and start anew (without TEXT: show it)
/reset        forget the conversation
/help         this list
/exit         leave (also Ctrl-D; Ctrl-C stops an answer)

Several lines: end all but the last with \\, or put \"\"\" before and behind them."""


class ChatBackend(Protocol):
    """Something that answers a conversation piece by piece."""

    name: str

    def answer(self, messages: list[Message]) -> AsyncIterator[Piece]:
        """Yield the answer as it comes; raises ``StreamServeError``."""

    async def close(self) -> None:
        """Free what the backend holds."""


class HttpBackend:
    """Talks to a running server's OpenAI API."""

    def __init__(self, client: httpx.AsyncClient, name: str, options: dict[str, object]) -> None:
        self.name = name
        self._client = client
        self._options = options

    @classmethod
    async def connect(
        cls, url: str, *, api_key: str | None, model: str | None, options: dict[str, object]
    ) -> HttpBackend:
        """Connect to ``url``, which may lack ``http://`` or end in ``/v1``, and pick a model."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        base = url.rstrip("/").removesuffix("/v1")
        if "://" not in base:
            base = f"http://{base}"
        timeout = httpx.Timeout(10.0, read=None)
        client = httpx.AsyncClient(base_url=base, headers=headers, timeout=timeout)
        try:
            response = await client.get("/v1/models")
            await _raise_for_error(response)
            names = [entry["id"] for entry in orjson.loads(response.content)["data"]]
            if model is not None and model not in names:
                raise StreamServeError(f"{base} serves {', '.join(names)}, not {model!r}")
        except httpx.HTTPError as error:
            await client.aclose()
            raise StreamServeError(
                f"cannot reach {base}: {error or type(error).__name__}"
            ) from error
        except StreamServeError:
            await client.aclose()
            raise
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            await client.aclose()
            raise StreamServeError(f"{base} does not answer like an OpenAI API") from error
        return cls(client, model or names[0], options)

    async def answer(self, messages: list[Message]) -> AsyncIterator[Piece]:
        """Yield the deltas of one streamed completion."""
        body = {"model": self.name, "messages": messages, "stream": True, **self._options}
        done = False
        try:
            async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                await _raise_for_error(response)
                async for line in response.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    if line == "data: [DONE]":
                        done = True
                        break
                    chunk = orjson.loads(line[6:])
                    if "error" in chunk:
                        raise StreamServeError(chunk["error"]["message"])
                    for choice in chunk["choices"]:
                        delta = choice["delta"]
                        if text := delta.get("reasoning_content") or delta.get("reasoning"):
                            yield Piece(text, is_thought=True)
                        if text := delta.get("content"):
                            yield Piece(text)
        except httpx.HTTPError as error:
            raise StreamServeError(
                f"the connection broke: {error or type(error).__name__}"
            ) from error
        if not done:
            raise StreamServeError("the server closed the stream before it was done")

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


async def _raise_for_error(response: httpx.Response) -> None:
    if response.is_success:
        return
    body = await response.aread()
    try:
        message = orjson.loads(body)["error"]["message"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = body.decode(errors="replace")[:200]
    raise StreamServeError(f"the server answered {response.status_code}: {message}")


class Conversation:
    """The messages so far and the commands that change them."""

    def __init__(self, system: str | None) -> None:
        self.messages: list[Message] = []
        self.system = system
        self.reset()

    def reset(self, system: str | None = None) -> None:
        """Forget everything but the system prompt (or take a new one)."""
        self.system = system or self.system
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, question: str) -> list[Message]:
        """All that was said, and the question."""
        self.messages.append({"role": "user", "content": question})
        return self.messages

    def answered(self, answer: str) -> None:
        """What was said so far; nothing takes the question back: most templates want pairs."""
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.messages.pop()


def chat_loop(
    runner: asyncio.Runner,
    backend: ChatBackend,
    conversation: Conversation,
    screen: Screen,
    read: Callable[[str], str] = read_line,
) -> None:
    """Read messages, stream answers, until the input ends.

    Ctrl-C stops the answer that is running; where none is, twice in a row leaves.
    """
    prompt = "> " if is_typed() else ""
    is_leaving = False
    while True:
        try:
            message = read_message(read, prompt)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if is_leaving or not prompt:
                return
            print("Ctrl-C again, Ctrl-D or /exit leaves")
            is_leaving = True
            continue
        is_leaving = False
        if message in {"/exit", "/quit"}:
            return
        if message.startswith("/"):
            _command(message, conversation)
        elif message:
            _answer(runner, backend, conversation, screen, message)


def _answer(
    runner: asyncio.Runner,
    backend: ChatBackend,
    conversation: Conversation,
    screen: Screen,
    message: str,
) -> None:
    pieces: list[str] = []
    try:
        runner.run(_show_answer(backend, conversation.ask(message), screen, pieces))
        screen.end()
    except KeyboardInterrupt:
        screen.end(" [stopped]")
    except StreamServeError as error:
        screen.end()
        print(f"[{error}]", file=sys.stderr)
        pieces.clear()
    conversation.answered("".join(pieces))


async def _show_answer(
    backend: ChatBackend, messages: list[Message], screen: Screen, pieces: list[str]
) -> None:
    async with aclosing(backend.answer(messages)) as answer:  # type: ignore[type-var]
        async for piece in answer:
            if not piece.is_thought:
                pieces.append(piece.text)
            screen.show(piece)


def _command(line: str, conversation: Conversation) -> None:
    name, _, argument = line.partition(" ")
    if name == "/reset":
        conversation.reset()
    elif name == "/system" and argument.strip():
        conversation.reset(argument.strip())
    elif name == "/system":
        print(conversation.system or "there is no system prompt")
    elif name == "/help":
        print(_HELP)
    else:
        print(f"there is no {name}\n{_HELP}")


def run_chat(args: Namespace) -> int:
    """Chat until the input ends. Returns the exit code; raises ``StreamServeError``."""
    options = request_options(args)
    conversation = Conversation(None if args.system is None else whole_text(args.system))
    with asyncio.Runner() as runner:
        backend = runner.run(_connect(args, options)) if args.url else _start(args, runner, options)
        try:
            if is_typed():
                prepare_typing()
                print(f"chatting with {backend.name}; /help lists the commands, Ctrl-D leaves")
            chat_loop(runner, backend, conversation, Screen.of_stdout())
        except BrokenPipeError:
            forget_stdout()
        finally:
            runner.run(backend.close())
    return 0


async def _connect(args: Namespace, options: dict[str, object]) -> ChatBackend:
    api_key = args.api_key or api_key_of_environment()
    return await HttpBackend.connect(
        args.url, api_key=api_key, model=args.model_name, options=options
    )


def _start(args: Namespace, runner: asyncio.Runner, options: dict[str, object]) -> ChatBackend:
    # With --url none of this is needed, and torch takes a second to import.
    from streamserve.cli.compose import build_service
    from streamserve.cli.local_chat import LocalBackend

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    check_flags(args)
    backend = LocalBackend(build_service(args, say=say, warn=say), options)
    runner.run(backend.start())
    return backend


def request_options(args: Namespace) -> dict[str, Any]:
    """Return the request fields that the flags set; what is unset stays the server's default."""
    options: dict[str, Any] = {}
    if args.max_tokens is not None:
        options["max_tokens"] = args.max_tokens
    if args.temperature is not None:
        options["temperature"] = args.temperature
    SamplingParams(**options)  # or why not, before anything is loaded
    return options
