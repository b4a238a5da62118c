"""Question tables, and the split that holds phrasings and slot combinations out of training.

A `Table` is a set of rows (the slots), ways to ask, and ways to answer. A question is one
(phrasing, row) pair, and each pair is on exactly one side of the split:

                      rows
                 r1  r2  r3  r4
    asks     a1   .   .   H   .      hold="pair": one pair in ten is held out; the row is still
             a2   .   H   .   .                   trained in other phrasings (facts)
    held     h1   H   H   H   H      hold="row":  whole rows are held out (sums, names)
    asks     h2   H   H   H   H      hold="none": only phrasings are held out (small talk)

The side is a hash of the text, so it does not move when a table grows.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from random import Random
from typing import Literal

Row = Mapping[str, str]
Split = Literal["train", "held"]
HELD_PERCENT = 10


@dataclass(frozen=True, slots=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and its answer; `short` is the answer in as few words as possible.

    `expect` is a regular expression that a right answer contains, whatever its case.
    """

    group: str
    question: str
    answer: str
    short: str
    expect: str
    fixed: tuple[str, ...] = ()

    def messages(self) -> list[Message]:
        return [Message("user", self.question), Message("assistant", self.answer)]


def expand(template: str) -> list[str]:
    """All strings of a template with `[a|b|]` choices (not nested)."""
    parts = re.split(r"\[([^\]]*)\]", template)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return [re.sub(r"  +", " ", "".join(pick)).strip() for pick in product(*choices)]


def normalise(text: str) -> str:
    """A question without case, punctuation and spacing: what "the same question" means here."""
    text = unicodedata.normalize("NFKC", text).lower().replace("'", "").replace("’", "")
    kept = "".join(c if c.isalnum() or c in "+-*/=<>×÷" or ord(c) > 0x2000 else " " for c in text)
    return " ".join(re.sub(r"[。？！，、]", " ", kept).split())


def held_out(*parts: str, percent: int = HELD_PERCENT) -> bool:
    return zlib.crc32("|".join(parts).encode()) % 100 < percent


def sentence(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def rows(names: str, text: str) -> list[dict[str, str]]:
    """Rows from `a: b: c; d: e: f`, one value for each of the space-separated names."""
    keys = names.split()
    table = []
    for line in text.replace("\n", " ").split(";"):
        if line.strip():
            values = [value.strip() for value in line.split(":")]
            if len(values) != len(keys):
                raise ValueError(f"{line!r} has {len(values)} values for {names!r}")
            table.append(dict(zip(keys, values, strict=True)))
    return table


@dataclass(frozen=True)
class Table:
    """A kind of question. Templates hold `{slot}` names and `[a|b]` choices.

    `follow` are short forms that lean on the question before ("and {country}?").
    `keep` lists row keys that are never held out, because every newcomer asks them.
    """

    name: str
    group: str
    asks: Sequence[str]
    held_asks: Sequence[str]
    answers: Sequence[str]
    rows: Sequence[Row] = ({},)
    short: str = ""
    expect: str = ""
    follow: Sequence[str] = ()
    hold: Literal["pair", "row", "none"] = "pair"
    keep: frozenset[str] = frozenset()
    weight: float = 1.0
    noisy: bool = True
    _asks: list[str] = field(init=False, repr=False)
    _held_asks: list[str] = field(init=False, repr=False)
    _answers: list[str] = field(init=False, repr=False)
    _follow: list[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        held = [t for ask in self.held_asks for t in expand(ask)]
        known = {normalise(t) for t in held}
        asks = [t for ask in self.asks for t in expand(ask) if normalise(t) not in known]
        object.__setattr__(self, "_asks", asks)
        object.__setattr__(self, "_held_asks", held)
        object.__setattr__(self, "_answers", [t for a in self.answers for t in expand(a)])
        object.__setattr__(self, "_follow", [t for f in self.follow for t in expand(f)])

    @staticmethod
    def key(row: Row) -> str:
        return "|".join(row.values())

    def side(self, ask: str, row: Row) -> Split:
        if self.hold == "none" or self.key(row) in self.keep:
            return "train"
        if self.hold == "row":
            # A row may name its hold-out key, so that a+b and b+a go to the same side.
            return "held" if held_out(self.name, row.get("hold", self.key(row))) else "train"
        return "held" if held_out(self.name, normalise(ask), self.key(row)) else "train"

    def make(self, rng: Random, ask: str, row: Row) -> Exchange:
        answer = sentence(rng.choice(self._answers).format(**row)).replace("..", ".")
        short = self.short.format(**row) if self.short else answer
        return Exchange(
            group=self.group,
            question=ask.format(**row),
            answer=answer,
            short=sentence(short).replace("..", "."),
            expect=re.sub(r"\{([a-z]+)\}", lambda m: re.escape(row[m[1]]), self.expect),
            fixed=tuple(row.values()),
        )

    def sample(self, rng: Random, split: Split) -> Exchange:
        while True:
            row = rng.choice(self.rows)
            if split == "held" and self._held_asks and (self.hold == "none" or rng.random() < 0.5):
                return self.make(rng, rng.choice(self._held_asks), row)
            ask = rng.choice(self._asks)
            if self.side(ask, row) == split:
                return self.make(rng, ask, row)

    def sample_follow(self, rng: Random, split: Split) -> tuple[Exchange, Exchange]:
        """A trained question and its short follow-up; the follow-up is on `split`'s side."""
        while True:
            ask, row = rng.choice(self._follow), rng.choice(self.rows)
            if self.side(ask, row) == split:
                first = self.sample(rng, "train")
                second = self.make(rng, ask, row)
                if first.expect != second.expect:
                    return first, second

    def can_follow(self, split: Split) -> bool:
        """Whether some short follow-up is on `split`'s side (and so `sample_follow` ends)."""
        return len(self.rows) > 1 and any(
            self.side(ask, row) == split for ask in self._follow for row in self.rows
        )

    def questions(self, split: Split) -> Iterator[str]:
        """Every question of one side, normalised."""
        for row in self.rows:
            for ask in self._asks:
                if self.side(ask, row) == split:
                    yield normalise(ask.format(**row))
            if split == "held":
                for ask in self._held_asks:
                    yield normalise(ask.format(**row))
