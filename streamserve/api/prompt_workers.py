"""Processes that read long bodies, and chats whose template may run away."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

from streamserve.api.body import parse_json_object
from streamserve.api.extras import Prompt
from streamserve.api.prompts import PROMPT_FIELDS, Endpoint, Prepared, PromptReader
from streamserve.api.token_requests import (
    TokenAnswer,
    detokenize,
    parse_detokenize_request,
    parse_tokenize_request,
    tokenize,
)
from streamserve.engine.admission import check_length
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.parsers.answer_format import AnswerFormat
from streamserve.engine.preprocess import Preprocessor
from streamserve.engine.tokenizer import Tokenizer
from streamserve.engine.worker_pool import WorkerPool, WorkerTimeoutError
from streamserve.errors import ContextLengthError, InvalidParameterError

LONG_BODY = 16 * 2**10
"""Bytes: shorter bodies hold the interpreter for a small part of a millisecond."""

_TIMEOUT_S = 10.0
_ANSWERED = frozenset({"chat", "completion", "messages"})  # and not only counted, or cut to fit
_T = TypeVar("_T")

Task = Endpoint | Literal["tokenize", "detokenize"]
TextLoader = Callable[[], tuple[Tokenizer, ChatTemplate]]


def payload_of(task: Task, raw: bytes, salt: str = "", references: bytes = b"") -> bytes:
    """What a worker is sent: a body as it came, whose it is, and what it refers to."""
    return pickle.dumps((task, raw, salt, references), pickle.HIGHEST_PROTOCOL)


class PromptWorker:
    """What a worker process does: from a body to ``Prepared``, or a ``TokenAnswer``, pickled."""

    def __init__(
        self,
        load: TextLoader,
        sampling_defaults: Mapping[str, Any],
        answer_format: AnswerFormat,
        max_model_len: int,
    ) -> None:
        tokenizer, template = load()
        self._preprocessor = Preprocessor(tokenizer, template, num_threads=0)
        self._reader = PromptReader(
            self._preprocessor, tokenizer, sampling_defaults, answer_format, max_model_len
        )
        self._answer_format = answer_format
        self._max_model_len = max_model_len

    def __call__(self, payload: bytes) -> bytes:
        """``payload`` is what ``payload_of`` makes. Raises ``RequestError``."""
        task, raw, salt, references = pickle.loads(payload)
        answer: Any
        if task == "tokenize":
            answer = self._tokenize(raw, salt)
        elif task == "detokenize":
            asked = parse_detokenize_request(parse_json_object(raw))
            answer = _result_of(detokenize(asked, self._preprocessor))
        else:
            answer = self._read(task, raw, salt, references)
        return pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)

    def _tokenize(self, raw: bytes, salt: str) -> TokenAnswer:
        asked = parse_tokenize_request(parse_json_object(raw), self._answer_format)
        return _result_of(tokenize(asked, self._preprocessor, salt, self._max_model_len))

    def _read(self, endpoint: Endpoint, raw: bytes, salt: str, references: bytes) -> Any:
        """``Prepared`` and, apart, its prompts: as arrays, which are pickled as they lie there."""
        request = self._reader.parse(endpoint, raw, references)
        prepared = _result_of(self._reader.prepare(request, salt))
        if endpoint in _ANSWERED and prepared.fields.truncation.num_tokens is None:
            self._check_length(prepared, PROMPT_FIELDS[endpoint])
        packed = [(array("I", p.token_ids), p.echo, p.is_tokenized) for p in prepared.prompts]
        return replace(prepared, prompts=[]), packed

    def _check_length(self, prepared: Prepared, param: str) -> None:
        """Refuse here what is too long: to hand millions of ids over takes longer than a step."""
        for prompt in prepared.prompts:
            try:
                check_length(len(prompt.token_ids), prepared.params, self._max_model_len)
            except ContextLengthError as error:
                error.param = param
                raise


def _result_of(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """What a coroutine returns that waits for nothing: its preprocessor has no threads."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: _T = end.value
        return result
    raise AssertionError(f"{coroutine} waits")


class PromptWorkers:
    """The processes. Event-loop thread only."""

    def __init__(
        self,
        load: TextLoader,
        sampling_defaults: Mapping[str, Any],
        answer_format: AnswerFormat,
        max_model_len: int,
    ) -> None:
        """``load`` is pickled: each process loads the tokenizer and the template by itself."""
        factory = partial(PromptWorker, load, dict(sampling_defaults), answer_format, max_model_len)
        self._pool = WorkerPool(factory)

    @property
    def pids(self) -> list[int]:
        """Of the processes that there are."""
        return self._pool.pids

    def start(self) -> None:
        """Begin to warm a process; bodies may come before it is ready."""
        self._pool.start()

    async def read(
        self, endpoint: Endpoint, raw: bytes, salt: str, references: bytes = b""
    ) -> Prepared:
        """As ``PromptReader.parse`` and ``prepare``.

        Raises ``RequestError`` for what the client did, the time limit included, and
        ``EngineError`` if the process dies.
        """
        payload = payload_of(endpoint, raw, salt, references)
        prepared: Prepared
        prepared, packed = await self._call(payload, salt, PROMPT_FIELDS[endpoint])
        prompts = [Prompt(ids.tolist(), echo, is_ours) for ids, echo, is_ours in packed]
        return replace(prepared, prompts=prompts)

    async def tokenize(self, raw: bytes, salt: str) -> TokenAnswer:
        """What ``/tokenize`` answers, but for what only the server can say. Raises as ``read``."""
        answer: TokenAnswer = await self._call(payload_of("tokenize", raw, salt), salt, "prompt")
        return answer

    async def detokenize(self, raw: bytes, salt: str) -> TokenAnswer:
        """The same for ``/detokenize``."""
        answer: TokenAnswer = await self._call(payload_of("detokenize", raw, salt), salt, "tokens")
        return answer

    async def _call(self, payload: bytes, salt: str, param: str) -> Any:
        try:
            answer = await self._pool.call(payload, timeout_s=_TIMEOUT_S, owner=salt)
        except WorkerTimeoutError:
            raise InvalidParameterError(
                f"{param} took longer than the limit of {_TIMEOUT_S:g} s to render and tokenise",
                param=param,
            ) from None
        return pickle.loads(answer)

    def close(self) -> None:
        """Kill the processes. Idempotent."""
        self._pool.close()
