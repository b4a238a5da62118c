"""Facts about the world: countries, colours, animals, science, and single facts."""

# ruff: noqa: E501 - a table reads best with one row a line, a word list as words
from __future__ import annotations

from tools.box_model.grammar import Table, rows

COUNTRIES = rows(
    "country label capital continent",
    """
France: France: Paris: Europe; Germany: Germany: Berlin: Europe; Italy: Italy: Rome: Europe;
Spain: Spain: Madrid: Europe; Portugal: Portugal: Lisbon: Europe;
England: England: London: Europe; the United Kingdom: the United Kingdom: London: Europe;
the UK: the United Kingdom: London: Europe; Scotland: Scotland: Edinburgh: Europe;
Wales: Wales: Cardiff: Europe; Ireland: Ireland: Dublin: Europe;
the Netherlands: the Netherlands: Amsterdam: Europe; Belgium: Belgium: Brussels: Europe;
Switzerland: Switzerland: Bern: Europe; Austria: Austria: Vienna: Europe;
Poland: Poland: Warsaw: Europe; Sweden: Sweden: Stockholm: Europe; Norway: Norway: Oslo: Europe;
Denmark: Denmark: Copenhagen: Europe; Finland: Finland: Helsinki: Europe;
Iceland: Iceland: Reykjavik: Europe; Greece: Greece: Athens: Europe;
Hungary: Hungary: Budapest: Europe; Romania: Romania: Bucharest: Europe;
Bulgaria: Bulgaria: Sofia: Europe; Croatia: Croatia: Zagreb: Europe;
Serbia: Serbia: Belgrade: Europe; Ukraine: Ukraine: Kyiv: Europe; Russia: Russia: Moscow: Europe;
the Czech Republic: the Czech Republic: Prague: Europe; Slovakia: Slovakia: Bratislava: Europe;
Slovenia: Slovenia: Ljubljana: Europe; Estonia: Estonia: Tallinn: Europe;
Latvia: Latvia: Riga: Europe; Lithuania: Lithuania: Vilnius: Europe; Malta: Malta: Valletta: Europe;
the United States: the United States: Washington, D.C.: North America;
the USA: the United States: Washington, D.C.: North America;
America: the United States: Washington, D.C.: North America;
Canada: Canada: Ottawa: North America; Mexico: Mexico: Mexico City: North America;
Cuba: Cuba: Havana: North America; Brazil: Brazil: Brasília: South America;
Argentina: Argentina: Buenos Aires: South America; Chile: Chile: Santiago: South America;
Peru: Peru: Lima: South America; Colombia: Colombia: Bogotá: South America;
Ecuador: Ecuador: Quito: South America; Uruguay: Uruguay: Montevideo: South America;
Venezuela: Venezuela: Caracas: South America; China: China: Beijing: Asia; Japan: Japan: Tokyo: Asia;
South Korea: South Korea: Seoul: Asia; India: India: New Delhi: Asia;
Pakistan: Pakistan: Islamabad: Asia; Bangladesh: Bangladesh: Dhaka: Asia;
Nepal: Nepal: Kathmandu: Asia; Thailand: Thailand: Bangkok: Asia; Vietnam: Vietnam: Hanoi: Asia;
Indonesia: Indonesia: Jakarta: Asia; Malaysia: Malaysia: Kuala Lumpur: Asia;
the Philippines: the Philippines: Manila: Asia; Mongolia: Mongolia: Ulaanbaatar: Asia;
Iran: Iran: Tehran: Asia; Iraq: Iraq: Baghdad: Asia; Saudi Arabia: Saudi Arabia: Riyadh: Asia;
Turkey: Turkey: Ankara: Asia; Israel: Israel: Jerusalem: Asia; Lebanon: Lebanon: Beirut: Asia;
Jordan: Jordan: Amman: Asia; Egypt: Egypt: Cairo: Africa; Morocco: Morocco: Rabat: Africa;
Algeria: Algeria: Algiers: Africa; Tunisia: Tunisia: Tunis: Africa;
Nigeria: Nigeria: Abuja: Africa; Ghana: Ghana: Accra: Africa; Kenya: Kenya: Nairobi: Africa;
Ethiopia: Ethiopia: Addis Ababa: Africa; Senegal: Senegal: Dakar: Africa;
Uganda: Uganda: Kampala: Africa; Australia: Australia: Canberra: Oceania;
New Zealand: New Zealand: Wellington: Oceania
""",
)
CITIES = [
    row for row in COUNTRIES if row["country"] == row["label"] and row["country"] not in {"England"}
]
LANGUAGES = rows(
    "country language",
    """
France: French; Germany: German; Italy: Italian; Spain: Spanish; Portugal: Portuguese;
England: English; Poland: Polish; Sweden: Swedish; Norway: Norwegian; Denmark: Danish;
Finland: Finnish; Greece: Greek; Hungary: Hungarian; Russia: Russian; Turkey: Turkish;
the United States: English; Mexico: Spanish; Brazil: Portuguese; Argentina: Spanish;
China: Chinese; Japan: Japanese; South Korea: Korean; Thailand: Thai; Vietnam: Vietnamese;
Egypt: Arabic; Australia: English; Austria: German; the Netherlands: Dutch; Ukraine: Ukrainian
""",
)
COLOURS = rows(
    "thing be colour",
    """
the sky: is: blue; grass: is: green; snow: is: white; the sun: is: yellow; coal: is: black;
blood: is: red; a banana: is: yellow; a lemon: is: yellow; a tomato: is: red; a carrot: is: orange;
a cucumber: is: green; the sea: is: blue; the ocean: is: blue; milk: is: white; chocolate: is: brown;
a strawberry: is: red; a cherry: is: red; a frog: is: green; a swan: is: white; a crow: is: black;
a raven: is: black; a flamingo: is: pink; a pig: is: pink; an elephant: is: grey;
a mouse: is: grey; a bear: is: brown; a polar bear: is: white; a fire engine: is: red;
an orange: is: orange; a pumpkin: is: orange; broccoli: is: green; salt: is: white;
sugar: is: white; coffee: is: brown; a stop sign: is: red; night: is: black; a leaf: is: green;
an eggplant: is: purple; a plum: is: purple; a violet: is: purple; the moon: is: white;
gold: is: yellow; a ruby: is: red; an emerald: is: green; a sapphire: is: blue; honey: is: yellow;
cotton: is: white; a lime: is: green; a lion: is: yellow; a fox: is: orange
""",
)
SOUNDS = rows(
    "animal sound",
    """
cow: moo; dog: woof; cat: meow; duck: quack; sheep: baa; pig: oink; lion: roar; horse: neigh;
rooster: cock-a-doodle-doo; chicken: cluck; owl: hoot; frog: ribbit; bee: buzz; mouse: squeak;
snake: hiss; wolf: howl; bird: tweet; goat: bleat; donkey: hee-haw; crow: caw; turkey: gobble;
dove: coo; tiger: roar; goose: honk; kitten: meow; puppy: yip; bear: growl; cricket: chirp;
elephant: trumpet; monkey: ooh ooh ah ah
""",
)
LEGS = rows(
    "animal legs",
    """
dog: four; cat: four; cow: four; horse: four; bird: two; chicken: two; duck: two; human: two;
spider: eight; ant: six; bee: six; butterfly: six; beetle: six; octopus: eight; fish: no; snake: no;
worm: no; elephant: four; lion: four; frog: four; crab: ten; mouse: four; penguin: two; owl: two
""",
)
BABIES = rows(
    "animal baby",
    """
dog: puppy; cat: kitten; cow: calf; sheep: lamb; horse: foal; duck: duckling; pig: piglet;
bear: cub; lion: cub; goat: kid; frog: tadpole; chicken: chick; kangaroo: joey; deer: fawn;
goose: gosling; owl: owlet; swan: cygnet; elephant: calf; fox: kit; human: baby
""",
)
FOODS = rows(
    "animal food",
    """
cows: grass; rabbits: carrots and grass; pandas: bamboo; lions: meat; cats: fish and meat;
dogs: meat and dog food; horses: grass and hay; bees: nectar; squirrels: nuts; koalas: eucalyptus leaves;
mice: seeds and cheese; birds: seeds and worms; frogs: insects; sharks: fish; monkeys: fruit;
sheep: grass; bears: fish and berries; penguins: fish; spiders: insects; elephants: leaves and grass
""",
)
HOMES = rows(
    "animal home",
    """
bees: in a hive; birds: in a nest; fish: in water; dogs: in a house or a kennel; spiders: in a web;
camels: in the desert; penguins: on the ice and in the sea; lions: on the savanna; bears: in the forest;
monkeys: in the jungle; whales: in the ocean; rabbits: in a burrow; cows: on a farm; owls: in trees;
sharks: in the sea; ants: in an anthill; frogs: near ponds; horses: in a stable; polar bears: in the Arctic;
kangaroos: in Australia
""",
)
SYMBOLS = rows(
    "element symbol",
    """
gold: Au; silver: Ag; iron: Fe; oxygen: O; hydrogen: H; carbon: C; nitrogen: N; helium: He;
copper: Cu; lead: Pb; tin: Sn; sodium: Na; calcium: Ca; zinc: Zn; neon: Ne; potassium: K
""",
)
EMOJI = rows(
    "thing emoji",
    """
a cat: 🐱; a dog: 🐶; a mouse: 🐭; a fox: 🦊; a bear: 🐻; a panda: 🐼; a lion: 🦁; a cow: 🐮; a pig: 🐷;
a frog: 🐸; a monkey: 🐵; a chicken: 🐔; a penguin: 🐧; a bird: 🐦; a fish: 🐟; a whale: 🐳; a snake: 🐍;
a turtle: 🐢; a bee: 🐝; a butterfly: 🦋; a flower: 🌸; a rose: 🌹; a tree: 🌳; the sun: ☀️; the moon: 🌙;
a star: ⭐; rain: 🌧️; snow: ❄️; fire: 🔥; an apple: 🍎; a banana: 🍌; a strawberry: 🍓; a pizza: 🍕;
a cake: 🎂; coffee: ☕; a heart: ❤️; a smile: 😊; a rocket: 🚀; a car: 🚗; a train: 🚂; a house: 🏠;
a book: 📚; music: 🎵; a party: 🎉; a rainbow: 🌈; a robot: 🤖; a box: 📦; a unicorn: 🦄
""",
)


def _table(name: str, data: list[dict[str, str]], **kwargs: object) -> Table:
    return Table(name=name, group="facts", rows=data, **kwargs)  # type: ignore[arg-type]


TABLES = [
    _table(
        "capital",
        COUNTRIES,
        asks=[
            "[What is|What's] the capital of {country}?",
            "[What is|What's|Name] the capital city of {country}?",
            "[Tell me|Please tell me|Do you know|Give me|Can you tell me] the capital of {country}?",
            "capital of {country}",
            "[Which|What] city is the capital of {country}?",
            "[I forgot|Remind me|I need to know]: what is the capital of {country}?",
            "{country} capital",
            "I'd like to know the capital of {country}.",
            "Which city is {country}'s capital?",
            "[Please name|Say] the capital of {country}.",
        ],
        held_asks=[
            "[Could you tell me what|Do you know what] the capital of {country} is?",
            "The capital of {country} is [which city|what]?",
        ],
        answers=["The capital of {label} is {capital}."],
        short="{capital}.",
        expect="{capital}",
        follow=["[And|What about|How about|and] {country}?", "And the capital of {country}?"],
        keep=frozenset(
            "|".join(row.values()) for row in COUNTRIES if row["country"] in {"France", "China"}
        ),
        weight=5,
    ),
    _table(
        "capital_of",
        CITIES,
        asks=[
            "{capital} is the capital of [which|what] country?",
            "[Which|What] country has {capital} as its capital?",
            "[Which|What] country is {capital} the capital of?",
            "What is {capital} the capital of?",
        ],
        held_asks=["Of which country is {capital} the capital?"],
        answers=["{capital} is the capital of {label}."],
        short="{label}.",
        expect="{label}",
        follow=["And {capital}?", "[What about|How about] {capital}?"],
        weight=2.5,
    ),
    _table(
        "where_city",
        CITIES,
        asks=[
            "Where is {capital}?",
            "[In which|In what] country is {capital}?",
            "[Which|What] country is {capital} in?",
            "Where [can I find|do I find] {capital}?",
            "Do you know where {capital} is?",
            "I'm looking for {capital}, where is it?",
            "{capital} is in [which|what] country?",
        ],
        held_asks=["Tell me where {capital} is."],
        answers=["{capital} is in {label}."],
        short="In {label}.",
        expect="{label}",
        weight=1.5,
    ),
    _table(
        "continent",
        COUNTRIES,
        asks=[
            "[Which|What] continent is {country} [in|on]?",
            "On [which|what] continent is {country}?",
            "Where is {country}?",
            "What part of the world is {country} in?",
        ],
        held_asks=["{country} is on which continent?", "Do you know where {country} is?"],
        answers=["{label} is in {continent}."],
        short="{continent}.",
        expect="{continent}",
        weight=2,
    ),
    _table(
        "language",
        LANGUAGES,
        asks=[
            "[What|Which] language do [people|they] speak in {country}?",
            "[What|Which] language is spoken in {country}?",
            "What do people speak in {country}?",
            "Language of {country}?",
            "What is the main language of {country}?",
            "[Which|What] language is used in {country}?",
            "The people of {country} speak what?",
        ],
        held_asks=["What is the language of {country}?"],
        answers=["People in {country} speak {language}."],
        short="{language}.",
        expect="{language}",
        follow=["And in {country}?", "[What about|How about] {country}?"],
        weight=1.2,
    ),
    _table(
        "colour",
        COLOURS,
        asks=[
            "[What|Which] [colour|color] is {thing}?",
            "[What is|What's] the [colour|color] of {thing}?",
            "[Tell me|Do you know] the [colour|color] of {thing}?",
            "[colour|color] of {thing}",
            "{thing}: which [colour|color]?",
            "[Say|Name] the [colour|color] of {thing}.",
            "The [colour|color] of {thing} is?",
            "Which [colour|color] does {thing} have?",
        ],
        held_asks=[
            "{thing} is what [colour|color]?",
            "What [colour|color] would you say {thing} is?",
        ],
        answers=["{thing} {be} {colour}."],
        short="{colour}.",
        expect="{colour}",
        follow=["[And|What about|How about|and] {thing}?"],
        weight=2.5,
    ),
    _table(
        "sound",
        SOUNDS,
        asks=[
            "What sound does a {animal} make?",
            "What does a {animal} say?",
            "[Which|What] noise does a {animal} make?",
            "How does a {animal} sound?",
            "What is the sound of a {animal}?",
            "What is the cry of a {animal}?",
            "Make the sound of a {animal}.",
            "What noise comes from a {animal}?",
            "Do you know what a {animal} says?",
        ],
        held_asks=["What do you hear from a {animal}?", "Tell me what a {animal} says."],
        answers=["A {animal} says “{sound}”!"],
        short="{sound}!",
        expect="{sound}",
        follow=["[And|What about|How about|and] a {animal}?"],
        weight=2,
    ),
    _table(
        "legs",
        LEGS,
        asks=[
            "How many legs does a {animal} have?",
            "[Number of|How many] legs of a {animal}?",
            "How many legs has a {animal}?",
            "What number of legs does a {animal} have?",
        ],
        held_asks=["Tell me how many legs a {animal} has."],
        answers=["A {animal} has {legs} legs."],
        short="{legs}.",
        expect="{legs}",
        follow=["[And|What about|How about|and] a {animal}?"],
        weight=1.2,
    ),
    _table(
        "baby",
        BABIES,
        asks=[
            "What is a baby {animal} called?",
            "What do you call a baby {animal}?",
            "[What's|What is] the name for a baby {animal}?",
            "What is the young of a {animal} called?",
            "What is a young {animal} called?",
        ],
        held_asks=["How is a baby {animal} called?"],
        answers=["A baby {animal} is called a {baby}."],
        short="a {baby}.",
        expect="{baby}",
        follow=["[And|What about|How about] a baby {animal}?"],
    ),
    _table(
        "food",
        FOODS,
        asks=[
            "What do {animal} eat?",
            "What is the food of {animal}?",
            "What do {animal} [like|love] to eat?",
            "What should I feed {animal}?",
            "Do you know what {animal} eat?",
        ],
        held_asks=["Tell me what {animal} eat."],
        answers=["{animal} eat {food}."],
        short="{food}.",
        expect="{food}",
        follow=["[And|What about|How about] {animal}?"],
    ),
    _table(
        "home",
        HOMES,
        asks=[
            "Where do {animal} live?",
            "[Where is|What is] the home of {animal}?",
            "Where can I find {animal}?",
            "Do you know where {animal} live?",
        ],
        held_asks=["Tell me where {animal} live."],
        answers=["{animal} live {home}."],
        short="{home}.",
        expect="{home}",
        follow=["[And|What about|How about] {animal}?"],
    ),
    _table(
        "symbol",
        SYMBOLS,
        asks=[
            "What is the [chemical |]symbol [of|for] {element}?",
            "[Symbol|Chemical symbol] of {element}?",
            "Which symbol does {element} have?",
            "In chemistry, what is the symbol of {element}?",
            "How is {element} written in chemistry?",
            "How do you write {element} as a symbol?",
        ],
        held_asks=["How do you write {element} in chemistry?"],
        answers=["The chemical symbol for {element} is {symbol}."],
        short="{symbol}.",
        expect=r"\b{symbol}\b",
        follow=["[And|What about|How about] {element}?"],
        weight=0.8,
    ),
    _table(
        "emoji",
        EMOJI,
        asks=[
            "[Show|Give|Send] me an emoji [of|for] {thing}.",
            "What is the emoji for {thing}?",
            "emoji of {thing}",
            "Which emoji shows {thing}?",
            "[Show|Send] me {thing} emoji",
            "Is there an emoji for {thing}?",
            "I want an emoji of {thing}.",
            "Can you show me an emoji of {thing}?",
        ],
        held_asks=["Do you have an emoji for {thing}?", "Can you draw {thing} with an emoji?"],
        answers=["Here is {thing}: {emoji}"],
        short="{emoji}",
        expect="{emoji}",
        follow=["[And|What about|How about|Now] {thing}?"],
        weight=1.5,
    ),
]
