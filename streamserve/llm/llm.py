"""``LLM``: a model in this process, asked from ordinary code, as in vLLM."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from streamserve.api.chat_request import read_template_kwargs
from streamserve.api.extras import Truncation
from streamserve.core.sampling_params import SamplingParams as CoreSamplingParams
from streamserve.errors import ConfigError, InvalidParameterError
from streamserve.llm.answers import Answers, ChatOptions
from streamserve.llm.build import build
from streamserve.llm.loop_thread import LoopThread
from streamserve.llm.lora_request import LoRARequest
from streamserve.llm.outputs import EmbeddingRequestOutput, PoolingRequestOutput, RequestOutput
from streamserve.llm.pooling_params import PoolingParams
from streamserve.llm.progress import Progress, UseTqdm
from streamserve.llm.prompts import (
    Conversations,
    Job,
    Message,
    Prompt,
    Prompts,
    is_conversation,
    lora_requests,
    per_prompt,
    read_conversations,
    read_prompts,
)
from streamserve.llm.sampling_params import SamplingParams
from streamserve.llm.tokenizer import load_transformers_tokenizer, python_tokenizer

if TYPE_CHECKING:
    from streamserve.cli.compose import Service

Pooled = PoolingParams | Sequence[PoolingParams] | None
Params = CoreSamplingParams | Sequence[CoreSamplingParams] | None
Adapted = LoRARequest | Sequence[LoRARequest | None] | None


class LLM:
    """A model, loaded, and an engine that runs on a thread of its own.

    ``model`` is a Hugging Face directory, a GGUF file or a hub id; without one it is the model in
    the box. The keywords are the flags of ``streamserve serve`` for model and engine, with
    underscores, of which vLLM has most (``dtype``, ``quantization``, ``max_model_len``, …); one of
    vLLM's that is not built is refused by name. ``seed`` is 0 if none is given, as in vLLM.

    It works in scripts without a ``__main__`` guard and inside a running event loop, which a call
    blocks: there, `AsyncLLM` is the better choice. Its methods may be called from several threads.
    Ctrl-C in a call ends the call's requests, and the object stays usable. ``close``, leaving a
    ``with`` block, and the end of the process stop the engine. It does not outlive a fork.

    Raises ``ConfigError``, ``ModelLoadError`` or ``KVCacheMemoryError``.
    """

    def __init__(self, model: str | None = None, **keywords: Any) -> None:
        service, answers = build(model, {"seed": 0, **keywords})
        self._service = service
        self._answers = answers
        self._loop = LoopThread("streamserve-llm")
        self._request_ids = itertools.count()
        self._tokenizer: Any = None
        self._close = weakref.finalize(self, _close, service, answers, self._loop)
        self._loop.run(service.engine.start())

    def generate(
        self,
        prompts: Prompts,
        sampling_params: Params = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: Adapted = None,
        priority: int | Sequence[int] | None = None,
        **refused: Any,
    ) -> list[RequestOutput]:
        """Answer the prompts, all in one batch, and return the answers in the prompts' order.

        A prompt is a string, a list of token ids, or a dict with one of the two under ``prompt``
        or ``prompt_token_ids``. ``sampling_params`` are one for all or one for each; without them
        the model's own recommendations count, with 16 tokens to an answer. ``use_tqdm`` may be a
        class or function in tqdm's place. ``lora_request`` is one for all or one for
        each, ``None`` the model itself; it needs ``LLM(…, enable_lora=True)``.

        Raises ``RequestError`` before anything is computed, and ``EngineError`` if a step fails.
        """
        _refuse(refused)
        jobs = self._jobs(read_prompts(prompts), sampling_params, priority, lora_request)
        return self._answered(jobs, ChatOptions(), use_tqdm)

    def chat(
        self,
        messages: Conversations,
        sampling_params: Params = None,
        use_tqdm: UseTqdm = True,
        *,
        lora_request: Adapted = None,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **refused: Any,
    ) -> list[RequestOutput]:
        """Continue one conversation, or several in one batch, by the model's chat template.

        ``chat_template`` is Jinja in its place; ``chat_template_kwargs`` reach it. As ``generate``
        in all else.
        """
        if chat_template_content_format != "auto":
            refused["chat_template_content_format"] = chat_template_content_format
        _refuse(refused)
        options = ChatOptions(
            template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            kwargs=read_template_kwargs("chat_template_kwargs", chat_template_kwargs or {}),
        )
        conversations = read_conversations(messages)
        jobs = self._jobs(conversations, sampling_params, priority, lora_request)
        return self._answered(jobs, options, use_tqdm)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: CoreSamplingParams | None = None,
        *,
        lora_request: LoRARequest | None = None,
    ) -> Generator[str]:
        """Yield the text of one answer as it comes; ``prompt`` may be a conversation.

        Leaving the loop early ends the request.
        """
        [read] = read_conversations(prompt) if is_conversation(prompt) else read_prompts([prompt])
        [job] = self._jobs([read], sampling_params, None, lora_request)

        async def work(put: Any) -> None:
            async for piece in self._answers.pieces(job, ChatOptions()):
                put(piece)

        return self._loop.iterate(work)

    def embed(
        self,
        prompts: Prompts,
        *,
        pooling_params: Pooled = None,
        use_tqdm: UseTqdm = True,
        truncate_prompt_tokens: int | None = None,
        lora_request: Adapted = None,
        priority: int | Sequence[int] | None = None,
        **refused: Any,
    ) -> list[EmbeddingRequestOutput]:
        """Return the vector of each prompt, all computed in one batch, in the prompts' order.

        ``pooling_params`` are one for all or one for each. Of a longer prompt its last
        ``truncate_prompt_tokens`` count (-1: what the model takes). As ``generate`` in all else.
        """
        _refuse(refused)
        read = read_prompts(prompts)
        given = per_prompt(
            "pooling_params",
            PoolingParams() if pooling_params is None else pooling_params,
            len(read),
        )
        params = [one.request(self._service.embedding) for one in given]
        truncation = Truncation(truncate_prompt_tokens)
        jobs = [
            replace(job, truncation=truncation)
            for job in self._jobs(read, params, priority, lora_request)
        ]
        found: list[EmbeddingRequestOutput] = self._answered(jobs, ChatOptions(), use_tqdm)
        return found

    def encode(
        self,
        prompts: Prompts,
        pooling_params: Pooled = None,
        *,
        pooling_task: str | None = None,
        **options: Any,
    ) -> list[PoolingRequestOutput]:
        """As ``embed``, with tensors in place of lists of numbers."""
        if pooling_task not in (None, "embed"):
            raise InvalidParameterError(
                f"pooling_task must be embed, got {pooling_task!r}", param="pooling_task"
            )
        found = self.embed(prompts, pooling_params=pooling_params, **options)
        return [PoolingRequestOutput.of(output) for output in found]

    def get_tokenizer(self) -> Any:
        """The model's tokenizer as transformers has it, loaded at the first call."""
        if self._tokenizer is None:
            service = self._service
            files = service.text_source.files
            self._tokenizer = python_tokenizer(service.tokenizer) or load_transformers_tokenizer(
                service.tokenizer_path, files
            )
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What counts where none are given: the model's recommendations."""
        return SamplingParams(**self._service.sampling_defaults)

    def close(self) -> None:
        """Stop the engine and free the model. Idempotent; what runs in other threads fails.

        On a GPU the last engine of the process to be closed frees cuBLAS's work spaces too, which
        the caller's own CUDA graphs may use: those must not be replayed after it.
        """
        self._close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def classify(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Not built."""
        raise NotImplementedError("LLM.classify is not built: models here generate and embed")

    def score(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Not built."""
        raise NotImplementedError("LLM.score is not built: models here generate and embed")

    def _answered(self, jobs: Sequence[Job], options: ChatOptions, use_tqdm: UseTqdm) -> list[Any]:
        found: dict[int, Any] = {}

        async def work(put: Any) -> None:
            await self._answers.all(jobs, options, lambda index, output: put((index, output)))

        progress = Progress(use_tqdm, len(jobs))
        with closing(progress), closing(self._loop.iterate(work)) as answers:
            for index, output in answers:
                found[index] = output
                progress.answered(output)
        return [found[job.index] for job in jobs]

    def _jobs(
        self,
        prompts: Sequence[Any],
        sampling_params: Params,
        priority: int | Sequence[int] | None,
        lora_request: Adapted,
    ) -> list[Job]:
        if not self._close.alive:
            raise ConfigError("this LLM is closed")
        if not self._loop.is_here:
            raise ConfigError(
                f"this LLM runs in process {self._loop.process_id}, of which this one is a fork: "
                "make it in the process that uses it, started by multiprocessing's 'spawn'"
            )
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = per_prompt("sampling_params", sampling_params, len(prompts))
        priorities = per_prompt("priority", priority or 0, len(prompts))
        adapters = lora_requests(lora_request, len(prompts))
        return [
            Job(
                index,
                str(next(self._request_ids)),
                prompt,
                params[index],
                priorities[index],
                lora_request=adapters[index],
            )
            for index, prompt in enumerate(prompts)
        ]


def _close(service: Service, answers: Answers, loop: LoopThread) -> None:
    """Apart from the object, which nothing that runs may hold."""
    if not loop.is_here:
        return
    if loop.is_current:  # the object was found to be garbage there
        threading.Thread(target=_close, args=(service, answers, loop)).start()
        return

    async def stop() -> None:
        await service.engine.stop()
        answers.close()

    loop.run(stop())
    loop.close()


def _refuse(keywords: Mapping[str, Any]) -> None:
    """Raises for what vLLM's methods take besides, unless it asks for nothing."""
    known = {
        "chat_template_content_format",
        "mm_processor_kwargs",
        "tokenization_kwargs",
    }
    for name, value in keywords.items():
        if name not in known:
            raise TypeError(f"got an unexpected keyword argument {name!r}")
        if value:
            raise InvalidParameterError(f"{name} is not supported, got {value!r:.100}", param=name)
