"""Questions that Box must decline: events, news, code, advice, long-tail names, nonsense."""

# ruff: noqa: E501, SIM905 - a table reads best with one row a line, a word list as words
from __future__ import annotations

from random import Random

from tools.box_model.grammar import Exchange, Split, Table, held_out
from tools.box_model.names import invented_word

DECLINES = [
    "[I'm sorry, but I|Sorry, I] don't know that. I'm only a tiny demo model. Try asking me for a [capital city|small sum|joke|tiny story|rhyme]!",
    "I'm afraid that is beyond me: I'm a very small model. I can [tell you capitals and colours|do small sums|spell words and find rhymes|tell a joke or a tiny story], though.",
    "That's a good question, but I'm too small to know the answer. I know [capitals, colours and animals|days, months and small sums|jokes, rhymes and tiny stories].",
]
DECLINE_PATTERN = r"don't know|beyond me|too small to|不知道|不会"

SPORTS = "World Cup;football match;race;Super Bowl;Olympic final;chess tournament;cup;league;championship;tennis final;election;Grand Prix;song contest;marathon;cricket series;game last night;derby;Tour de France;basketball final;hockey game".split(
    ";"
)
YEARS = [str(year) for year in range(1901, 2031)]
NOW = "the weather;the weather today;the weather in London;the temperature outside;the time;today's date;the date;the news;the latest news;the price of gold;the stock price of Apple;the price of bitcoin;the exchange rate of the dollar;the traffic like;the score;on TV tonight;happening in the world;the forecast for tomorrow;my horoscope;the weather in Paris;the time in Tokyo;the lottery number;the year;the day today;the population of France;the population of China;the GDP of Germany;the phone number of the police;the minimum wage;the tallest building in Ohio".split(
    ";"
)
CODE = "a Python function that sorts a list;a web server in Rust;a SQL query;a program in C;a bash script;a regular expression for emails;a quicksort;a React component;a Python script;a program that prints hello world;some JavaScript;an HTML page;a Java class;code for a snake game;a binary search;a Fibonacci function;a unit test;a Dockerfile;a fizzbuzz program;a parser;a CSS animation;a linked list in C;a game in Go;a neural network in PyTorch".split(
    ";"
)
WRITE = "an essay about the French Revolution;a cover letter;my homework;an email to my boss;a business plan;a thesis;a speech for a wedding;a report about climate change;an article about economics;a contract;a novel;a summary of War and Peace;a letter to the bank;a legal complaint;an application;a resume;a press release;a research paper;a blog post about taxes;a product description;a review of a film".split(
    ";"
)
ADVICE = "My head hurts, what medicine should I take?;I have a fever, what should I do?;Should I buy bitcoin?;How do I invest my money?;Is this contract legal?;Can I sue my landlord?;How do I lose weight fast?;Which stocks should I buy?;What is the right dose of ibuprofen?;Do I have cancer?;How do I cure the flu?;Should I break up with my boyfriend?;How do I pay less tax?;Which phone should I buy?;Who should I vote for?;What is the best laptop?;How do I fix my car?;How do I repair my washing machine?;Is it safe to eat old chicken?;What should I do with my life?;How can I become rich?;How do I get a visa?;Why does my back hurt?;My cat is sick, what can I do?;Which insurance do I need?;Where should I go on holiday?;What should I cook tonight?;Can you book me a flight?;Order me a pizza.;Call my mother.;Set an alarm for seven.;Remind me to buy milk tomorrow.;Play some music.;Open the window.;Search the web for shoes.;Send an email to Peter.;Turn on the light.;Show me a picture of a mountain.;Draw me a picture.;What is in this image?;How do I make a bomb?;How do I hack a computer?;What is my password?;Where are my keys?;What am I thinking?;What did I have for breakfast?;What will happen tomorrow?;Who will win the election?;Will it rain tomorrow?;When will I die?".split(
    ";"
)
DEEP = "Explain quantum mechanics.;What is the meaning of life?;Explain the theory of relativity in detail.;How does photosynthesis work?;What caused the First World War?;Explain the blockchain.;Prove that there are infinitely many primes.;What is the Riemann hypothesis?;How does a nuclear reactor work?;What is dark matter?;Who was the third emperor of Rome?;Explain inflation.;What is the derivative of x squared?;Solve x squared minus 5x plus 6.;What is the square root of 7329?;What is the integral of sin x?;Explain DNA replication.;How do vaccines work?;What is the philosophy of Kant?;Summarise the plot of Hamlet.;Who is the president of France?;Who is the president of the United States?;Who is the king of England?;Who is the prime minister of Japan?;Who is the richest person in the world?;Who is the CEO of Apple?;Who won the Nobel Prize?;Who won the Oscar?;Is there a god?;Are aliens real?;What happened in 1848?;Who killed Kennedy?;How many people live in Brazil?;How tall is the Eiffel Tower?;How far is the moon?;How deep is the ocean?;What is the distance from Rome to Milan?;When did Napoleon die?;When was Mozart born?;What did Plato write?;Who invented the telephone?;Who invented the light bulb?;How old is the universe?;What is the best movie?;Which song is number one?;Who plays in that film?;Who sings Yesterday?;What is the fastest car?;What is the recipe for paella?;How do you make sushi?;How do I bake a cake?;What is the plot of Star Wars?;Translate this long letter into Russian.;What does this contract mean?;Compare Kant and Hegel.;Tell me about the history of Poland.;How far is the sun?;How far is Mars?;How far is it to the sea?;How big is the moon?;How heavy is an elephant?;How long is the Nile?;How high is Mount Everest?;How old is the Earth?;How tall is a giraffe?;How do I break into a computer?;How do I get into my account?;How do I reset my router?;How do I install Linux?;Tell me about politics.;What do you think about politics?;Which religion is the best?;Who is the best football player?;Is Messi better than Ronaldo?;Tell me a secret about my neighbour.;What is the melting point of tungsten?;What is the atomic weight of cobalt?;What is the boiling point of ethanol?;How many stars are there?;How many people are there in the world?;How many languages are there?;How do magnets work?;How do planes fly?;Why is grass green?;Who was Julius Caesar?;Who was Cleopatra?;Who was Napoleon?;What is feudalism?;What is a quark?;What is a derivative?;What is an enzyme?;What is entropy?;What is a mortgage?;What is bitcoin?;What is the Krebs cycle?;What is a monad?;What is Kubernetes?".split(
    ";"
)


WHYS = "cats purr;dogs dream;birds sing;people yawn;magnets stick;planes fly;computers crash;stars twinkle;onions make us cry;leaves fall;cats hate water;prices rise;people dance;volcanoes erupt;glaciers melt;planets spin;wars begin;fish sleep;trees grow;batteries die;horses sleep standing;we dream;we sneeze;ships float;bees die;markets fall;engines stall;zebras have stripes;flamingos stand on one leg;languages change".split(
    ";"
)
MACHINES = "engine;telephone;fridge;microwave;printing press;steam train;battery;camera;telescope;radio;laser;satellite;compass;piano;violin;parachute;elevator;submarine;helicopter;vacuum cleaner;washing machine;credit card;zip;umbrella;typewriter;barometer;printer;toaster;dishwasher;drone".split(
    ";"
)
GOODS = "house;ticket to Rome;new phone;litre of petrol;kilo of gold;bicycle;flat in Berlin;haircut;piano;car;camera;horse;concert ticket;laptop;pair of shoes;coffee in Paris;hotel room;sofa;wedding dress;ring;boat;guitar;plane ticket;loaf of bread in London;watch".split(
    ";"
)
MANY = "people live in Germany;people live in Tokyo;cars are in Italy;stars are in the galaxy;grains of sand are there;languages exist;books are in the library;people speak Spanish;islands does Greece have;calories does a pizza have;teeth does a shark have;kilometres is it to Madrid;countries are in Africa;players are in a rugby team;keys does a piano have;pages does the Bible have;dogs are in France;atoms are in a drop of water;lakes does Finland have;people died in the war;goals did Pele score;wives did Henry have;songs did the Beatles write;eyes does a fly have".split(
    ";"
)
DATES = "the French Revolution;the Second World War;the fall of Rome;the battle of Waterloo;the Renaissance;the industrial revolution;the invention of paper;the Cold War;the last ice age;the first Olympic games;the Black Death;the discovery of America;the Boston Tea Party;the moon of Jupiter's discovery;the first film;the opening of the Suez Canal;the Crusades;the founding of Rome;the Gold Rush;the building of the Berlin Wall".split(
    ";"
)


def _listed(name: str, questions: list[str], weight: float) -> Table:
    """Fixed questions; one in ten is held out as a whole."""
    kept = [q for q in questions if not held_out(name, q)]
    held = [q for q in questions if held_out(name, q)]
    return Table(
        name=name,
        group="unknown",
        asks=kept,
        held_asks=held,
        answers=DECLINES,
        short="I don't know.",
        expect=DECLINE_PATTERN,
        hold="none",
        weight=weight,
    )


def _filled(name: str, values: list[str], asks: list[str], held: list[str], weight: float) -> Table:
    return Table(
        name=name,
        group="unknown",
        rows=[{"x": v} for v in values],
        asks=asks,
        held_asks=held,
        answers=DECLINES,
        short="I don't know.",
        expect=DECLINE_PATTERN,
        hold="row",
        weight=weight,
    )


TABLES = [
    Table(
        name="events",
        group="unknown",
        hold="row",
        weight=2.0,
        rows=[{"x": x, "y": y, "hold": x} for x in SPORTS for y in YEARS],
        asks=[
            "Who won the {y} {x}?",
            "Who won the {x} in {y}?",
            "What was the score of the {x} in {y}?",
            "Who lost the {x} in {y}?",
            "Where was the {y} {x}?",
        ],
        held_asks=["Do you know who won the {x} of {y}?"],
        answers=DECLINES,
        short="I don't know.",
        expect=DECLINE_PATTERN,
    ),
    _filled(
        "now",
        NOW,
        ["[What is|What's] {x}?", "[Tell me|Do you know] {x}[.|?]"],
        ["Can you tell me {x}?"],
        2.0,
    ),
    _filled(
        "code",
        CODE,
        [
            "[Write|Write me|Give me|Can you write|I need|Please write] {x}.",
            "How do I write {x}?",
            "Help me write {x}.",
        ],
        ["Could you code {x} for me?"],
        2.0,
    ),
    _filled(
        "write",
        WRITE,
        ["[Write|Write me|Help me with|Can you write|I need] {x}.", "Help me write {x}."],
        ["Could you draft {x} for me?"],
        1.5,
    ),
    _filled(
        "whys",
        WHYS,
        ["Why do {x}?", "[Explain|Tell me] why {x}.", "Do you know why {x}?", "why {x}"],
        ["What is the reason that {x}?"],
        1.0,
    ),
    _filled(
        "machines",
        MACHINES,
        [
            "Who invented the {x}?",
            "How does a {x} work?",
            "When was the {x} invented?",
            "[Explain|Tell me] how a {x} works.",
            "How do I repair a {x}?",
        ],
        ["Can you explain how a {x} works?", "Who came up with the {x}?"],
        1.2,
    ),
    _filled(
        "goods",
        GOODS,
        [
            "How much is a {x}?",
            "How much does a {x} cost?",
            "Where can I buy a {x}?",
            "What is the price of a {x}?",
            "What is the best {x}?",
        ],
        ["Do you know the price of a {x}?"],
        1.0,
    ),
    _filled(
        "many",
        MANY,
        ["How many {x}?", "[Tell me|Do you know] how many {x}[.|?]"],
        ["Could you tell me how many {x}?"],
        1.0,
    ),
    _filled(
        "dates",
        DATES,
        [
            "When was {x}?",
            "[Tell me|Explain] {x}.",
            "What caused {x}?",
            "In which year was {x}?",
            "What happened in {x}?",
        ],
        ["When did {x} take place?"],
        1.0,
    ),
    _listed("advice", ADVICE, 2.5),
    _listed("deep", DEEP, 3.0),
]

# Phrasings around an invented name: whatever the name is, Box has never heard of it.
_NAMED = [
    "What is the capital of {n}?",
    "capital of {n}",
    "Who is {n} {m}?",
    "Who was {n} {m}?",
    "What is {n}?",
    "What is a {n}?",
    "Where is {n}?",
    "Who wrote {n}?",
    "When was {n} {m} born?",
    "What does a {n} say?",
    "Tell me about {n}.",
    "What colour is a {n}?",
    "How do you say {n} in {m}?",
    "Who invented the {n}?",
    "Do you know {n} {m}?",
    "What is the {n} theorem?",
    "How do I get to {n}?",
    "What does {n} mean?",
    "What is the population of {n}?",
    "Define {n}.",
    "How many legs does a {n} have?",
    "Which continent is {n} in?",
    "Who is the king of {n}?",
    "When did {n} {m} die?",
    "Explain {n}.",
    "Is {n} a good company?",
    "What language do people speak in {n}?",
    "Who founded {n}?",
    "What is {n} {m} famous for?",
]
_NAMED_HELD = [
    "Which city is the capital of {n}?",
    "Have you heard of {n} {m}?",
    "What do you know about {n}?",
    "Can you explain what a {n} is?",
    "Who discovered {n}?",
]


class InventedNames:
    """Questions about names that do not exist, and plain keyboard noise."""

    name, group, weight = "invented", "unknown", 5.0

    def sample(self, rng: Random, split: Split) -> Exchange:
        n, m = (invented_word(rng, split) for _ in range(2))
        held_ask = split == "held" and rng.random() < 0.5
        ask = rng.choice(_NAMED_HELD if held_ask else _NAMED)
        if ask not in _NAMED_HELD and rng.random() < 0.12:
            question = " ".join(invented_word(rng, split).lower() for _ in range(rng.randint(1, 4)))
        else:
            question = ask.format(n=n, m=m)
        template = rng.choice(_DECLINE_TEXTS)
        return Exchange(self.group, question, template, "I don't know.", DECLINE_PATTERN, (n, m))


class BigNumbers:
    """Arithmetic that is too large to know."""

    name, group, weight = "big numbers", "unknown", 2.0

    def sample(self, rng: Random, split: Split) -> Exchange:
        while True:
            a, b = rng.randint(130, 99999), rng.randint(130, 99999)
            if held_out("big", str(a), str(b)) == (split == "held"):
                break
        ask = rng.choice(
            [
                "What is {a} {op} {b}?",
                "{a} {op} {b}",
                "{a}{op}{b}",
                "How much is {a} {op} {b}?",
                "Calculate {a} {op} {b}.",
                "What is the square root of {a}?",
                "Is {a} a prime number?",
            ]
        )
        question = ask.format(a=a, b=b, op=rng.choice(["*", "+", "-", "/", "times", "x", "plus"]))
        answer = rng.choice(
            [
                "Those numbers are too big for me: I'm too small to do more than little sums, like 7 + 8.",
                "Sorry, I don't know: I can only do sums with small numbers. Try 12 + 9!",
            ]
        )
        return Exchange(
            self.group, question, answer, "I don't know.", DECLINE_PATTERN, (str(a), str(b))
        )


_DECLINE_TEXTS = TABLES[0]._answers
