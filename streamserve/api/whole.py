"""The answer in one piece: choices read to their end, and the JSON that they make."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from streamserve.api.extras import Extras, Prompt
from streamserve.api.frames import Envelope, Kind, openai_finish_reason, usage_content
from streamserve.api.logprobs import chat_logprobs, joined, prompt_logprobs
from streamserve.api.metrics import Delivery
from streamserve.api.parsed_frames import parsed_message
from streamserve.api.success import check_success, end_early
from streamserve.api.timing import TimedDelivery
from streamserve.core.plan import TokenLogprobs
from streamserve.core.request import FinishReason
from streamserve.engine.outputs import RequestOutput, Usage
from streamserve.engine.parsers.answer import AnswerParser
from streamserve.engine.parsers.events import Event
from streamserve.engine.parsers.events import joined as joined_events
from streamserve.engine.stream import RequestStream


@dataclass(slots=True)
class Choice:
    """One finished choice."""

    prompt: Prompt
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs] | None
    timing: dict[str, Any] | None = None
    stop_reason: int | str | None = None  # as ``RequestOutput`` has it
    events: list[Event] | None = None  # chat's, where it is more than the text
    has_calls: bool = False


async def collect(
    stream: RequestStream, prompt: Prompt, delivery: Delivery, parser: AnswerParser | None = None
) -> Choice:
    """Read a stream to its end. Raises ``EngineError`` unless it is a success."""
    times = delivery.times if isinstance(delivery, TimedDelivery) else None
    outputs: list[RequestOutput] = []
    events: list[Event] = []
    while True:
        output = await stream.get()
        outputs.append(output)
        if times is not None and output.text:
            times.stamp()
        if parser is not None:
            parser.count(output.token_ids)
            events += parser.feed(output.text)
        if output.finish_reason is not None:
            break
        if parser is not None and parser.is_over:
            output = end_early(stream, output)
            break
    finish_reason = check_success(output)
    choice = Choice(
        prompt,
        "".join([prompt.echo, *(part.text for part in outputs)]),
        [token_id for part in outputs for token_id in part.token_ids],
        finish_reason,
        output.usage,
        [entry for part in outputs for entry in part.logprobs],
        outputs[0].prompt_logprobs,
        None if times is None else times.content(stream, output.usage),
        output.stop_reason,
    )
    if parser is not None:
        choice.events = joined_events(events + parser.finish())
        choice.has_calls = parser.num_calls > 0
        choice.usage.reasoning_tokens = parser.num_reasoning_tokens
    return choice


async def collect_all(
    streams: Sequence[RequestStream],
    prompts: Sequence[Prompt],
    deliveries: Sequence[Delivery],
    parsers: Sequence[AnswerParser | None],
) -> list[Choice]:
    """Read all streams; the first that fails ends the wait for the others."""
    reads = [collect(*read) for read in zip(streams, prompts, deliveries, parsers, strict=True)]
    if len(reads) == 1:
        return [await reads[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(read) for read in reads]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def best_choices(candidates: Sequence[Choice], num_candidates: int, n: int) -> list[Choice]:
    """Of every ``num_candidates`` that follow each other the best ``n``, best first.

    The best is the likeliest as a whole: by the sum of its logprobs, as in vLLM.
    """
    best: list[Choice] = []
    for start in range(0, len(candidates), num_candidates):
        rivals = candidates[start : start + num_candidates]
        best += sorted(rivals, key=lambda c: -sum(entry.logprob for entry in c.logprobs))[:n]
    return best


def whole_answer(
    envelope: Envelope, choices: Sequence[Choice], extras: Extras, n: int = 1
) -> bytes:
    """The JSON of an answer that was not streamed, with ``n`` choices for each prompt."""
    content = {
        "id": envelope.id,
        "object": envelope.kind.object,
        "created": envelope.created,
        "model": envelope.model,
        "choices": [
            _whole_choice(envelope.kind, index, choice, extras)
            for index, choice in enumerate(choices)
        ],
        "usage": usage_content([choice.usage for choice in choices], n),
    }
    if envelope.kind.is_chat:
        content |= _of_prompt(choices[0], extras)
    return orjson.dumps(content)


def _of_prompt(choice: Choice, extras: Extras) -> dict[str, Any]:
    """What the answer says of its prompt: a chat once, a completion in every choice."""
    said: dict[str, Any] = {}
    if extras.tokenizer is not None:
        said["prompt_logprobs"] = prompt_logprobs(
            choice.prompt.token_ids, choice.prompt_logprobs or (), extras.tokenizer
        )
    if extras.token_ids:
        said["prompt_token_ids"] = choice.prompt.token_ids
    return said


def _whole_choice(kind: Kind, index: int, choice: Choice, extras: Extras) -> dict[str, Any]:
    said: dict[str, Any] = {"text": choice.text}
    if kind.is_chat:
        message = {"role": "", "content": choice.text, "refusal": None}
        if choice.events is not None:
            message = parsed_message(choice.events)
        said = {"message": {**message, "role": kind.role}}
    content = {
        "index": index,
        **said,
        "logprobs": _logprobs(kind, choice, extras),
        "finish_reason": openai_finish_reason(choice.finish_reason, has_calls=choice.has_calls),
    }
    if choice.timing is not None:
        content["timing"] = choice.timing
    if extras.token_ids:
        content["token_ids"] = choice.token_ids
    if not kind.is_chat:
        content |= _of_prompt(choice, extras)
    return content


def _logprobs(kind: Kind, choice: Choice, extras: Extras) -> dict[str, Any] | None:
    if extras.names is None:
        return None
    if kind.is_chat:
        return chat_logprobs(choice.logprobs, extras.names)
    renderer = extras.completion_logprobs(choice.prompt)
    assert renderer is not None
    if not choice.prompt.echo:
        return renderer.render(choice.logprobs)
    first = renderer.echo(choice.prompt.echo, choice.prompt_logprobs or ())
    return joined(first, renderer.render(choice.logprobs))
