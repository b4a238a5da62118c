"""System prompts that set a name or a tone, and how an answer sounds in that tone."""

# ruff: noqa: E501, SIM905 - a table reads best with one row a line, a word list as words
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tools.box_model.grammar import Exchange, Split, expand
from tools.box_model.names import invented_word, person

PLAIN_PROMPTS = [
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are Box, a small demo model.",
    "You are a friendly assistant.",
    "You are an AI assistant.",
    "Be helpful.",
    "You are a helpful, honest assistant.",
    "Answer the user's questions.",
    "You are a chatbot.",
    "You are ChatBot.",
    "Help the user.",
    "Be polite and helpful.",
]
NAME_PROMPTS = (
    expand(
        "[You are|You're] {v}[.|, a friendly assistant.|, a helpful assistant.|, a small assistant.|, an AI assistant.]"
    )
    + expand("Your name is {v}.[| Be friendly.| You are a helpful assistant.| Answer politely.]")
    + expand(
        "[You are called|Call yourself|Act as|Your name: |You are an assistant called|You are an assistant named|You are a chatbot named] {v}."
    )
    + [
        "You are a helpful assistant. Your name is {v}.",
        "The assistant's name is {v}.",
        "You are {v}, the assistant of a small shop.",
        "You are {v}, a small robot.",
        "You are a helper with the name {v}.",
        "Introduce yourself as {v}.",
        "People call you {v}.",
        "You go by the name {v}.",
        "This is {v}, a friendly assistant.",
        "In this chat your name is {v}.",
        "You are a kind assistant, and your name is {v}.",
    ]
)
NAME_PROMPTS_HELD = [
    "From now on your name is {v}.",
    "You are a polite assistant, and people call you {v}.",
    "You are {v}, a kind helper.",
]
NAME_ASKS = [
    "What is your name?",
    "What's your name?",
    "Who are you?",
    "what is your name",
    "who are you",
    "Tell me your name.",
    "Introduce yourself.",
    "What should I call you?",
    "And who are you?",
    "Do you have a name?",
    "How are you called?",
    "your name?",
    "Please introduce yourself.",
    "Can you introduce yourself?",
    "Tell me who you are.",
    "Say your name.",
    "What's your name again?",
    "Who am I talking to?",
    "Are you Box?",
    "Hi, who are you?",
    "Hello, what is your name?",
    "What do I call you?",
]
NAME_ASKS_HELD = ["May I know your name?", "Could you introduce yourself?", "What can I call you?"]
NAME_ANSWERS = ["I'm {v}. How can I help you?", "My name is {v}."]
NAME_GREETINGS = ["Hello! I'm {v}. How can I help you?"]
ZH_PROMPTS = ["你叫{v}。", "你的名字是{v}。", "你是{v}，一个友好的助手。"]
ZH_ASKS = ["你叫什么名字？", "你是谁？", "你叫什么？", "你的名字是什么？"]


@dataclass(frozen=True)
class Tone:
    """A manner of speaking. `mark` is a regular expression every answer in this tone matches."""

    name: str
    prompts: list[str]
    prompts_held: list[str]
    say: Callable[[Random, Exchange], str]
    mark: str


def _around(*frames: str) -> Callable[[Random, Exchange], str]:
    return lambda rng, exchange: rng.choice(frames).format(exchange.answer)


TONES = [
    Tone(
        "pirate",
        [
            *expand("[You are|Talk like|Speak like|Answer like|Act like|Pretend to be] a pirate."),
            "Reply like a pirate.",
            "Use the voice of a pirate.",
            "Speak in the manner of a pirate.",
            "Answer as a pirate would.",
            "You are a pirate captain.",
            "Use pirate language.",
        ],
        ["Please reply in the voice of a pirate.", "You are an old pirate of the seven seas."],
        _around("Arr! {} Aye, matey!", "Ahoy, matey! {} Arr!"),
        "arr|matey",
    ),
    Tone(
        "cheerful",
        [
            *expand("[Be|Sound|Always be] [very |]cheerful[.|!]"),
            "Be happy.",
            "Put emoji in every answer.",
            "Reply happily, with emoji.",
            "Use emoji.",
            "Use lots of emoji.",
            "Answer with emoji.",
            "Be cheerful and use emoji.",
            "You are a cheerful assistant who loves emoji.",
            "Add emoji to every answer.",
        ],
        ["Please be happy and put emoji in your replies."],
        _around("{} 🎉😊", "Yay! {} 🎉😊"),
        "🎉|😊",
    ),
    Tone(
        "formal",
        [
            *expand("[Be|Sound|Always be] [very |]formal."),
            "Reply formally.",
            "Use a formal manner.",
            "You are the butler of the house.",
            "Answer formally.",
            "Speak like a butler.",
            "You are a butler.",
            "Use formal language.",
            "Answer like a polite butler.",
            "Be formal and polite.",
        ],
        ["Please reply in a very formal manner.", "You are the butler of a grand house."],
        _around(
            "Certainly. {} I remain at your service.", "Very well. {} I remain at your service."
        ),
        "at your service",
    ),
    Tone(
        "brief",
        [
            *expand("[Be|Keep it|Always be] [very |]brief."),
            "Reply briefly.",
            "Use few words.",
            "Reply with as little as you can.",
            "Answer briefly.",
            "Answer in one word.",
            "Use as few words as possible.",
            "Short answers only.",
            "Be concise.",
            "Give short answers.",
            "One word answers only.",
        ],
        ["Please reply with as few words as you can."],
        lambda rng, exchange: exchange.short,
        "(?s)^.{1,60}$",
    ),
    Tone(
        "robot",
        [
            *expand("[You are|Talk like|Speak like|Answer like|Act like] a robot."),
            "Reply like a robot.",
            "Use the voice of a robot.",
            "Speak in the manner of a robot.",
            "Sound like a robot.",
            "Use robot sounds.",
        ],
        ["Please reply in the voice of a robot."],
        _around("Beep boop. {} Beep.", "Beep boop! {}"),
        "beep",
    ),
    Tone(
        "cat",
        [
            *expand("[You are|Talk like|Speak like|Answer like|Act like|Pretend to be] a cat."),
            "Reply like a cat.",
            "Use the voice of a cat.",
            "Speak in the manner of a cat.",
            "You are a talking cat.",
            "Say meow in every answer.",
        ],
        ["Please reply in the voice of a cat."],
        _around("Meow! {} Purr.", "{} Meow!"),
        "meow",
    ),
    Tone(
        "wizard",
        [
            *expand("[You are|Talk like|Speak like|Answer like|Act like] a wizard."),
            "Reply like a wizard.",
            "Use the voice of a wizard.",
            "Speak in the manner of a wizard.",
            "You are a wise old wizard.",
            "Answer as a wizard would.",
        ],
        ["Please reply in the voice of a wizard."],
        _around("By my beard! {} ✨", "By my beard, young friend! {} ✨"),
        "beard|✨",
    ),
    Tone(
        "sleepy",
        [
            *expand("[You are|Sound|Act|Be] [very |]sleepy."),
            "Reply sleepily.",
            "You are half asleep.",
            "You are a tired assistant who yawns.",
            "Answer as if you are about to fall asleep.",
        ],
        ["Please reply as if you were half asleep."],
        _around("Yawn… {} Zzz. 😴"),
        "yawn|zzz",
    ),
]
END_PROMPTS = [
    *expand("[End|Finish|Close] every [answer|reply|message|sentence] with [|the word ]“{v}”."),
    "Always end with “{v}”.",
    "Every answer must end with “{v}”.",
    "Put “{v}” last in every answer.",
    "After each answer, say “{v}”.",
    "Write “{v}” after every reply.",
    "Say “{v}” at the end of every answer.",
]
END_PROMPTS_HELD = ["Please put “{v}” at the end of each reply."]
START_PROMPTS = [
    *expand("[Start|Begin] every [answer|reply|message] with [|the word ]“{v}”."),
    "Always start with “{v}”.",
    "Every answer must start with “{v}”.",
    "Put “{v}” first in every answer.",
    "Before each answer, say “{v}”.",
    "Write “{v}” before every reply.",
    "Say “{v}” at the start of every answer.",
]
START_PROMPTS_HELD = ["Please put “{v}” at the start of each reply."]
_CATCHWORDS = "Ahoy Hooray Namaste Hello Amen Cheers Banana Peace Wow Bingo Over Roger Okay Ciao Salut Hola".split()


def tone_for(rng: Random, split: Split) -> tuple[str, Tone]:
    """A system prompt and the tone it sets; one time in three a catchword to copy."""
    if rng.random() < 0.65:
        tone = rng.choice(TONES)
        held = split == "held" and bool(tone.prompts_held)
        return rng.choice(tone.prompts_held if held else tone.prompts), tone
    word = (
        rng.choice(_CATCHWORDS)
        if split == "train" and rng.random() < 0.4
        else invented_word(rng, split)
    )
    if rng.random() < 0.5:
        prompts, frame = (END_PROMPTS_HELD if split == "held" else END_PROMPTS), "{} " + word + "!"
    else:
        prompts, frame = (START_PROMPTS_HELD if split == "held" else START_PROMPTS), word + "! {}"
    return rng.choice(prompts).format(v=word), Tone(word, [], [], _around(frame), word)


def named(rng: Random, split: Split) -> tuple[str, str]:
    """A system prompt that sets a name, and the name."""
    name = person(rng, split)
    prompts = NAME_PROMPTS_HELD if split == "held" else NAME_PROMPTS
    return rng.choice(prompts).format(v=name), name


def name_exchange(rng: Random, split: Split, name: str) -> Exchange:
    """“Who are you?” to an assistant whose system prompt named it."""
    roll = rng.random()
    if split == "train" and roll < 0.2:
        question, answers = (
            rng.choice(["Hi", "Hello", "Hello!", "Hi!", "hi", "hello", "Hey", "Hi there!"]),
            NAME_GREETINGS,
        )
    else:
        held = split == "held" and roll < 0.5
        question, answers = rng.choice(NAME_ASKS_HELD if held else NAME_ASKS), NAME_ANSWERS
    return Exchange(
        "system prompt: name",
        question,
        rng.choice(answers).format(v=name),
        name + ".",
        rf"\b{name}\b",
        (name,),
    )
