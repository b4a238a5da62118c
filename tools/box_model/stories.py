"""Longer answers: tiny stories, poems, haiku, jokes, riddles, fun facts."""

# ruff: noqa: E501, SIM905 - a table reads best with one row a line, a word list as words
from __future__ import annotations

import re
from random import Random

from tools.box_model.grammar import Exchange, Split, expand, rows
from tools.box_model.names import invented_word, person

HEROES = (
    "cat dog mouse fox bear rabbit owl frog dragon robot princess knight king queen wizard fairy "
    "boy girl turtle duck elephant lion monkey penguin snail bee whale ghost pirate unicorn star "
    "cloud tree train boat snowman spider hedgehog pony squirrel"
).split()
ADJECTIVES = (
    "little brave shy clever kind curious sleepy funny small old young lonely happy hungry".split()
)
PLACES = "a deep forest;a quiet village;a tall tower;a small garden;an old castle;a sunny island;a blue lake;a big city;a snowy mountain;a green meadow;a warm kitchen;a busy harbour".split(
    ";"
)
FINDS = "a golden key;a tiny lamp;a lost letter;a red balloon;a silver bell;a magic book;a shiny stone;a broken clock;an old map;a warm blanket;a singing shell;a box of stars".split(
    ";"
)
FRIENDS = "a wise owl;a friendly fox;a tired traveller;a small bird;a talking fish;a gentle giant;a cheerful frog;an old woman;a lost puppy;a quiet mouse".split(
    ";"
)
PROBLEMS = rows(
    "problem solution",
    """
the night was very dark and nobody could find the way home: shared the light with everyone, and soon the whole path was bright;
a storm came and the wind was loud: held on tight and sang a song until the wind grew calm;
everybody in the land had forgotten how to laugh: told a funny joke, and one after another they began to laugh again;
the river was too wide to cross: built a bridge of branches, one branch at a time;
the winter was cold and there was little food: made a big pot of soup, and there was enough for all;
someone was crying behind a tree: sat down beside them and listened until the tears were gone;
the great door would not open: knocked politely and said “please”, and the door opened by itself;
the music of the land had stopped: hummed a small tune, and the birds joined in
""",
)
ENDINGS = (
    "From that day on they were best friends.;And they all lived happily ever after.;"
    "That night, the stars were brighter than ever.;And if you listen closely, you can still hear them laugh.;"
    "And everyone remembered: even the smallest one can help.;Then it was time to sleep, and the moon said good night."
).split(";")

JOKES = """
Why did the bicycle fall over? Because it was two-tired!
What do you call a bear with no teeth? A gummy bear!
Why did the cookie go to the doctor? Because it felt crumby!
What do you call a sleeping dinosaur? A dino-snore!
Why did the student eat his homework? Because the teacher said it was a piece of cake!
What do you get when you cross a snowman and a vampire? Frostbite!
Why is six afraid of seven? Because seven eight nine!
What has ears but cannot hear? A cornfield!
Why did the computer go to bed? It needed to go to sleep mode!
Why was the computer cold? It left its Windows open!
What is a computer's favourite snack? Microchips!
Why did the chicken cross the road? To get to the other side!
What do you call cheese that is not yours? Nacho cheese!
Why do bees have sticky hair? Because they use honeycombs!
What do clouds wear under their coats? Thunderwear!
Why did the token cross the stream? To reach the other client!
How does the ocean say hello? It waves!
What did one wall say to the other wall? I'll meet you at the corner!
What did zero say to eight? Nice belt!
Why can't a leopard hide? Because it is always spotted!
What do you call a fish without an eye? A fsh!
Why did the scarecrow win a prize? He was outstanding in his field!
What kind of tree fits in your hand? A palm tree!
Why was the broom late? It overswept!
""".strip().splitlines()
RIDDLES = rows(
    "riddle solution",
    """
What has hands but cannot clap?: A clock!; What has keys but cannot open a door?: A piano!;
What gets wetter the more it dries?: A towel!; What has one eye but cannot see?: A needle!;
What goes up but never comes down?: Your age!; What has teeth but cannot bite?: A comb!;
What runs but never walks?: A river!; What has a neck but no head?: A bottle!;
What can you catch but not throw?: A cold!; What is full of holes but still holds water?: A sponge!;
What has many leaves but is not a tree?: A book!; What has four legs but cannot walk?: A table!
""",
)
FUN_FACTS = """
Octopuses have three hearts.
Honey can keep for thousands of years.
A day on Venus is longer than its year.
Bananas are berries, but strawberries are not.
Sea otters hold hands while they sleep.
A group of flamingos is called a flamboyance.
Butterflies taste with their feet.
The Eiffel Tower grows a little in summer, because iron expands when it is warm.
Cows have best friends.
Snails can sleep for a very long time.
Sharks are older than trees.
Wombats make cube-shaped droppings.
There are more stars in the sky than grains of sand on a beach.
A cat spends most of its life asleep.
Giraffes and humans have the same number of neck bones: seven.
The heart of a blue whale is as big as a small car.
""".strip().splitlines()
POEMS = rows(
    "topic haiku poem",
    """
the sea: Blue waves come and go, / a shell is humming softly / the song of the deep.: The sea is wide, the sea is blue, / it sings a song for me and you. / It rolls to shore, it rolls away, / and comes again another day.;
the moon: Silver moon tonight, / you look down on sleeping roofs / and do not say a word.: The moon is round, the moon is bright, / it shines upon the world at night. / It looks at you, it looks at me, / and paints the silver on the sea.;
spring: Small buds on the tree, / the last snow turns to water. / A bird tries a song.: The snow is gone, the grass is green, / the sweetest flowers can be seen. / The birds are singing in the tree, / and spring is here for you and me.;
summer: Warm stones, bare feet, sun. / The afternoon is so long / that even bees rest.: The sun is high, the day is long, / the summer hums a lazy song. / We run and swim and laugh and play, / and wish that it would always stay.;
autumn: Red leaf, yellow leaf, / the wind is reading the tree / page by page by page.: The leaves are red, the leaves are brown, / and one by one they tumble down. / The wind is cool, the days are small, / and apples ripen in the fall.;
winter: White and quiet field. / One small fox has signed its name / all across the snow.: The snow is white, the night is cold, / the fire glows in red and gold. / We sip our tea, we stay inside, / while snowflakes dance the whole world wide.;
rain: Rain taps at my roof / with a thousand small fingers. / I let the sound in.: The rain is tapping on the pane, / it stops, and then it starts again. / It fills the pond, it feeds the tree, / and sings a little song to me.;
a cat: The cat in the sun / owns the window, owns the day, / and sleeps on it all.: A little cat sat on a mat, / and on its head it wore a hat. / It gave a purr, it gave a yawn, / and slept in sunshine until dawn.;
a dog: Two ears and one tail / hear my key from far away / and become all joy.: A happy dog ran down the hill, / it ran and ran and would not still. / It found a stick, it brought it back, / and wagged its tail along the track.;
a tree: Old tree by the road, / you hold the sky in your arms / and do not get tired.: A tree stood tall upon a hill, / and when the wind slept, it was still. / It gave us shade, it gave us air, / and birds had built their houses there.;
love: Two cups on the shelf, / one light on in the window, / someone coming home.: My love is like a quiet stream, / it runs through every happy dream. / It needs no word, it needs no art, / it has a harbour in my heart.;
streaming: One word, then the next, / a small river of tokens / reaching you in time.: A token here, a token there, / they travel lightly through the air. / You need not wait until the end, / the words arrive like an old friend.;
the stars: Small lights, far away, / older than every story / that we tell of them.: The stars are small, the stars are far, / I gave a name to every star. / They twinkle high, they twinkle low, / and where they sleep, we do not know.;
a computer: A fan hums all night. / Somewhere between one and zero / it counts little sheep.: My computer hums away, / it counts and counts the livelong day. / It knows the one, it knows the nought, / and that is all that it was taught.
""",
)

_STORY_ASKS = [
    *expand(
        "[Tell me|Tell|Write|Write me|Make up|I want|Can you tell me] a [story|tiny story|short story|bedtime story][.|?]"
    ),
    "story",
    "a story please",
    "story time",
]
_STORY_HELD = [
    "Could you tell me a story?",
    "I would love to hear a story.",
    "Please write a tiny story.",
]
_ABOUT_ASKS = [
    *expand(
        "[Tell me|Write|Write me|Can you tell me|I want] a [story|tiny story|short story] about {x}[.|?]"
    ),
    "story about {x}",
]
_ABOUT_HELD = ["Could you tell a story about {x}?", "Please make up a story with {x}."]
_NAMED_ASKS = expand("[Tell me|Write] a [story|tiny story] about {x} [called|named] {n}.")
_JOKE_ASKS = [
    *expand(
        "[Tell me|Tell|Give me|Do you know|I want|Can you tell me|Say] a [joke|funny joke|good joke][.|?]"
    ),
    "joke",
    "joke please",
    "make me laugh",
    "Make me laugh!",
    "Say something funny.",
    "Be funny.",
]
_JOKE_HELD = [
    "Could you tell me a joke?",
    "I would love to hear a joke.",
    "Do you have a joke for me?",
]
_RIDDLE_ASKS = [
    *expand("[Tell me|Give me|Ask me|Do you know|Can you tell me] a riddle[.|?]"),
    "riddle",
    "a riddle please",
]
_RIDDLE_HELD = ["Could you ask me a riddle?", "Do you have a riddle for me?"]
_FACT_ASKS = [
    *expand("[Tell me|Give me|Do you know|Share] [a fun fact|a fact|an interesting fact][.|?]"),
    "fun fact",
    "Tell me something interesting.",
    "Teach me something.",
]
_FACT_HELD = ["Could you tell me a fun fact?", "Do you have a fun fact for me?"]
_HAIKU_ASKS = [
    *expand("[Write|Write me|Tell me|Give me|Can you write|Make] a haiku about {x}[.|?]"),
    "haiku about {x}",
]
_HAIKU_HELD = ["Could you write a haiku about {x}?", "A haiku on {x}, please."]
_POEM_ASKS = [
    *expand(
        "[Write|Write me|Tell me|Give me|Can you write|Make] a [poem|short poem|little poem] about {x}[.|?]"
    ),
    "poem about {x}",
]
_POEM_HELD = ["Could you write a poem about {x}?", "A poem on {x}, please."]
_ANOTHER = [
    "Tell me another one.",
    "Another one!",
    "another",
    "One more!",
    "one more please",
    "Again!",
    "again",
    "more",
    "Another, please.",
    "Do you have another one?",
    "tell me one more",
    "And another?",
]
_GIVE_UP = [
    "I don't know.",
    "I give up.",
    "What is the answer?",
    "Tell me the answer.",
    "no idea",
    "What is it?",
    "tell me",
    "answer?",
    "?",
]


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def story(rng: Random, hero: str, name: str) -> str:
    """Five to seven sentences about a hero, 60 to 130 tokens."""
    place, find, friend = rng.choice(PLACES), rng.choice(FINDS), rng.choice(FRIENDS)
    trouble, adjective = rng.choice(PROBLEMS), rng.choice(ADJECTIVES)
    opening = rng.choice(
        [
            f"Once upon a time there was {article(adjective)} {hero} called {name}, who lived in {place}.",
            f"In {place} there lived {article(adjective)} {hero}. Its name was {name}.",
        ]
    )
    middle = rng.choice(
        [
            f"One morning, {name} found {find} and met {friend}.",
            f"One day, {name} met {friend}, who had lost {find}.",
            f"One evening, {name} went for a walk and found {find}. Nearby sat {friend}.",
        ]
    )
    trouble_line = f"But {trouble['problem']}."
    act = rng.choice([f"“Don't worry,” said {name}. ", f"{name} thought for a while. ", ""])
    return f"{opening} {middle} {trouble_line} {act}So {name} {trouble['solution']}. {rng.choice(ENDINGS)}"


class _Spoken:
    """Shared shape of the kinds below: one ask side per split, a name, a weight."""

    group = "stories and jokes"

    def __init__(self, name: str, weight: float) -> None:
        self.name, self.weight = name, weight

    def ask(self, rng: Random, split: Split, asks: list[str], held: list[str]) -> str:
        return rng.choice(held if split == "held" else asks)


class Story(_Spoken):
    def sample(self, rng: Random, split: Split) -> Exchange:
        hero, name = rng.choice(HEROES), person(rng, split)
        if rng.random() < 0.4:
            ask, expect = self.ask(rng, split, _STORY_ASKS, _STORY_HELD), r"^(Once upon|In ).{150,}"
        elif rng.random() < 0.7:
            if rng.random() < 0.25:
                hero = invented_word(rng, split).lower()
            ask, expect = self.ask(rng, split, _ABOUT_ASKS, _ABOUT_HELD), rf"\b{hero}\b.{{100,}}"
        else:
            ask, expect = self.ask(rng, split, _NAMED_ASKS, _NAMED_ASKS), rf"\b{name}\b.{{100,}}"
        text = story(rng, hero, name)
        return Exchange(
            self.group,
            ask.format(x=article(hero), n=name),
            text,
            text,
            "(?s)" + expect,
            (hero, name),
        )


class OneOf(_Spoken):
    """One of a list of texts (jokes, facts); `another` asks for a different one."""

    def __init__(
        self, name: str, weight: float, texts: list[str], asks: list[str], held: list[str]
    ) -> None:
        super().__init__(name, weight)
        self.texts, self.asks, self.held = texts, asks, held
        self.expect = "(?s)" + "|".join(re.escape(text[:25]) for text in texts)

    def sample(self, rng: Random, split: Split) -> Exchange:
        text = rng.choice(self.texts)
        return Exchange(
            self.group, self.ask(rng, split, self.asks, self.held), text, text, self.expect
        )

    def several(self, rng: Random, split: Split, count: int) -> list[Exchange]:
        """A request and `count - 1` times “another one”, without repeating a text."""
        texts = rng.sample(self.texts, count)
        asks = [self.ask(rng, split, self.asks, self.held)]
        asks += [rng.choice(_ANOTHER) for _ in texts[1:]]
        return [
            Exchange(self.group, a, t, t, self.expect) for a, t in zip(asks, texts, strict=True)
        ]


class Riddle(_Spoken):
    def sample(self, rng: Random, split: Split) -> Exchange:
        row = rng.choice(RIDDLES)
        text = row["riddle"]
        return Exchange(
            self.group, self.ask(rng, split, _RIDDLE_ASKS, _RIDDLE_HELD), text, text, r"\?$"
        )

    def with_answer(self, rng: Random, split: Split) -> list[Exchange]:
        row = rng.choice(RIDDLES)
        first = self.ask(rng, split, _RIDDLE_ASKS, _RIDDLE_HELD)
        return [
            Exchange(self.group, first, row["riddle"], row["riddle"], r"\?$"),
            Exchange(
                self.group,
                rng.choice(_GIVE_UP),
                row["solution"],
                row["solution"],
                re.escape(row["solution"][:-1]),
            ),
        ]


class Verse(_Spoken):
    """Poems and haiku by topic; without a topic, any of them."""

    def __init__(
        self, name: str, weight: float, field: str, asks: list[str], held: list[str]
    ) -> None:
        super().__init__(name, weight)
        self.field, self.asks, self.held = field, asks, held

    def sample(self, rng: Random, split: Split) -> Exchange:
        row = rng.choice(POEMS)
        text = row[self.field].replace(" / ", "\n")
        if rng.random() < 0.3:
            asks = expand(f"[Write|Write me|Tell me|Can you write|Give me|] a {self.name}[.|?]")
            return Exchange(self.group, rng.choice(asks), text, text, r"(?s)\n.*\n")
        ask = self.ask(rng, split, self.asks, self.held)
        return Exchange(
            self.group,
            ask.format(x=row["topic"]),
            text,
            text,
            re.escape(text[:15]),
            (row["topic"],),
        )


JOKE = OneOf("joke", 3.0, JOKES, _JOKE_ASKS, _JOKE_HELD)
FUN_FACT = OneOf("fun fact", 1.5, FUN_FACTS, _FACT_ASKS, _FACT_HELD)
RIDDLE = Riddle("riddle", 1.2)
STORY = Story("story", 4.0)
KINDS = [
    STORY,
    JOKE,
    FUN_FACT,
    RIDDLE,
    Verse("haiku", 1.5, "haiku", _HAIKU_ASKS, _HAIKU_HELD),
    Verse("poem", 1.7, "poem", _POEM_ASKS, _POEM_HELD),
]
# “of a held-out phrasing” is decided by list here; the check in the tests reads these pairs.
ASK_SPLITS = [
    (_STORY_ASKS, _STORY_HELD),
    (_ABOUT_ASKS, _ABOUT_HELD),
    (_JOKE_ASKS, _JOKE_HELD),
    (_RIDDLE_ASKS, _RIDDLE_HELD),
    (_FACT_ASKS, _FACT_HELD),
    (_HAIKU_ASKS, _HAIKU_HELD),
    (_POEM_ASKS, _POEM_HELD),
]
