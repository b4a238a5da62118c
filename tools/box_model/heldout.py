"""Held-out dialogues with a check of the answer: what the evaluation and CI ask.

Nothing here was trained on: either the phrasing is new, or the slots are, or both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tools.box_model import dialogues, memory, persona
from tools.box_model.grammar import Exchange, Message

NAME_BACK = "name told two turns back"
SYSTEM_NAME = "name from the system prompt"
SYSTEM_TONE = "tone from the system prompt"
FOLLOW_UP = "follow-ups"
# The least share of right answers, per kind, on a sample of 200.
FLOORS = {
    "facts": 0.95,
    "sums": 0.90,
    NAME_BACK: 0.90,
    "system prompt": 0.90,
    "unknown": 0.90,
}
TABLE_GROUPS = [
    "small talk",
    "facts",
    "definitions",
    "sums",
    "larger sums",
    "differences",
    "times table",
    "word problems",
    "numbers",
    "counting",
    "calendar",
    "words",
    "spelling",
    "translation",
    "chinese",
    "stories and jokes",
    "unknown",
]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A dialogue that ends with a question; `kind` names what it tests.

    `answer` is one right answer, in no particular tone.
    """

    kind: str
    messages: list[dict[str, str]]
    pattern: str
    answer: str

    def check(self, answer: str) -> bool:
        return re.search(self.pattern, answer.strip(), re.IGNORECASE) is not None


def _dialogue(
    kind: str, system: str | None, before: list[Exchange], last: Exchange, pattern: str
) -> HeldOut:
    messages = [Message("system", system)] if system else []
    for exchange in before:
        messages += exchange.messages()
    messages.append(Message("user", last.question))
    asked = [{"role": m.role, "content": m.content} for m in messages]
    return HeldOut(kind, asked, pattern, last.answer)


def _question(group: str) -> Callable[[Random], HeldOut]:
    kinds = [kind for kind in dialogues.KINDS if kind.group == group]
    weights = [kind.weight for kind in kinds]

    def build(rng: Random) -> HeldOut:
        exchange = rng.choices(kinds, weights)[0].sample(rng, "held")
        return _dialogue(group, None, [], exchange, exchange.expect)

    return build


def _name_back(rng: Random) -> HeldOut:
    name = memory.NAME.value(rng, "held")
    before = [memory.NAME.told(rng, "held", name), dialogues.short_exchange(rng)]
    asked = memory.NAME.asked(rng, "held", name)
    return _dialogue(NAME_BACK, None, before, asked, asked.expect)


def _other_recall(rng: Random) -> HeldOut:
    recall = rng.choice(memory.RECALLS[1:])
    value = recall.value(rng, "held")
    told, asked = recall.told(rng, "held", value), recall.asked(rng, "held", value)
    return _dialogue("other things told", None, [told], asked, asked.expect)


def _system_name(rng: Random) -> HeldOut:
    system, name = persona.named(rng, "held")
    asked = persona.name_exchange(rng, "held", name)
    return _dialogue(SYSTEM_NAME, system, [], asked, asked.expect)


def _system_tone(rng: Random) -> HeldOut:
    system, tone = persona.tone_for(rng, "held")
    exchange = _fact_or_talk(rng)
    return _dialogue(SYSTEM_TONE, system, [], exchange, tone.mark)


def _fact_or_talk(rng: Random) -> Exchange:
    kinds = [kind for kind in dialogues.KINDS if kind.group in {"facts", "sums", "small talk"}]
    return rng.choices(kinds, [kind.weight for kind in kinds])[0].sample(rng, "held")


_HELD_FOLLOWS = [table for table in dialogues.TABLES if table.can_follow("held")]


def _follow_up(rng: Random) -> HeldOut:
    first, second = rng.choice(_HELD_FOLLOWS).sample_follow(rng, "held")
    return _dialogue(FOLLOW_UP, None, [first], second, second.expect)


BUILDERS: dict[str, Callable[[Random], HeldOut]] = {
    **{group: _question(group) for group in TABLE_GROUPS},
    FOLLOW_UP: _follow_up,
    NAME_BACK: _name_back,
    "other things told": _other_recall,
    SYSTEM_NAME: _system_name,
    SYSTEM_TONE: _system_tone,
}


def held_out_sample(kind: str, count: int, seed: int = 7) -> list[HeldOut]:
    rng = Random(f"{kind}-{seed}")
    return [BUILDERS[kind](rng) for _ in range(count)]


def ci_sample(seed: int = 7) -> list[HeldOut]:
    """200 dialogues: 40 for each entry of `FLOORS` (`floor_of` maps a kind to its entry)."""
    sample = []
    for kind, count in (
        ("facts", 40),
        ("sums", 40),
        (NAME_BACK, 40),
        (SYSTEM_NAME, 20),
        (SYSTEM_TONE, 20),
        ("unknown", 40),
    ):
        sample += held_out_sample(kind, count, seed)
    return sample


def floor_of(kind: str) -> str:
    """The entry of `FLOORS` that a dialogue of this kind counts for."""
    return "system prompt" if kind in {SYSTEM_NAME, SYSTEM_TONE} else kind
