"""Names to copy: common ones, and invented ones from syllables, each on one side of the split."""

# ruff: noqa: E501, SIM905 - a table reads best with one row a line, a word list as words
from __future__ import annotations

from random import Random

from tools.box_model.grammar import Split, held_out

COMMON = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olivia Paul Rosa Sam "
    "Tom Uma Vera Will Xenia Yara Zoe Alice Bob Carol Dan Eve Frank Gina Hugo Iris John Karl Lena "
    "Max Nina Oscar Peter Quinn Rita Sara Theo Ursula Victor Wendy Yusuf Zara Ahmed Aisha Ali "
    "Amir Ana Andrei Anton Bruno Carlos Chen Diego Dmitri Elena Elif Emil Fatima Fiona Gabriel "
    "Giulia Hana Hassan Ines Ivan Jana Javier Jin Jonas Jorge Juan Julia Kai Kemal Kenji Lars "
    "Laura Layla Li Liam Linh Lucas Lucia Luis Luna Magda Marco Maria Marie Mark Marta Mary Mei "
    "Miguel Mika Mila Mohamed Nadia Natasha Nick Nikhil Nora Omar Pablo Pavel Pedro Petra Pierre "
    "Priya Rahul Raj Ravi Robert Robin Ruth Sana Santiago Sasha Sean Sergei Simon Sofia Sophie "
    "Stefan Sven Tanya Tara Thomas Tim Tina Viktor Wei Yuki Yuna James Michael William Linda Susan "
    "Jessica Daniel Matthew Lisa Nancy Betty Helen Sandra Ashley Brian George Edward Ronald Kevin "
    "Jason Jeff Ryan Jacob Gary Eric Stephen Larry Justin Scott Brandon Amy Angela Anne Emily "
    "Rachel Janet Maya Ella Lily Ruby Chloe Freya Isla Alfie Archie Oliver Charlie Harry Freddie"
).split()
_ONSETS = "b c d f g h j k l m n p r s t v w z br cl dr fl gr kr pl st tr th sh ch sk qu y".split()
_VOWELS = "a e i o u a e i o ai ea io oo ei ua y".split()
_CODAS = ["", "", "", "", "n", "r", "l", "s", "m", "x", "k", "t", "nd", "rk", "sh", "ng"]
CHINESE = "小明 小红 小华 小丽 小强 小美 小龙 小雨 小雪 小林 小李 小王 小张 小陈 小刘 小白 小黑 小花 大伟 阿明 阿华 阿美 丽丽 明明 红红 乐乐 天天 文文 佳佳 月月 晓明 晓东 建国 志强 美玲 雅婷 子涵 思雨 雨桐 浩然".split()


_RUDE = (
    "shit",
    "fuk",
    "kunt",
    "dik",
    "kok",
    "nig",
    "fag",
    "tit",
    "slut",
    "pis",
    "ass",
    "rap",
    "sex",
    "hoe",
    "naz",
)


def _side_is(word: str, split: Split) -> bool:
    return held_out("name", word.lower()) == (split == "held")


def invented_word(rng: Random, split: Split) -> str:
    """A word of two or three syllables that is in no dictionary, with a capital."""
    while True:
        count = rng.choice((2, 2, 2, 3))
        syllables = (rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(count))
        word = "".join(syllables) + rng.choice(_CODAS)
        if any(part in word for part in _RUDE):
            continue
        if _side_is(word, split) and word.capitalize() not in COMMON:
            return word.capitalize()


def person(rng: Random, split: Split) -> str:
    """A common name or an invented one."""
    if rng.random() < 0.65:
        return invented_word(rng, split)
    while True:
        name = rng.choice(COMMON)
        if _side_is(name, split):
            return name


def chinese_person(rng: Random, split: Split) -> str:
    while True:
        name = rng.choice(CHINESE)
        if _side_is(name, split):
            return name
