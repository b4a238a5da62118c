"""From a request's bytes to token ids: in this process, or, where that would hold up the streams,
in a worker process, which takes the bytes as they came.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from streamserve.api.answer_plan import AnswerPlan, Parsing
from streamserve.api.body import parse_json_object
from streamserve.api.chat_request import ChatRequest, parse_chat_request
from streamserve.api.choices import Choices
from streamserve.api.completion_request import parse_completion_request
from streamserve.api.embedding_request import EmbeddingRequest, parse_embedding_request
from streamserve.api.extras import ExtraFields, Prompt
from streamserve.api.harmony_plan import plan_answer
from streamserve.api.message_request import parse_count_request, parse_messages_request
from streamserve.api.responses.before import read_context
from streamserve.api.responses.prompt import attempts
from streamserve.api.responses.request import ResponsesRequest, Settings, parse_responses_request
from streamserve.api.sampling import Common
from streamserve.api.token_requests import TokenAnswer, detokenize, tokenize
from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.admission import check_length
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.parsers.answer_format import AnswerFormat, MarkIds
from streamserve.engine.preprocess import ChatPrompt, PromptEncoder
from streamserve.engine.tokenizer import Tokenizer
from streamserve.engine.worker_pool import WorkerPool, WorkerTimeoutError
from streamserve.errors import ContextLengthError, InvalidParameterError

LONG_BODY = 16 * 2**10
"""Bytes: shorter bodies hold the interpreter for a small part of a millisecond."""

_TIMEOUT_S = 10.0
_TOKENIZE, _DETOKENIZE = b"t", b"d"

Endpoint = Literal["chat", "completion", "count_tokens", "embedding", "messages", "response"]

# What a payload begins with, and the field that a client would have to shorten.
_ENDPOINTS: dict[Endpoint, tuple[bytes, str]] = {
    "chat": (b"c", "messages"),
    "completion": (b"p", "prompt"),
    "response": (b"r", "input"),
    "count_tokens": (b"n", "messages"),
    "messages": (b"m", "messages"),
    "embedding": (b"e", "input"),
}
_PARAMS = dict(_ENDPOINTS.values())
_ANSWERED = frozenset({b"c", b"m", b"p"})  # and not only counted, or cut to fit
TextLoader = Callable[[], tuple[Tokenizer, ChatTemplate]]
ChatParser = Callable[[Mapping[str, Any], Mapping[str, Any]], ChatRequest]
"""From a body and the model's sampling defaults to a chat."""


@dataclass(frozen=True, slots=True)
class Work:
    """A parsed request, ready for the engine. ``parsing`` is for text that is more than content,
    ``settings`` is of ``/v1/responses``, ``encoding_format`` that of vectors.
    """

    common: Common
    params: SamplingParams
    prompts: list[Prompt]
    fields: ExtraFields
    choices: Choices
    parsing: Parsing | None = None
    settings: Settings | None = None
    encoding_format: str = "float"

    @property
    def prompts_of_streams(self) -> list[Prompt]:
        """The prompt of each stream of the engine's, in order."""
        choices = self.choices
        per_prompt = choices.n if choices.beams is not None else choices.num_candidates
        return [prompt for prompt in self.prompts for _ in range(per_prompt)]


def chat_work(request: ChatRequest, plan: AnswerPlan, prompt: ChatPrompt, marks: MarkIds) -> Work:
    """A chat whose prompt was rendered."""
    prompts = [Prompt(prompt.token_ids)]
    work = Work(request.common, request.params, prompts, request.extras, request.choices)
    if plan.is_plain:
        return work
    text = prompt.text
    return replace(work, params=plan.params(text, marks), parsing=plan.parsing(text))


def pack_response(raw: bytes, context: bytes) -> bytes:
    """A body of ``/v1/responses`` and what it refers to, for ``unpack_response``."""
    return len(context).to_bytes(8) + context + raw


def unpack_response(payload: bytes | memoryview, defaults: Mapping[str, Any]) -> ResponsesRequest:
    """The request in ``payload``. Raises ``InvalidParameterError``."""
    start = 8 + int.from_bytes(payload[:8])
    context = read_context(payload[8:start])
    return parse_responses_request(parse_json_object(payload[start:]), defaults, context)


def next_attempt(search: Generator[ChatRequest, int, None], work: Work) -> ChatRequest | None:
    """The chat to render instead of ``work``, if there must be another."""
    try:
        return search.send(len(work.prompts[0].token_ids))
    except StopIteration:
        return None


def embedding_work(request: EmbeddingRequest, prompts: list[Prompt]) -> Work:
    """Inputs that were tokenised, one request each."""
    fields = ExtraFields(False, False, None, request.truncation)
    return Work(
        request.common,
        request.params,
        prompts,
        fields,
        Choices(),
        encoding_format=request.encoding_format,
    )


def payload_of(kind: bytes, raw: bytes, salt: str = "") -> bytes:
    """What a worker is sent: a letter for the endpoint, whose body it is, and the body."""
    return b"".join((kind, bytes((len(salt),)), salt.encode(), raw))


class PromptReader:
    """What a worker process does: from a body to ``Work``, which travels pickled."""

    def __init__(
        self,
        load: TextLoader,
        sampling_defaults: Mapping[str, Any],
        answer_format: AnswerFormat,
        max_model_len: int,
    ) -> None:
        self._tokenizer, template = load()
        self._encoders = PromptEncoder(self._tokenizer, template)
        self._encoder = self._encoders  # of the body at hand
        self._answer_format = answer_format
        self._mark_ids = MarkIds(self._tokenizer)
        self._defaults = sampling_defaults
        self._max_model_len = max_model_len
        self._readers: dict[bytes, Callable[[memoryview], Work]] = {
            b"c": partial(self._chat, parse_chat_request),
            b"m": partial(self._chat, parse_messages_request),
            b"n": partial(self._chat, parse_count_request),
            b"p": self._completion,
            b"r": self._response,
            b"e": self._embedding,
        }

    def __call__(self, payload: bytes) -> bytes:
        """``payload`` is what ``payload_of`` makes. Raises ``RequestError``."""
        kind, size = payload[:1], payload[1]
        self._encoder = self._encoders.of(payload[2 : 2 + size].decode())
        body = memoryview(payload)[2 + size :]
        if kind in (_TOKENIZE, _DETOKENIZE):
            return pickle.dumps(self._tokens(kind, body), pickle.HIGHEST_PROTOCOL)
        work = self._readers[kind](body)
        if kind in _ANSWERED and work.fields.truncation.num_tokens is None:
            self._check_length(work, _PARAMS[kind])
        packed = [(array("I", p.token_ids), p.echo, p.is_tokenized) for p in work.prompts]
        return pickle.dumps((replace(work, prompts=[]), packed), pickle.HIGHEST_PROTOCOL)

    def _check_length(self, work: Work, param: str) -> None:
        """Refuse here what is too long: to hand millions of ids over takes longer than a step."""
        for prompt in work.prompts:
            try:
                check_length(len(prompt.token_ids), work.params, self._max_model_len)
            except ContextLengthError as error:
                error.param = param
                raise

    def _tokens(self, kind: bytes, raw: memoryview) -> TokenAnswer:
        body = parse_json_object(raw)
        if kind == _DETOKENIZE:
            return detokenize(body, self._encoder)
        return tokenize(body, self._encoder, self._answer_format, self._max_model_len)

    def _chat(self, parse: ChatParser, raw: memoryview) -> Work:
        return self._rendered(parse(parse_json_object(raw), self._defaults))

    def _response(self, payload: memoryview) -> Work:
        request = unpack_response(payload, self._defaults)
        search = attempts(request, self._max_model_len)
        chat: ChatRequest | None = next(search)
        while chat is not None:
            work = self._rendered(chat)
            chat = next_attempt(search, work)
        return replace(work, settings=request.settings)

    def _rendered(self, request: ChatRequest) -> Work:
        plan = plan_answer(request, self._answer_format)
        prompt = self._encoder.chat(plan.messages, **plan.rendering)
        return chat_work(request, plan, prompt, self._mark_ids)

    def _completion(self, raw: memoryview) -> Work:
        request = parse_completion_request(parse_json_object(raw), self._defaults)
        prompts = [
            self._prompt(given, request.add_special_tokens, echo=request.echo)
            for given in request.prompts
        ]
        return Work(request.common, request.params, prompts, request.extras, request.choices)

    def _embedding(self, payload: memoryview) -> Work:
        request = parse_embedding_request(parse_json_object(payload))
        prompts = [self._prompt(given, request.add_special_tokens) for given in request.inputs]
        return embedding_work(request, prompts)

    def _prompt(
        self, given: str | list[int], add_special_tokens: bool, *, echo: bool = False
    ) -> Prompt:
        """Text is tokenised; with ``echo`` it is kept, and that of token ids made."""
        if isinstance(given, str):
            token_ids = self._encoder.encode(given, add_special_tokens=add_special_tokens)
            return Prompt(token_ids, given if echo else "")
        return Prompt(given, self._tokenizer.decode(given) if echo else "", is_tokenized=False)


class PromptWorkers:
    """The processes that read long bodies. Event-loop thread only."""

    def __init__(
        self,
        load: TextLoader,
        sampling_defaults: Mapping[str, Any],
        answer_format: AnswerFormat,
        max_model_len: int,
    ) -> None:
        """``load`` is pickled: each process loads the tokenizer and the template by itself."""
        factory = partial(PromptReader, load, dict(sampling_defaults), answer_format, max_model_len)
        self._pool = WorkerPool(factory)

    @property
    def pids(self) -> list[int]:
        """Of the processes that there are."""
        return self._pool.pids

    def start(self) -> None:
        """Begin to warm a process; bodies may come before it is ready."""
        self._pool.start()

    async def read(self, endpoint: Endpoint, raw: bytes, salt: str) -> Work:
        """Parse, render and tokenise; ``salt`` as of ``Preprocessor.encode``.

        Raises ``RequestError`` for what the client did, the time limit included, and
        ``EngineError`` if the process dies.
        """
        kind, param = _ENDPOINTS[endpoint]
        work: Work
        work, packed = await self._call(kind, raw, salt, param)
        prompts = [Prompt(ids.tolist(), echo, is_ours) for ids, echo, is_ours in packed]
        return replace(work, prompts=prompts)

    async def tokenize(self, raw: bytes, salt: str) -> TokenAnswer:
        """What ``/tokenize`` answers, but for what only the server can say. Raises as ``read``."""
        answer: TokenAnswer = await self._call(_TOKENIZE, raw, salt, "prompt")
        return answer

    async def detokenize(self, raw: bytes, salt: str) -> TokenAnswer:
        """The same for ``/detokenize``."""
        answer: TokenAnswer = await self._call(_DETOKENIZE, raw, salt, "tokens")
        return answer

    async def _call(self, kind: bytes, raw: bytes, salt: str, param: str) -> Any:
        payload = payload_of(kind, raw, salt)
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
