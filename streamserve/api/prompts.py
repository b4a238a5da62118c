"""From a request's bytes to what the engine takes: parsed, rendered, tokenised.

Here or, where that would hold up the streams, in a worker process (``prompt_workers``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from streamserve.api.answer_plan import Parsing
from streamserve.api.body import parse_json_object
from streamserve.api.chat_request import ChatRequest, parse_chat_request
from streamserve.api.choices import Choices
from streamserve.api.completion_request import CompletionRequest, parse_completion_request
from streamserve.api.embedding_request import EmbeddingRequest, parse_embedding_request
from streamserve.api.extras import ExtraFields, Prompt
from streamserve.api.harmony_plan import plan_answer
from streamserve.api.message_request import parse_count_request, parse_messages_request
from streamserve.api.responses.references import read_references
from streamserve.api.responses.request import ResponsesRequest, Settings, parse_responses_request
from streamserve.api.sampling import Common
from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.parsers.answer_format import AnswerFormat, MarkIds
from streamserve.engine.preprocess import Preprocessor
from streamserve.engine.tokenizer import Tokenizer

Endpoint = Literal["chat", "completion", "count_tokens", "embedding", "messages", "response"]
Request: TypeAlias = ChatRequest | CompletionRequest | EmbeddingRequest | ResponsesRequest

PROMPT_FIELDS: Mapping[Endpoint, str] = {
    "chat": "messages",
    "completion": "prompt",
    "count_tokens": "messages",
    "embedding": "input",
    "messages": "messages",
    "response": "input",
}
"""The field that a client would have to shorten."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that was parsed, rendered and tokenised: ready for the engine.

    ``parsing`` is for text that is more than content, ``settings`` is of ``/v1/responses``,
    ``encoding_format`` that of vectors.
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


class PromptReader:
    """Makes ``Prepared`` of bodies, for one model. Raises ``InvalidParameterError``."""

    def __init__(
        self,
        preprocessor: Preprocessor,
        tokenizer: Tokenizer,
        sampling_defaults: Mapping[str, Any],
        answer_format: AnswerFormat,
        max_model_len: int,
    ) -> None:
        self._preprocessor = preprocessor
        self._tokenizer = tokenizer
        self._defaults = sampling_defaults
        self._answer_format = answer_format
        self._mark_ids = MarkIds(tokenizer)
        self._max_model_len = max_model_len

    def parse(self, endpoint: Endpoint, raw: bytes, references: bytes = b"") -> Request:
        """Check every field. ``references``: what a body of ``/v1/responses`` refers to, packed."""
        body, defaults = parse_json_object(raw), self._defaults
        match endpoint:
            case "chat":
                return parse_chat_request(body, defaults)
            case "completion":
                return parse_completion_request(body, defaults)
            case "count_tokens":
                return parse_count_request(body)
            case "embedding":
                return parse_embedding_request(body)
            case "messages":
                return parse_messages_request(body, defaults)
            case "response":
                return parse_responses_request(body, defaults, read_references(references))

    def may_run_away(self, request: Request) -> bool:
        """Whether a template renders it that has run away once, or may with what a client gives it.

        Then a process should: that can be killed.
        """
        chat = request.chat if isinstance(request, ResponsesRequest) else request
        return isinstance(chat, ChatRequest) and (
            bool(chat.chat_template_kwargs) or self._preprocessor.has_run_away
        )

    async def prepare(self, request: Request, salt: str) -> Prepared:
        """Render and tokenise, apart from what has another ``salt``."""
        match request:
            case ChatRequest():
                return await self._rendered(request, salt)
            case ResponsesRequest():
                prepared = await self._cut_to_fit(request, salt)
                return replace(prepared, settings=request.settings)
            case EmbeddingRequest():
                return Prepared(
                    request.common,
                    request.params,
                    await self._tokenised(request, salt),
                    request.extras,
                    Choices(),
                    encoding_format=request.encoding_format,
                )
            case CompletionRequest():
                return _prepared(request, await self._tokenised(request, salt, echo=request.echo))

    async def _rendered(self, request: ChatRequest, salt: str) -> Prepared:
        plan = plan_answer(request, self._answer_format)
        prompt = await self._preprocessor.chat(plan.messages, salt, **plan.rendering)
        prepared = _prepared(request, [Prompt(prompt.token_ids)])
        if plan.is_plain:
            return prepared
        params = plan.params(prompt.text, self._mark_ids)
        return replace(prepared, params=params, parsing=plan.parsing(prompt.text))

    async def _cut_to_fit(self, request: ResponsesRequest, salt: str) -> Prepared:
        """Render the chat or, with ``truncation: "auto"``, as much of its end as the context holds.

        What goes are whole turns from the beginning, up to a user's message; what the system says
        stays. If nothing fits, the last turn is left, and refused like any that is too long.
        """
        chat = request.chat
        limit = self._max_model_len - (chat.params.max_tokens or 1)
        prepared = await self._rendered(chat, salt)
        if len(prepared.prompts[0].token_ids) <= limit or not request.truncates:
            return prepared
        starts = [i for i, message in enumerate(chat.messages) if message["role"] == "user"]
        low, high = 0, len(starts) - 1
        longest: Prepared | None = None  # that fits so far: it begins at ``starts[high]``
        while low < high:
            middle = (low + high) // 2
            prepared = await self._rendered(_beginning_at(chat, starts[middle]), salt)
            if len(prepared.prompts[0].token_ids) <= limit:
                longest, high = prepared, middle
            else:
                low = middle + 1
        if longest is None and starts:
            return await self._rendered(_beginning_at(chat, starts[low]), salt)
        return longest or prepared

    async def _tokenised(
        self, request: CompletionRequest | EmbeddingRequest, salt: str, *, echo: bool = False
    ) -> list[Prompt]:
        """Texts as token ids; with ``echo`` they are kept, and those of token ids made."""
        prompts: list[Prompt] = []
        for given in request.prompts:
            if isinstance(given, str):
                token_ids = await self._preprocessor.encode(
                    given, add_special_tokens=request.add_special_tokens, salt=salt
                )
                prompts.append(Prompt(token_ids, given if echo else ""))
            else:
                text = self._tokenizer.decode(given) if echo else ""
                prompts.append(Prompt(given, text, is_tokenized=False))
        return prompts


def _prepared(request: ChatRequest | CompletionRequest, prompts: list[Prompt]) -> Prepared:
    return Prepared(request.common, request.params, prompts, request.extras, request.choices)


def _beginning_at(chat: ChatRequest, start: int) -> ChatRequest:
    kept = [message for message in chat.messages[:start] if message["role"] == "system"]
    return replace(chat, messages=(*kept, *chat.messages[start:]))
