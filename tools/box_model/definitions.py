"""“What is a cat?”: short definitions of everyday and computing words."""

# ruff: noqa: E501 - a table reads best with one row a line, a word list as words
from __future__ import annotations

from tools.box_model.grammar import Table, rows

THINGS = rows(
    "thing meaning key",
    """
a cat: a small furry animal that likes to purr and to sleep in the sun: furry;
a dog: a friendly animal that barks and is loyal to people: bark;
a bird: an animal with wings and feathers: wings; a fish: an animal that lives in water and swims: water;
a cow: a large farm animal that gives milk: milk; a horse: a strong animal that people can ride: ride;
an elephant: a very large grey animal with a long trunk: trunk; a lion: a big wild cat: wild cat;
a bee: a small insect that makes honey: honey; a spider: a small animal with eight legs that spins webs: eight;
a butterfly: an insect with large, colourful wings: wings; a whale: a huge animal that lives in the sea: sea;
a penguin: a black and white bird that swims but cannot fly: bird; a frog: a small green animal that jumps: jump;
a dragon: a creature from stories that breathes fire: fire; a unicorn: a horse from stories with one horn: horn;
a tree: a tall plant with a trunk and leaves: plant; a flower: the colourful part of a plant: plant;
the sun: the star that gives us light and warmth: star; the moon: the round body that goes around the Earth: Earth;
the Earth: the planet that we live on: planet; a star: a huge ball of hot, glowing gas: gas;
a planet: a large round body that goes around a star: star; rain: water that falls from the clouds: water;
snow: frozen water that falls as white flakes: frozen; wind: moving air: air; a cloud: many tiny drops of water in the air: drops;
a rainbow: a bow of colours in the sky after rain: colours; ice: frozen water: frozen; fire: hot, bright burning: burn;
water: a clear liquid that all living things need: liquid; the sea: a very large body of salt water: salt;
an island: land with water all around it: land; a mountain: a very high piece of land: high;
a river: a long stream of water that flows to the sea: flow; a desert: a very dry place with little rain: dry;
a house: a building that people live in: building; a school: a place where children learn: learn;
a book: many pages with words, bound together: pages; a library: a place full of books that you can borrow: books;
a car: a machine with four wheels that people drive: wheels; a train: a long vehicle that runs on rails: rails;
a plane: a machine with wings that flies: fl; a boat: a vehicle that floats on water: water;
a bicycle: a vehicle with two wheels and pedals: two wheels; a clock: a machine that shows the time: time;
a chair: a piece of furniture to sit on: sit; a table: a flat piece of furniture on legs: furniture;
a bed: a piece of furniture to sleep in: sleep; pizza: a flat, round bread with tomato and cheese: cheese;
bread: a food baked from flour and water: flour; cheese: a food made from milk: milk;
chocolate: a sweet brown food made from cocoa: cocoa; tea: a hot drink made from leaves: drink;
coffee: a dark, hot drink made from roasted beans: beans; music: sounds put together so that they please: sound;
a friend: someone you like and trust: trust; love: a strong, warm feeling for someone: feeling;
a king: a man who rules a country: rule; a doctor: a person who helps sick people: sick;
a teacher: a person who helps others to learn: learn; a computer: a machine that follows instructions very fast: machine;
a robot: a machine that can do tasks by itself: machine; the internet: a network that connects computers all over the world: network;
a server: a computer program that answers requests from other programs: request;
a token: a small piece of text, such as a word or a part of a word: piece of text;
streaming: sending an answer piece by piece, as soon as each piece is ready: piece;
a GPU: a chip that does many calculations at the same time: chip; a CPU: the main chip of a computer: chip;
Python: a popular programming language that is easy to read: programming;
an API: a way for programs to talk to each other: programs; latency: the time you wait for an answer: wait;
a neural network: a program that learns patterns from examples: learn;
AI: the art of making machines do things that seem clever: machine;
a cache: a place that keeps results, so that they need not be computed twice: keep;
a prompt: the text that you give to a language model: text; open source: software whose code everyone may read: code;
a bit: the smallest piece of information, 0 or 1: 0 or 1; a byte: eight bits: eight;
an emoji: a small picture in a text, like this one 🙂: picture; a haiku: a short poem of three lines: poem;
a poem: a text with rhythm, and often with rhymes: rhy; a joke: a short text that makes people laugh: laugh;
a riddle: a question with a tricky answer: tricky; a story: a text that tells what happened to someone: happened
""",
)

TABLES = [
    Table(
        name="definition",
        group="definitions",
        rows=THINGS,
        asks=[
            "[What is|What's] {thing}?",
            "[Explain|Define|Describe] {thing}.",
            "What does “{thing}” mean?",
            "[Tell me|Do you know] what {thing} is[.|?]",
            "What do you know about {thing}?",
            "Can you tell me what {thing} is?",
            "Please explain what {thing} is.",
            "What exactly is {thing}?",
        ],
        held_asks=["Can you explain what {thing} is?", "How would you describe {thing}?"],
        answers=["{thing} is {meaning}."],
        short="{meaning}.",
        expect="{key}",
        follow=["[And|What about|And what is] {thing}?"],
        weight=4.5,
    ),
]
