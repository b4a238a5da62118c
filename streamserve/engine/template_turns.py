"""Which turns a chat template shows, found by trying, and a chat in turns that it does show.

A template refuses what its model was not trained on, or leaves it out without a word: a second
system message, one in the middle, two turns of a user, a user's behind a tool's result, several
calls at once, text where it looks for parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamserve.errors import InvalidParameterError

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], Sequence[Mapping[str, Any]] | None], str]
"""Messages and tools to a prompt. Raises ``InvalidParameterError`` where the template refuses."""

_ROLES = ("user", "system", "assistant", "tool")
_WORDS = tuple(f"streamserve-probe-{n}" for n in range(5))
_BRIDGE: Message = {"role": "assistant", "content": "Done."}
"""What agents that know such models say between a tool's result and a user's next turn."""

_NAME = "probe"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}


@dataclass(frozen=True, slots=True)
class TemplateTurns:
    """What one template shows as it is.

    Content of the roles in ``text_roles`` must be text, of those in ``part_roles`` text parts.
    ``has_system``: a system message at the beginning; ``has_several_systems``: more than one there;
    ``has_later_systems``: any behind it. ``has_repeated_roles``: two turns of one role in a row;
    ``has_users_behind_tools``: a user's turn behind a tool's result; ``has_several_calls``: more
    than one call in a message.
    """

    text_roles: frozenset[str] = frozenset(_ROLES)
    part_roles: frozenset[str] = frozenset()
    has_system: bool = True
    has_several_systems: bool = True
    has_later_systems: bool = True
    has_repeated_roles: bool = True
    has_users_behind_tools: bool = True
    has_several_calls: bool = True

    @classmethod
    def of(cls, render: Render) -> TemplateTurns:
        """Try what ``render`` shows. Of a template that shows no user's words nothing is known."""
        text_roles, part_roles = _forms(render)
        turns = cls(text_roles, part_roles)

        def shows(chat: Sequence[Message], num_words: int) -> bool:
            has_calls = any("tool_calls" in message for message in chat)
            formed = [turns._formed(message) for message in chat]
            return _shows(render, formed, _WORDS[:num_words], has_tools=has_calls)

        one, two, three, four, five = _WORDS
        if not shows([_said("user", one)], 1):
            return turns
        system = _said("system", one)
        several = [system, _said("system", two), _said("user", three)]
        turn = [system, _said("user", two), _said("assistant", three)]
        later = [*turn, _said("system", four), _said("user", five)]
        call = [_said("user", one), _calls(two), _result(two)]
        both = [_said("user", one), _calls(two, three), _result(two), _result(three)]
        user = _said("user", three)
        return cls(
            text_roles,
            part_roles,
            has_system=shows([system, _said("user", two)], 2),
            has_several_systems=shows(several, 3),
            has_later_systems=shows(later, 5),
            has_repeated_roles=shows([_said("user", one), _said("user", two)], 2),
            has_users_behind_tools=shows([*call, user], 3) or not shows([*call, _BRIDGE, user], 3),
            has_several_calls=shows(both, 3) or not shows(call, 2),
        )

    def fit(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The same chat in turns that the template shows.

        System messages at the beginning are joined into one; what the system says later, or to a
        template that knows no system, is the user's. Turns of one role that follow each other are
        joined, and between a tool's result and a user's turn the assistant says that it is done.
        Each call of several becomes a message of its own, its result behind it.
        """
        fitted = self._with_systems(messages)
        if not self.has_repeated_roles:
            fitted = list(_alternating(fitted))
        if not self.has_users_behind_tools:
            fitted = list(_bridged(fitted))
        if not self.has_several_calls:
            fitted = list(_one_call_each(fitted))
        return [self._formed(message) for message in fitted]

    def _with_systems(self, messages: Sequence[Message]) -> list[Message]:
        num_first = next(
            (n for n, message in enumerate(messages) if message.get("role") != "system"),
            len(messages),
        )
        first, later = list(messages[:num_first]), list(messages[num_first:])
        if not self.has_several_systems and num_first > 1:
            first = [_joined(first)]
        if not self.has_system:
            first = _from_user(first)
        return [*first, *(later if self.has_later_systems else _from_user(later))]

    def _formed(self, message: Message) -> dict[str, Any]:
        role, content = message.get("role"), message.get("content")
        if role in self.part_roles and isinstance(content, str):
            return {**message, "content": [{"type": "text", "text": content}]}
        if role in self.text_roles and isinstance(content, (list, tuple)):
            return {**message, "content": text_of(content)}
        return dict(message)


def _forms(render: Render) -> tuple[frozenset[str], frozenset[str]]:
    """The roles whose content must be text, and those whose content must be parts."""
    texts, parts = set[str](), set[str]()
    for role in _ROLES:
        takes_text, takes_parts = (_takes(render, role, form) for form in (str, list))
        if not takes_parts:
            texts.add(role)
        elif not takes_text:
            parts.add(role)
    return frozenset(texts), frozenset(parts)


def _takes(render: Render, role: str, form: type) -> bool:
    """Whether content of this form comes out as its text, and not as Python's or JSON's of it."""
    one, two, three = _WORDS[:3]
    tried = _said(role, [{"type": "text", "text": one}] if form is list else one)
    before, behind = _said("user", two), _said("user", three)
    chats: dict[str, list[Message]] = {
        "user": [tried],
        "system": [tried, before],
        "assistant": [before, tried, behind],
        "tool": [before, _calls(three), {**tried, "tool_call_id": _id_of(three)}],
    }
    marks = ("'text'", '"text"') if form is list else ()
    return _shows(render, chats[role], (one,), marks, has_tools=role == "tool")


def _shows(
    render: Render,
    chat: Sequence[Message],
    words: Sequence[str],
    marks: Sequence[str] = (),
    *,
    has_tools: bool,
) -> bool:
    try:
        text = render(chat, [_TOOL] if has_tools else None)
    except InvalidParameterError:
        return False
    return all(word in text for word in words) and not any(mark in text for mark in marks)


def _said(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _id_of(word: str) -> str:
    return f"callprob{word[-1]}"  # Mistral's templates accept no other length


def _calls(*words: str) -> Message:
    calls = [
        {
            "id": _id_of(word),
            "type": "function",
            "function": {"name": _NAME, "arguments": {"word": word}},
        }
        for word in words
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _result(word: str) -> Message:
    return {"role": "tool", "tool_call_id": _id_of(word), "content": "done"}


def text_of(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """A message's content as one text, its parts joined by newlines."""
    if not content:
        return ""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if "text" in part)


def _joined(messages: Sequence[Message]) -> Message:
    texts = [text_of(message.get("content")) for message in messages]
    fields = {name: value for message in messages for name, value in message.items()}
    return {**fields, "content": "\n\n".join(filter(None, texts))}


def _from_user(messages: Sequence[Message]) -> list[Message]:
    return [
        {**message, "role": "user"} if message.get("role") == "system" else message
        for message in messages
    ]


def _alternating(messages: Sequence[Message]) -> Iterator[Message]:
    for speaker, group in itertools.groupby(messages, _speaker):
        turns = list(group)
        if speaker is None or len(turns) == 1:
            yield from turns
        else:
            yield _joined(turns)


def _speaker(message: Message) -> str | None:
    """Whose words a message is, if it is no more than words."""
    role = message.get("role")
    return role if role in ("user", "assistant") and not message.get("tool_calls") else None


def _bridged(messages: Sequence[Message]) -> Iterator[Message]:
    before = None
    for message in messages:
        if (before, message.get("role")) == ("tool", "user"):
            yield _BRIDGE
        yield message
        before = message.get("role")


def _one_call_each(messages: Sequence[Message]) -> Iterator[Message]:
    position = 0
    while position < len(messages):
        message = messages[position]
        position += 1
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            yield message
            continue
        end = position
        while end < len(messages) and messages[end].get("role") == "tool":
            end += 1
        results: dict[Any, list[Message]] = {}
        for result in messages[position:end]:
            results.setdefault(result.get("tool_call_id"), []).append(result)
        position = end
        for call in calls:
            yield {**message, "tool_calls": [call]}
            message = {"role": "assistant", "content": ""}
            yield from results.pop(call.get("id"), ())
        yield from itertools.chain.from_iterable(results.values())
