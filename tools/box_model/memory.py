"""Things told earlier in the chat: a name, a pet, a favourite; and asking about them later."""

# ruff: noqa: E501, SIM905 - a table reads best with one row a line, a word list as words
from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tools.box_model.grammar import Exchange, Split, sentence
from tools.box_model.names import chinese_person, invented_word, person

COLOURS = "red blue green yellow black white pink purple orange brown grey".split()
ANIMALS = (
    "cat dog horse fox bear owl lion tiger penguin rabbit elephant panda frog whale dolphin".split()
)
FOODS = "pizza pasta rice soup bread cheese chocolate cake salad sushi curry tacos noodles apples".split()
JOBS = "teacher doctor nurse farmer pilot baker painter student writer driver cook musician gardener".split()


@dataclass(frozen=True)
class Recall:
    """Something the user tells, and asks back: `tell` before, `ask` after."""

    name: str
    tell: list[str]
    tell_held: list[str]
    confirm: list[str]
    ask: list[str]
    ask_held: list[str]
    answer: list[str]
    missing: str
    weight: float

    def value(self, rng: Random, split: Split) -> str:
        pools = {"colour": COLOURS, "animal": ANIMALS, "food": FOODS, "job": JOBS}
        if self.name in pools:
            return rng.choice(pools[self.name])
        if self.name == "age":
            return str(rng.randint(4, 90))
        if self.name == "zh name":
            return chinese_person(rng, split)
        return invented_word(rng, split) if self.name == "town" else person(rng, split)

    def told(self, rng: Random, split: Split, value: str) -> Exchange:
        tell = rng.choice(self.tell_held if split == "held" and rng.random() < 0.5 else self.tell)
        answer = sentence(rng.choice(self.confirm).format(v=value))
        return Exchange("memory", tell.format(v=value), answer, answer, value, (value,))

    def asked(self, rng: Random, split: Split, value: str) -> Exchange:
        ask = rng.choice(self.ask_held if split == "held" and rng.random() < 0.5 else self.ask)
        answer = rng.choice(self.answer).format(v=value)
        return Exchange(
            "memory", ask, answer, value + ".", rf"(?<!\w){value}(?![^\W\u4e00-\u9fff])", (value,)
        )

    def not_told(self, rng: Random, split: Split) -> Exchange:
        ask = rng.choice(self.ask_held if split == "held" and rng.random() < 0.5 else self.ask)
        return Exchange("memory", ask, self.missing, self.missing, "told me|告诉")


RECALLS = [
    Recall(
        "name",
        tell=[
            "My name is {v}.",
            "my name is {v}",
            "I'm {v}.",
            "I am {v}.",
            "Hi, I'm {v}.",
            "Hello, my name is {v}.",
            "Call me {v}.",
            "You can call me {v}.",
            "Hi! My name is {v}.",
            "I am called {v}.",
            "My name's {v}.",
            "im {v}",
            "{v} is my name.",
            "Hello, I am {v}!",
            "Remember: my name is {v}.",
            "Hey, {v} here.",
        ],
        tell_held=["Please call me {v}.", "Hello there, I'm {v}.", "The name is {v}."],
        confirm=[
            "Nice to meet you, {v}!",
            "Hello, {v}! How can I help you?",
            "Hi {v}, nice to meet you!",
        ],
        ask=[
            "What is my name?",
            "What's my name?",
            "Do you remember my name?",
            "Do you know my name?",
            "Who am I?",
            "what is my name",
            "whats my name",
            "Tell me my name.",
            "What did I say my name was?",
            "And what is my name?",
            "Can you tell me my name?",
            "my name?",
            "So what's my name?",
        ],
        ask_held=["Do you still know my name?", "Could you tell me my name?", "Say my name."],
        answer=["Your name is {v}.", "You are {v}!"],
        missing="You haven't told me your name yet. What is it?",
        weight=9,
    ),
    Recall(
        "zh name",
        tell=[
            "我叫{v}。",
            "我的名字是{v}。",
            "我是{v}。",
            "你好，我叫{v}。",
            "我叫{v}",
            "大家都叫我{v}。",
        ],
        tell_held=["你可以叫我{v}。", "您好，我是{v}。"],
        confirm=["你好，{v}！很高兴认识你。"],
        ask=["我叫什么名字？", "我叫什么？", "我是谁？", "你记得我的名字吗？", "我的名字是什么？"],
        ask_held=["你还记得我叫什么吗？"],
        answer=["你叫{v}。"],
        missing="你还没有告诉我你的名字。你叫什么？",
        weight=3,
    ),
    Recall(
        "colour",
        tell=[
            "My favourite colour is {v}.",
            "My favorite color is {v}.",
            "I like the colour {v}.",
            "I love {v}, it is my favourite colour.",
        ],
        tell_held=["{v} is my favourite colour."],
        confirm=["{v} is a lovely colour!"],
        ask=[
            "What is my favourite colour?",
            "What's my favorite color?",
            "Which colour do I like?",
            "Do you remember my favourite colour?",
        ],
        ask_held=["Which is my favourite colour?"],
        answer=["Your favourite colour is {v}."],
        missing="You haven't told me your favourite colour yet.",
        weight=2,
    ),
    Recall(
        "animal",
        tell=[
            "My favourite animal is the {v}.",
            "My favorite animal is the {v}.",
            "The animal I like best is the {v}.",
        ],
        tell_held=["The {v} is my favourite animal."],
        confirm=["The {v} is a wonderful animal!"],
        ask=[
            "What is my favourite animal?",
            "What's my favorite animal?",
            "Which animal do I like?",
            "Do you remember my favourite animal?",
        ],
        ask_held=["Which is my favourite animal?"],
        answer=["Your favourite animal is the {v}."],
        missing="You haven't told me your favourite animal yet.",
        weight=1.5,
    ),
    Recall(
        "food",
        tell=[
            "My favourite food is {v}.",
            "I love {v}.",
            "I like to eat {v}.",
            "My favorite food is {v}.",
        ],
        tell_held=["The food I like best is {v}."],
        confirm=["{v} sounds tasty! 😋"],
        ask=[
            "What is my favourite food?",
            "What do I like to eat?",
            "What's my favorite food?",
            "Do you remember my favourite food?",
        ],
        ask_held=["Which food do I like?"],
        answer=["Your favourite food is {v}."],
        missing="You haven't told me your favourite food yet.",
        weight=1.5,
    ),
    Recall(
        "pet",
        tell=[
            "My dog is called {v}.",
            "I have a dog called {v}.",
            "I have a cat named {v}.",
            "My cat's name is {v}.",
            "My pet is called {v}.",
        ],
        tell_held=["I have a pet, it is called {v}."],
        confirm=["{v} is a great name for a pet!"],
        ask=[
            "What is my pet called?",
            "What is the name of my pet?",
            "What's my pet's name?",
            "Do you remember the name of my pet?",
        ],
        ask_held=["How is my pet called?"],
        answer=["Your pet is called {v}."],
        missing="You haven't told me about your pet yet.",
        weight=2,
    ),
    Recall(
        "town",
        tell=[
            "I live in {v}.",
            "I'm from {v}.",
            "I am from {v}.",
            "I come from {v}.",
            "My home town is {v}.",
        ],
        tell_held=["My home is in {v}."],
        confirm=["{v} sounds like a nice place!"],
        ask=[
            "Where do I live?",
            "Where am I from?",
            "Where do I come from?",
            "Do you remember where I live?",
        ],
        ask_held=["Tell me where I live."],
        answer=["You told me: {v}."],
        missing="You haven't told me where you live.",
        weight=2,
    ),
    Recall(
        "job",
        tell=["I'm a {v}.", "I am a {v}.", "I work as a {v}.", "My job is {v}."],
        tell_held=["By profession I am a {v}."],
        confirm=["Being a {v} sounds interesting!"],
        ask=["What is my job?", "What do I work as?", "What's my job?", "Do you remember my job?"],
        ask_held=["Which job do I have?"],
        answer=["You are a {v}."],
        missing="You haven't told me your job yet.",
        weight=1.5,
    ),
    Recall(
        "age",
        tell=["I am {v} years old.", "I'm {v} years old.", "I'm {v}.", "My age is {v}."],
        tell_held=["I turned {v} today."],
        confirm=["{v} is a fine age!"],
        ask=["How old am I?", "What is my age?", "Do you remember how old I am?", "What's my age?"],
        ask_held=["Tell me how old I am."],
        answer=["You are {v} years old."],
        missing="You haven't told me how old you are.",
        weight=1.5,
    ),
]
NAME = RECALLS[0]
RENAME = [
    "Actually, my name is {v}.",
    "No, my name is {v}.",
    "Sorry, I meant {v}. Call me {v}.",
    "Please call me {v} from now on.",
]


def renamed(rng: Random, split: Split, value: str) -> Exchange:
    """The user corrects the name; the newest one counts."""
    answer = f"Of course, {value}!"
    return Exchange("memory", rng.choice(RENAME).format(v=value), answer, answer, value, (value,))
