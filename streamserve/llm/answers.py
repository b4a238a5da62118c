"""From a job to its answer: tokenise, submit, gather. For the event loop of the engine only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from streamserve.core.request import FinishReason
from streamserve.core.sampling_params import SamplingParams as CoreSamplingParams
from streamserve.engine.adapters import Adapter, Adapters
from streamserve.engine.async_engine import AsyncEngine
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.intake import Origin
from streamserve.engine.outputs import RequestOutput as EngineOutput
from streamserve.engine.preprocess import Preprocessor
from streamserve.engine.stream import RequestStream
from streamserve.engine.tokenizer import Tokenizer
from streamserve.errors import ContextLengthError, InvalidParameterError
from streamserve.llm.lora_request import LoRARequest
from streamserve.llm.outputs import (
    CompletionOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    cut_off,
    logprobs_by_id,
)
from streamserve.llm.prompts import Job

_PREPROCESS_TIMEOUT_S = 600.0
"""A program's own prompts may be long, and nobody else waits for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How conversations become prompts; ``template`` replaces the model's."""

    template: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Sequence[Mapping[str, Any]] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job with its prompt's ids, and the text that they are of where that is known."""

    job: Job
    text: str | None
    token_ids: list[int]
    adapter: Adapter | None = None

    def output(self, answers: Sequence[_Answer]) -> RequestOutput:
        """What has come of ``answers``."""
        return RequestOutput(
            request_id=self.job.request_id,
            prompt=self.text,
            prompt_token_ids=self.token_ids,
            outputs=[answer.so_far(index) for index, answer in enumerate(answers)],
            finished=all(answer.has_ended for answer in answers),
            metrics=RequestMetrics.of(answers[0].stream.timings),
            num_cached_tokens=answers[0].num_cached_tokens,
            prompt_logprobs=answers[0].prompt_logprobs,
        )


class Answers:
    """Has one engine answer jobs. At most ``max_num_requests`` are in it at a time."""

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        *,
        special_tokens: Mapping[str, str],
        max_num_requests: int,
        max_model_len: int,
        adapters: Adapters | None = None,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._preprocessor = Preprocessor(tokenizer, chat_template, timeout_s=_PREPROCESS_TIMEOUT_S)
        self._special_tokens = special_tokens
        self._max_num_requests = max_num_requests
        self._max_model_len = max_model_len
        self._seats = asyncio.Semaphore(max_num_requests)
        self._line = asyncio.Lock()
        self._adapters = adapters

    def close(self) -> None:
        """Let go of the threads that tokenise, and of adapters. Behind the engine's end."""
        self._preprocessor.close()
        if self._adapters is not None:
            self._adapters.close()

    async def prepare(self, jobs: Sequence[Job], options: ChatOptions) -> list[Prepared]:
        """Tokenise and check them all. Raises ``RequestError`` for the first that cannot be."""
        preprocessor = self._preprocessor
        if options.template is not None:
            template = ChatTemplate(
                options.template, special_tokens=self._special_tokens, source="chat_template"
            )
            preprocessor = Preprocessor(self._tokenizer, template, timeout_s=_PREPROCESS_TIMEOUT_S)
        try:
            return [await self._prepare(job, preprocessor, options) for job in jobs]
        finally:
            if preprocessor is not self._preprocessor:
                preprocessor.close()

    async def all(
        self,
        jobs: Sequence[Job],
        options: ChatOptions,
        put: Callable[[int, RequestOutput | EmbeddingRequestOutput], None],
    ) -> None:
        """Answer every job and ``put`` each answer as it is complete; the first failure ends all.

        A job with ``pooling`` is answered with a vector.

        Raises ``StreamServeError``. Cancelling ends the requests that run.
        """
        prepared = await self.prepare(jobs, options)

        async def answer(one: Prepared) -> None:
            async with self._seated(one) as seated:
                answered = self._whole if one.job.params.pooling is None else self._vector
                put(one.job.index, await answered(seated))

        try:
            async with asyncio.TaskGroup() as group:
                for one in prepared:
                    group.create_task(answer(one))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def vector(self, job: Job) -> EmbeddingRequestOutput:
        """The vector of one prompt; cancelling ends the request."""
        [prepared] = await self.prepare([job], ChatOptions())
        async with self._seated(prepared) as seated:
            return await self._vector(seated)

    async def pieces(self, job: Job, options: ChatOptions) -> AsyncGenerator[str]:
        """The text of one answer as it comes; leaving early ends the request."""
        if job.choices.num_candidates > 1:
            raise InvalidParameterError("n and best_of must be 1 for a stream of text", param="n")
        [prepared] = await self.prepare([job], options)
        async with self._seated(prepared) as seated:
            with self._submitted(seated) as [answer]:
                async for output in answer.stream:
                    _check_success(output)
                    if output.text:
                        yield output.text

    async def growing(self, job: Job, options: ChatOptions) -> AsyncGenerator[RequestOutput]:
        """The answers so far, again and again; leaving early ends the request."""
        choices = job.choices
        if choices.are_compared:
            raise InvalidParameterError(
                f"best_of must not be above n ({choices.n}) where the answers are shown as they "
                f"grow, got {choices.num_candidates}",
                param="best_of",
            )
        [prepared] = await self.prepare([job], options)
        async with self._seated(prepared) as seated:
            with self._submitted(seated) as answers:
                async with aclosing(_interleaved(answers)) as turns:
                    async for _ in turns:
                        yield prepared.output(answers)

    @asynccontextmanager
    async def _seated(self, prepared: Prepared) -> AsyncGenerator[Prepared]:
        """Hold a seat for each candidate, so that the engine's queue is never full.

        It yields the prompt with its adapter; that, and the grammar, are there if it is submitted
        before any await.

        One that wants more than there are holds them all: those of one prompt come in together.
        """
        num_wanted = min(prepared.job.choices.num_candidates, self._max_num_requests)
        num_held = 0
        try:
            async with self._line:  # two that hold a part of theirs would wait for each other
                while num_held < num_wanted:
                    await self._seats.acquire()
                    num_held += 1
            params, asked = prepared.job.params, prepared.job.lora_request
            adapter = await self._load(asked)
            while not self._engine.is_prepared(params):  # others have been, meanwhile
                await self._engine.prepare(params)
                adapter = await self._load(asked)
            yield replace(prepared, adapter=adapter)
        finally:
            for _ in range(num_held):
                self._seats.release()

    async def _prepare(
        self, job: Job, preprocessor: Preprocessor, options: ChatOptions
    ) -> Prepared:
        prompt = job.prompt
        job = replace(job, params=await preprocessor.bad_words(job.params))
        prepared: Prepared
        if isinstance(prompt, str):
            prepared = Prepared(job, prompt, await preprocessor.encode(prompt))
        elif job.is_conversation:
            rendered = await preprocessor.chat(
                [_with_known_role(message) for message in prompt],  # type: ignore[arg-type]
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
                tools=options.tools,
                **options.kwargs,
            )
            prepared = Prepared(job, rendered.text, rendered.token_ids)
        else:
            prepared = Prepared(job, None, list(prompt))  # type: ignore[arg-type]
        if job.truncation.num_tokens is not None:
            kept = job.truncation.cut(prepared.token_ids, self._max_model_len, 0)
            prepared = replace(prepared, token_ids=kept)
        choices = job.choices
        await self._engine.prepare(job.params)
        try:
            self._engine.check(prepared.token_ids, job.params, choices.beams, choices.n)
        except ContextLengthError as error:
            raise ContextLengthError(f"prompt {job.index}: {error}", param=error.param) from None
        return prepared

    async def _load(self, asked: LoRARequest | None) -> Adapter | None:
        """The adapter, loaded if need be."""
        if asked is None:
            return None
        adapters = self._adapters
        if adapters is None:
            raise InvalidParameterError(
                "lora_request needs LLM(…, enable_lora=True)", param="lora_request"
            )
        return await adapters.get(asked.lora_name, asked.path)

    @contextmanager
    def _submitted(self, prepared: Prepared) -> Iterator[list[_Answer]]:
        """The prompt's candidates in the engine; those that have not ended leave it at the end."""
        params = prepared.job.params
        streams = self._submit(prepared)
        try:
            yield [_Answer(stream, self._tokenizer, params) for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    def _submit(self, prepared: Prepared) -> list[RequestStream]:
        job = prepared.job
        origin: Origin = {"request_id": job.request_id, "priority": job.priority}
        if (adapter := prepared.adapter) is not None:
            origin |= {"adapter": adapter.slot, "cache_salt": adapter.salt}
        return job.choices.submit(self._engine, prepared.token_ids, job.params, **origin)

    async def _vector(self, prepared: Prepared) -> EmbeddingRequestOutput:
        with self._submitted(prepared) as [answer]:
            output = await answer.stream.get()
        _check_success(output)
        assert output.embedding is not None
        return EmbeddingRequestOutput(
            prepared.job.request_id,
            EmbeddingOutput(output.embedding.tolist()),
            prepared.token_ids,
            output.usage.cached_tokens,
        )

    async def _whole(self, prepared: Prepared) -> RequestOutput:
        with self._submitted(prepared) as answers:
            for answer in answers:  # what the others say meanwhile waits in their mailboxes
                async for output in answer.stream:
                    answer.add(output)
            choices = prepared.job.choices
            if not choices.are_compared:
                return prepared.output(answers)
            # Apart, as what belongs to the prompt is the first candidate's.
            best = sorted(answers, key=lambda a: -a.total_logprob)[: choices.n]
            whole = prepared.output(answers)
            return replace(whole, outputs=[a.so_far(index) for index, a in enumerate(best)])


class _Answer:
    """One candidate: its stream, and what has come of it."""

    def __init__(
        self, stream: RequestStream, tokenizer: Tokenizer, params: CoreSamplingParams
    ) -> None:
        self.stream = stream
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._tokenizer = tokenizer
        self._wants_logprobs = params.logprobs is not None
        self._outputs: list[EngineOutput] = []

    @property
    def has_ended(self) -> bool:
        """Whether everything has come."""
        return bool(self._outputs) and self._outputs[-1].finish_reason is not None

    @property
    def num_cached_tokens(self) -> int:
        return self._outputs[-1].usage.cached_tokens if self._outputs else 0

    @property
    def total_logprob(self) -> float:
        return sum(entry.logprob for output in self._outputs for entry in output.logprobs)

    def add(self, output: EngineOutput) -> None:
        """Raises unless it is part of a success: a cut answer must not look like a whole one."""
        _check_success(output)
        if output.prompt_logprobs is not None:
            found = logprobs_by_id(output.prompt_logprobs, self._tokenizer)
            self.prompt_logprobs = [None, *found]
        self._outputs.append(output)

    def so_far(self, index: int) -> CompletionOutput:
        """What has come, as the answer of that index."""
        outputs = self._outputs
        last = outputs[-1] if outputs else None
        reason = None if last is None else last.finish_reason
        answer = CompletionOutput(
            index=index,
            text="".join([output.text for output in outputs]),
            token_ids=[token_id for output in outputs for token_id in output.token_ids],
            finish_reason=None if reason is None else reason.value,
            stop_reason=None if last is None else last.stop_reason,
        )
        if self._wants_logprobs:
            entries = [entry for output in outputs for entry in output.logprobs]
            answer.logprobs = logprobs_by_id(entries, self._tokenizer)
            answer.cumulative_logprob = self.total_logprob
        return answer


async def _interleaved(answers: Sequence[_Answer]) -> AsyncGenerator[None]:
    """Comes back whenever one of the answers has grown, until all have ended."""
    reading = {asyncio.ensure_future(answer.stream.get()): answer for answer in answers}
    try:
        while reading:
            done, _ = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                answer = reading.pop(task)
                answer.add(task.result())
                if not answer.has_ended:
                    reading[asyncio.ensure_future(answer.stream.get())] = answer
            yield
    finally:
        for task in reading:
            task.cancel()


def _check_success(output: EngineOutput) -> None:
    if output.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
        raise cut_off()


def _with_known_role(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Templates know ``system``; ``developer`` is OpenAI's newer name for the same voice."""
    return {**message, "role": "system"} if message.get("role") == "developer" else message
