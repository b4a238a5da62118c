"""What a program may hand to ``generate`` and ``chat``, checked and in one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from streamserve.api.choices import Choices
from streamserve.api.extras import Truncation
from streamserve.core.sampling_params import SamplingParams
from streamserve.errors import InvalidParameterError
from streamserve.llm.lora_request import LoRARequest
from streamserve.llm.sampling_params import choices_of


class TextPrompt(TypedDict):
    """A prompt as vLLM's users may write it."""

    prompt: str


class TokensPrompt(TypedDict):
    """One that is tokenised."""

    prompt_token_ids: list[int]


NO_TRUNCATION = Truncation()

Prompt = str | list[int] | TextPrompt | TokensPrompt
Prompts = Prompt | Sequence[Prompt]
Message = Mapping[str, Any]
Conversations = Sequence[Message] | Sequence[Sequence[Message]]


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt, in order, and how to answer it: text, token ids, or a conversation."""

    index: int
    request_id: str
    prompt: str | list[int] | Sequence[Message]
    params: SamplingParams
    priority: int = 0
    truncation: Truncation = NO_TRUNCATION
    lora_request: LoRARequest | None = None

    @property
    def choices(self) -> Choices:
        """How many answers it wants, and how they are found."""
        return choices_of(self.params)

    @property
    def is_conversation(self) -> bool:
        """Whether a chat template makes the prompt."""
        return is_conversation(self.prompt)


def is_conversation(prompt: Any) -> bool:
    """Whether it begins with a message."""
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    return is_list and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def read_prompts(prompts: Any) -> list[str | list[int]]:
    """One prompt or several as a list. Raises ``InvalidParameterError`` naming the one at fault."""
    if isinstance(prompts, str | Mapping) or _are_ids(prompts):
        return [_read_prompt("prompts", prompts)]
    if not isinstance(prompts, Sequence):
        raise _wrong("prompts", prompts)
    return [_read_prompt(f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts)]


def read_conversations(messages: Any) -> list[Sequence[Message]]:
    """One conversation or several as a list. Raises ``InvalidParameterError``."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise _wrong_messages(messages)
    conversations = [messages] if isinstance(messages[0], Mapping) else list(messages)
    for conversation in conversations:
        if not isinstance(conversation, Sequence) or not conversation:
            raise _wrong_messages(conversation)
        if not all(isinstance(message, Mapping) for message in conversation):
            raise _wrong_messages(conversation)
    return conversations


def _read_prompt(name: str, prompt: Any) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        for key, value in prompt.items():
            if key not in ("prompt", "prompt_token_ids") and value is not None:
                raise InvalidParameterError(
                    f"{name} must hold only prompt or prompt_token_ids, got {key!r}", param=name
                )
        ids = prompt.get("prompt_token_ids")
        return _read_prompt(name, prompt.get("prompt") if ids is None else ids)
    if _are_ids(prompt):
        return list(prompt)
    raise _wrong(name, prompt)


def _are_ids(value: Any) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        return False
    return all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def per_prompt(name: str, value: Any, count: int) -> list[Any]:
    """``value`` for each of ``count`` prompts, or a sequence's items one by one.

    Raises ``InvalidParameterError`` where there are not as many.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InvalidParameterError(
            f"{name} must be one or as many as prompts ({count}), got {len(value)}", param=name
        )
    return list(value)


def lora_requests(value: Any, count: int) -> list[LoRARequest | None]:
    """Each prompt's adapter. Raises ``InvalidParameterError``."""
    found = per_prompt("lora_request", value, count)
    for one in found:
        if one is not None and not isinstance(one, LoRARequest):
            raise InvalidParameterError(
                f"lora_request must be a LoRARequest, got {type(one).__name__}",
                param="lora_request",
            )
    return found


def _wrong(name: str, value: Any) -> InvalidParameterError:
    return InvalidParameterError(
        f"{name} must be a string, token ids, or a dict with prompt or prompt_token_ids, "
        f"got {type(value).__name__}",
        param=name,
    )


def _wrong_messages(value: Any) -> InvalidParameterError:
    return InvalidParameterError(
        "messages must be a list of messages or a list of such lists, none empty, "
        f"got {value!r:.100}",
        param="messages",
    )
