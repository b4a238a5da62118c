"""A chat as a family's template accepts it, where that knows less than OpenAI's messages say."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from streamserve.engine.parsers.answer_format import AnswerFormat
from streamserve.engine.template_turns import text_of

Message = dict[str, Any]
_SHORT_ID = 9  # characters: Mistral's templates accept no other length


def family_messages(
    messages: Sequence[Message],
    answer_format: AnswerFormat,
    tools: Sequence[dict[str, Any]] | None,
) -> tuple[Message, ...]:
    """The same chat. ``tools`` are put where the template looks for them, if not among its
    variables. Ids that are equal stay so.
    """
    parser = answer_format.tool_parser
    if answer_format.is_harmony:
        return tuple(_harmony(messages))
    if tools and answer_format.has_tools_in_messages:
        is_text = parser == "phi4_mini_json"
        shown = [tool["function"] for tool in tools] if is_text else list(tools)
        messages = _with_tools(messages, _json(shown) if is_text else shown)
    if answer_format.has_text_arguments:
        messages = tuple(_with_text_arguments(messages))
    if parser == "lfm2":
        return tuple(_lfm2(messages, has_calls=answer_format.has_calls))
    rewrite = _REWRITTEN.get(parser or "")
    if rewrite is not None:
        messages = tuple(rewrite(messages))
    return tuple(_with_results(messages) if answer_format.has_results_in_calls else messages)


def _with_tools(messages: Sequence[Message], tools: Any) -> list[Message]:
    first = messages[0]
    if first["role"] == "system":
        return [{**first, "tools": tools}, *messages[1:]]
    return [{"role": "system", "content": "", "tools": tools}, *messages]


def _mistral(messages: Iterable[Message]) -> Iterator[Message]:
    return map(_with_short_ids, messages)


def _short_id(call_id: str) -> str:
    return "".join(c for c in call_id if c.isalnum())[-_SHORT_ID:].rjust(_SHORT_ID, "0")


def _with_short_ids(message: Message) -> Message:
    if "tool_calls" in message:
        calls = [{**call, "id": _short_id(call["id"])} for call in message["tool_calls"]]
        return {**message, "tool_calls": calls}
    if "tool_call_id" in message:
        return {**message, "tool_call_id": _short_id(message["tool_call_id"])}
    return message


def _glm4(messages: Iterable[Message]) -> Iterator[Message]:
    """A call is a message whose ``metadata`` is the function; what it gives is observed."""
    for message in messages:
        if message["role"] == "tool":
            yield {**message, "role": "observation"}
        elif "tool_calls" not in message:
            yield message
        else:
            if text_of(message.get("content")):
                yield {"role": "assistant", "content": message["content"]}
            for call in message["tool_calls"]:
                function = call["function"]
                yield {
                    "role": "assistant",
                    "metadata": function["name"],
                    "content": _json(function["arguments"]),
                }


def _phi4_mini(messages: Iterable[Message]) -> Iterator[Message]:
    """Calls are a part of the text, as the model writes them."""
    for message in messages:
        if message["role"] == "tool":
            yield {**message, "role": "tool_response"}
        elif "tool_calls" not in message:
            yield message
        else:
            calls = _json([call["function"] for call in message["tool_calls"]])
            content = f"{text_of(message.get('content'))}<|tool_call|>{calls}<|/tool_call|>"
            yield {"role": "assistant", "content": content}


def _lfm2(messages: Iterable[Message], *, has_calls: bool) -> Iterator[Message]:
    """Thoughts are in ``thinking``; calls are a part of the text where templates show no others."""
    for message in messages:
        shown = message
        if thoughts := message.get("reasoning_content"):
            shown = {**shown, "thinking": thoughts}
        if "tool_calls" in message:
            text = text_of(message.get("content"))
            calls = ", ".join(map(_python_call, message["tool_calls"]))
            text += "" if has_calls else f"<|tool_call_start|>[{calls}]<|tool_call_end|>"
            shown = {**shown, "content": text}
        yield shown


def _python_call(call: Message) -> str:
    function = call["function"]
    arguments = (f"{key}={_python(value)}" for key, value in function["arguments"].items())
    return f"{function['name']}({', '.join(arguments)})"


def _python(value: Any) -> str:
    """A literal, as the family's models write it: JSON where that is Python as well."""
    return _json(value) if isinstance(value, str | dict) else repr(value)


def _kimi_k2(messages: Iterable[Message]) -> Iterator[Message]:
    """Ids are a function's name and the number of the call in the chat, as the model knows them."""
    ids: dict[str, str] = {}
    numbers = itertools.count()
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            ids[call["id"]] = f"functions.{call['function']['name']}:{next(numbers)}"
            calls.append({**call, "id": ids[call["id"]]})
        if calls:
            yield {**message, "tool_calls": calls}
        elif message.get("tool_call_id") in ids:
            yield {**message, "tool_call_id": ids[message["tool_call_id"]]}
        else:
            yield message


def _gemma4(messages: Iterable[Message]) -> Iterator[Message]:
    """What was said before a call is thought: the template would show it behind the call's result,
    and end the turn there.
    """
    for message in messages:
        said = _said_before_call(message) if message.get("tool_calls") else ""
        yield {**message, "content": "", "reasoning_content": said} if said else message


def _with_results(messages: Sequence[Message]) -> Iterator[Message]:
    """Results are in ``tool_responses`` of the message of the calls, and so is what the model says
    next: Gemma 4's first templates show them nowhere else. JSON's objects are theirs as well.
    """
    position = 0
    while position < len(messages):
        message = messages[position]
        position += 1
        names = {call["id"]: call["function"]["name"] for call in message.get("tool_calls") or ()}
        behind = messages[position:]
        results = list(itertools.takewhile(lambda found: found["role"] == "tool", behind))
        if not names or not results:
            yield message
            continue
        position += len(results)
        said = text_of(message.get("content"))
        last = messages[position] if position < len(messages) else {"role": ""}
        if last["role"] == "assistant" and not last.get("tool_calls"):
            said = "\n\n".join(filter(None, (said, text_of(last.get("content")))))
            position += 1
        responses = [
            {
                "name": names.get(result.get("tool_call_id"), "unknown"),
                "response": _object_or_text(text_of(result.get("content"))),
            }
            for result in results
        ]
        yield {**message, "content": said, "tool_responses": responses}


def _object_or_text(text: str) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text


def _with_text_arguments(messages: Iterable[Message]) -> Iterator[Message]:
    """Arguments as JSON: templates of DeepSeek add them to other text."""
    for message in messages:
        if "tool_calls" not in message:
            yield message
            continue
        calls = [
            {**call, "function": {**function, "arguments": _json(function["arguments"])}}
            for call in message["tool_calls"]
            for function in (call["function"],)
        ]
        yield {**message, "tool_calls": calls}


_REWRITTEN: dict[str, Callable[[Iterable[Message]], Iterator[Message]]] = {
    "mistral": _mistral,
    "glm4": _glm4,
    "phi4_mini_json": _phi4_mini,
    "kimi_k2": _kimi_k2,
    "gemma4": _gemma4,
}


def _harmony(messages: Iterable[Message]) -> Iterator[Message]:
    """Thoughts are in ``thinking``, and so is what was said before a call.

    The template refuses a call that both thoughts and words precede.
    """
    for message in messages:
        thoughts = message.get("reasoning_content")
        if not message.get("tool_calls"):
            yield {**message, "thinking": thoughts} if thoughts else message
            continue
        said = _said_before_call(message)
        yield {**message, "content": "", **({"thinking": said} if said else {})}


def _said_before_call(message: Message) -> str:
    """Thoughts and words."""
    parts = (message.get("reasoning_content"), text_of(message.get("content")))
    return "\n\n".join(filter(None, parts))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
