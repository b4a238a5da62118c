"""Whole conversations: single questions, follow-ups, memory, system prompts, long chats."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from random import Random
from typing import Protocol

from tools.box_model import (
    chinese,
    definitions,
    facts,
    memory,
    numbers,
    persona,
    single_facts,
    small_talk,
    stories,
    unknown,
    words,
)
from tools.box_model.grammar import Exchange, Message, Split, Table, normalise
from tools.box_model.names import chinese_person, person

TABLES: list[Table] = [
    *small_talk.TABLES,
    *facts.TABLES,
    *single_facts.TABLES,
    *numbers.TABLES,
    *words.TABLES,
    *definitions.TABLES,
    *unknown.TABLES,
    *chinese.TABLES,
]


class Kind(Protocol):
    """Anything that can produce an exchange on one side of the split."""

    name: str
    group: str
    weight: float

    def sample(self, rng: Random, split: Split) -> Exchange: ...


KINDS: list[Kind] = [*TABLES, *stories.KINDS, unknown.InventedNames(), unknown.BigNumbers()]
_WEIGHTS = [kind.weight for kind in KINDS]
_FOLLOWABLE = [table for table in TABLES if table.can_follow("train")]
_FOLLOW_WEIGHTS = [table.weight for table in _FOLLOWABLE]
_SHORT_GROUPS = {
    "small talk",
    "facts",
    "sums",
    "words",
    "numbers",
    "calendar",
    "definitions",
    "unknown",
    "spelling",
}
_SHORT_KINDS = [kind for kind in KINDS if kind.group in _SHORT_GROUPS]
_SHORT_WEIGHTS = [kind.weight for kind in _SHORT_KINDS]
# Exchanges that would contradict a system prompt that sets another name.
_IDENTITY = {"who_are_you", "your_name", "greeting", "streamserve", "secret", "age"}

_OPENERS = (
    "Hey, ",
    "Box, ",
    "Please, ",
    "So, ",
    "Ok, ",
    "hey ",
    "And ",
    "Hi! ",
    "Hmm, ",
    "Question: ",
    "Quick question: ",
    "Tell me: ",
    "I want to know: ",
    "Another question: ",
    "Next: ",
)


@cache
def held_questions() -> frozenset[str]:
    """Every held-out question of every table, normalised."""
    return frozenset(question for table in TABLES for question in table.questions("held"))


def _typo(rng: Random, word: str) -> str:
    i = rng.randrange(1, len(word) - 1)
    head, letter, rest = word[:i], word[i], word[i + 1 :]
    return rng.choice([head + rest, head + 2 * letter + rest, head + rest[0] + letter + rest[1:]])


def _mistyped(rng: Random, question: str, slots: str) -> str:
    """`question` with a typo in one plain word that is no part of a slot."""
    pieces = question.split(" ")
    free = [
        i
        for i, word in enumerate(pieces)
        if len(word) > 3 and word.isalpha() and word.isascii() and word.lower() not in slots
    ]
    if free:
        i = rng.choice(free)
        pieces[i] = _typo(rng, pieces[i])
    return " ".join(pieces)


def noisy(rng: Random, exchange: Exchange) -> Exchange:
    """The question as people really type it: lower case, no question mark, a typo, a “please”.

    Slot values keep their spelling. Never turns a trained question into a held-out one.
    """
    question = exchange.question
    if rng.random() < 0.55:
        return exchange
    for _ in range(rng.choice((1, 1, 2))):
        roll = rng.random()
        if roll < 0.35:
            proper = any(value[:1].isupper() and value in question for value in exchange.fixed)
            question = question[:1].lower() + question[1:] if proper else question.lower()
        elif roll < 0.6:
            question = question.rstrip("?.!")
        elif roll < 0.7:
            question = question + rng.choice(["!", "??", " please", " :)", " 😊", "...", " "])
        elif roll < 0.78:
            question = rng.choice(_OPENERS) + question
        else:
            question = _mistyped(rng, question, " ".join(exchange.fixed).lower())
    if normalise(question) in held_questions():
        return exchange
    return replace(exchange, question=question)


def any_exchange(rng: Random, split: Split) -> Exchange:
    return rng.choices(KINDS, _WEIGHTS)[0].sample(rng, split)


def short_exchange(rng: Random) -> Exchange:
    """A trained exchange with a short answer, to fill the turns between two others."""
    return rng.choices(_SHORT_KINDS, _SHORT_WEIGHTS)[0].sample(rng, "train")


def turns(rng: Random) -> list[Exchange]:
    """One to four trained exchanges that belong together."""
    roll = rng.random()
    if roll < 0.76:
        return [any_exchange(rng, "train")]
    if roll < 0.94:
        table = rng.choices(_FOLLOWABLE, _FOLLOW_WEIGHTS)[0]
        pair = list(table.sample_follow(rng, "train"))
        while rng.random() < 0.3:
            pair.append(table.sample_follow(rng, "train")[1])
        return pair
    if roll < 0.98:
        kind = rng.choice((stories.JOKE, stories.JOKE, stories.FUN_FACT))
        return kind.several(rng, "train", rng.randint(2, 4))
    return stories.RIDDLE.with_answer(rng, "train")


def _render(rng: Random, system: str | None, exchanges: list[Exchange]) -> list[Message]:
    messages = [Message("system", system)] if system else []
    for exchange in exchanges:
        messages += (noisy(rng, exchange)).messages()
    return messages


def _plain_system(rng: Random) -> str | None:
    return rng.choice(persona.PLAIN_PROMPTS) if rng.random() < 0.25 else None


def chat(rng: Random) -> list[Message]:
    """A few unrelated questions."""
    exchanges: list[Exchange] = []
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4))):
        exchanges += turns(rng)
    return _render(rng, _plain_system(rng), exchanges)


def long_chat(rng: Random) -> list[Message]:
    """Many turns, so that late positions are trained too."""
    exchanges: list[Exchange] = []
    for _ in range(rng.randint(8, 26)):
        exchanges += turns(rng)
    told, recall = memory.NAME, memory.NAME.value(rng, "train")
    at = rng.randint(0, len(exchanges) // 2)
    exchanges.insert(at, told.told(rng, "train", recall))
    exchanges.append(told.asked(rng, "train", recall))
    return _render(rng, _plain_system(rng), exchanges)


def remembering(rng: Random) -> list[Message]:
    """Something is told, then other turns, then it is asked back, sometimes twice or changed."""
    weights = [recall.weight for recall in memory.RECALLS]
    drawn = rng.choices(memory.RECALLS, weights, k=rng.choice((1, 1, 2)))
    chosen = list({recall.name: recall for recall in drawn}.values())
    values = {r.name: r.value(rng, "train") for r in chosen}
    exchanges: list[Exchange] = []
    if rng.random() < 0.3:
        exchanges.append(short_exchange(rng))
    for recall in chosen:
        exchanges.append(recall.told(rng, "train", values[recall.name]))
        exchanges += [short_exchange(rng) for _ in range(rng.choice((0, 0, 1, 1, 2, 3)))]
    if "name" in values and rng.random() < 0.15:
        values["name"] = memory.NAME.value(rng, "train")
        exchanges.append(memory.renamed(rng, "train", values["name"]))
    rng.shuffle(chosen)
    for recall in chosen:
        exchanges.append(recall.asked(rng, "train", values[recall.name]))
        if rng.random() < 0.3:
            exchanges.append(short_exchange(rng))
    return _render(rng, _plain_system(rng), exchanges)


def not_told(rng: Random) -> list[Message]:
    """The user asks back what was never told."""
    recall = rng.choices(memory.RECALLS, [r.weight for r in memory.RECALLS])[0]
    other = rng.choice([r for r in memory.RECALLS if r.name.split()[-1] != recall.name.split()[-1]])
    exchanges = [short_exchange(rng) for _ in range(rng.choice((0, 0, 1, 2)))]
    if rng.random() < 0.4:
        exchanges.append(other.told(rng, "train", other.value(rng, "train")))
    exchanges.append(recall.not_told(rng, "train"))
    return _render(rng, _plain_system(rng), exchanges)


def _unrelated(rng: Random) -> Exchange:
    """A short exchange that does not speak of the assistant's own name."""
    while True:
        kind = rng.choices(_SHORT_KINDS, _SHORT_WEIGHTS)[0]
        if kind.name not in _IDENTITY:
            return kind.sample(rng, "train")


def with_name(rng: Random) -> list[Message]:
    """The system prompt names the assistant."""
    if rng.random() < 0.12:
        name = chinese_person(rng, "train")
        question, answer = rng.choice(persona.ZH_ASKS), f"我叫{name}。"
        exchange = Exchange("system prompt: name", question, answer, name, name, (name,))
        return _render(rng, rng.choice(persona.ZH_PROMPTS).format(v=name), [exchange])
    system, name = persona.named(rng, "train")
    exchanges = [_unrelated(rng) for _ in range(rng.choice((0, 0, 1, 2)))]
    exchanges.append(persona.name_exchange(rng, "train", name))
    exchanges += [_unrelated(rng) for _ in range(rng.choice((0, 0, 1)))]
    if rng.random() < 0.2:
        user = memory.NAME.value(rng, "train")
        exchanges.append(memory.NAME.told(rng, "train", user))
        mine = memory.NAME.asked(rng, "train", user)
        exchanges.append(rng.choice((mine, persona.name_exchange(rng, "train", name))))
    return _render(rng, system, exchanges)


def in_tone(rng: Random) -> list[Message]:
    """The system prompt sets a tone; every answer keeps it."""
    system, tone = persona.tone_for(rng, "train")
    exchanges = [short_exchange(rng) for _ in range(rng.choice((1, 1, 2, 3)))]
    return _render(rng, system, [replace(e, answer=tone.say(rng, e)) for e in exchanges])


BUILDERS: list[tuple[Callable[[Random], list[Message]], float]] = [
    (chat, 0.50),
    (remembering, 0.15),
    (not_told, 0.03),
    (with_name, 0.14),
    (in_tone, 0.17),
    (long_chat, 0.01),
]


def dialogue(rng: Random) -> list[Message]:
    """One training conversation."""
    builders, weights = zip(*BUILDERS, strict=True)
    return rng.choices(builders, weights)[0](rng)


def plain_text(rng: Random) -> str:
    """A text without roles, so that the completions endpoint has something to continue."""
    if rng.random() < 0.4:
        return stories.story(rng, rng.choice(stories.HEROES), person(rng, "train"))
    count = rng.randint(2, 6)
    return " ".join(re.sub(r"\n", " ", short_exchange(rng).answer) for _ in range(count))
