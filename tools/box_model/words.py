"""Words: spelling, opposites, rhymes, plurals, translations, letters, the alphabet."""

# ruff: noqa: E501, SIM905 - a table reads best with one row a line, a word list as words
from __future__ import annotations

import itertools
from string import ascii_lowercase

from tools.box_model.grammar import Table, rows

SPELL = (
    "cat dog sun moon star tree bird fish house apple banana orange lemon water bread milk cheese "
    "happy sad big small red blue green yellow white black pink hello world friend love school "
    "book table chair door window garden flower river mountain ocean cloud rain snow wind fire "
    "horse sheep tiger lion monkey elephant rabbit mouse frog snake spider box robot train plane "
    "rocket music dance song smile heart hand head nose mouth ear eye one two three four five six "
    "seven eight nine ten cake pizza sugar honey coffee tea king queen castle dragon wizard knight "
    "summer winter spring autumn morning night day week month year paper pencil ship boat car "
    "bicycle computer stream server token model chat word letter number colour question answer "
    "beautiful because people mother father sister brother baby doctor teacher animal picture "
    "island planet earth space light dark warm cold good bad yes no please thanks sorry welcome"
).split()
OPPOSITES = rows(
    "word opposite",
    """
hot: cold; cold: hot; big: small; small: big; up: down; down: up; happy: sad; sad: happy;
fast: slow; slow: fast; day: night; night: day; black: white; white: black; good: bad; bad: good;
left: right; old: young; young: old; new: old; tall: short; short: long; long: short; full: empty;
empty: full; open: closed; rich: poor; poor: rich; light: dark; dark: light; hard: soft; soft: hard;
wet: dry; dry: wet; high: low; low: high; early: late; late: early; near: far; far: near;
strong: weak; weak: strong; loud: quiet; quiet: loud; clean: dirty; dirty: clean; yes: no; no: yes;
in: out; on: off; off: on; begin: end; start: stop; stop: start; love: hate; push: pull; pull: push;
win: lose; buy: sell; give: take; first: last; last: first; north: south; south: north; east: west;
west: east; true: false; false: true; sweet: sour; thick: thin; thin: thick; wide: narrow;
easy: difficult; difficult: easy; heavy: light; always: never; never: always; alive: dead;
summer: winter; friend: enemy; question: answer; inside: outside; above: below; before: after;
sunny: rainy; cheap: expensive; safe: dangerous; deep: shallow; smooth: rough; asleep: awake
""",
)
RHYMES = rows(
    "word rhyme",
    """
cat: hat; hat: cat; dog: fog; sun: fun; fun: sun; star: car; car: star; tree: bee; bee: tree;
moon: spoon; spoon: moon; house: mouse; mouse: house; light: night; night: light; day: play;
play: day; book: look; cake: lake; lake: cake; rain: train; train: rain; king: ring; ring: king;
snow: go; ball: tall; boat: goat; goat: boat; bear: chair; chair: bear; fox: box; box: fox;
bed: red; red: bed; blue: shoe; green: queen; queen: green; nose: rose; rose: nose; sky: fly;
fly: sky; fish: wish; wish: fish; hill: mill; time: lime; head: bread; pie: sky; hand: sand;
sand: hand; tea: sea; sea: tea; door: floor; floor: door; cook: book; wall: ball; jump: bump;
love: dove; dove: love; dream: stream; stream: dream; heart: art; fire: wire; stone: phone;
phone: stone; song: long; long: song; white: kite; kite: white; pen: hen; hen: pen; pig: wig
""",
)
PLURALS = rows(
    "word plural",
    """
mouse: mice; child: children; foot: feet; tooth: teeth; man: men; woman: women; goose: geese;
sheep: sheep; fish: fish; leaf: leaves; wolf: wolves; knife: knives; baby: babies; city: cities;
box: boxes; bus: buses; person: people; cat: cats; dog: dogs; house: houses; tree: trees;
book: books; apple: apples; cherry: cherries; story: stories; fox: foxes; car: cars; bird: birds;
ox: oxen; deer: deer; loaf: loaves; half: halves; potato: potatoes; tomato: tomatoes; star: stars
""",
)
PAST = rows(
    "word past",
    """
go: went; eat: ate; see: saw; run: ran; come: came; take: took; give: gave; make: made; say: said;
write: wrote; speak: spoke; drink: drank; swim: swam; sing: sang; fly: flew; know: knew; find: found;
think: thought; buy: bought; sleep: slept; read: read; have: had; do: did; be: was; begin: began;
break: broke; bring: brought; build: built; catch: caught; drive: drove; feel: felt; play: played;
walk: walked; talk: talked; jump: jumped; look: looked; love: loved
""",
)
_GLOSSARY = rows(
    "word es fr de it zh",
    """
hello: hola: bonjour: hallo: ciao: 你好; goodbye: adiós: au revoir: auf Wiedersehen: arrivederci: 再见;
thank you: gracias: merci: danke: grazie: 谢谢; please: por favor: s'il vous plaît: bitte: per favore: 请;
yes: sí: oui: ja: sì: 是; no: no: non: nein: no: 不; cat: gato: chat: Katze: gatto: 猫;
dog: perro: chien: Hund: cane: 狗; water: agua: eau: Wasser: acqua: 水; bread: pan: pain: Brot: pane: 面包;
milk: leche: lait: Milch: latte: 牛奶; house: casa: maison: Haus: casa: 房子;
friend: amigo: ami: Freund: amico: 朋友; love: amor: amour: Liebe: amore: 爱;
sun: sol: soleil: Sonne: sole: 太阳; moon: luna: lune: Mond: luna: 月亮; book: libro: livre: Buch: libro: 书;
red: rojo: rouge: rot: rosso: 红色; blue: azul: bleu: blau: blu: 蓝色; green: verde: vert: grün: verde: 绿色;
one: uno: un: eins: uno: 一; two: dos: deux: zwei: due: 二; three: tres: trois: drei: tre: 三;
good morning: buenos días: bonjour: guten Morgen: buongiorno: 早上好;
good night: buenas noches: bonne nuit: gute Nacht: buonanotte: 晚安; fish: pez: poisson: Fisch: pesce: 鱼;
bird: pájaro: oiseau: Vogel: uccello: 鸟; tree: árbol: arbre: Baum: albero: 树;
flower: flor: fleur: Blume: fiore: 花; apple: manzana: pomme: Apfel: mela: 苹果;
king: rey: roi: König: re: 国王; night: noche: nuit: Nacht: notte: 夜晚; day: día: jour: Tag: giorno: 天;
world: mundo: monde: Welt: mondo: 世界; school: escuela: école: Schule: scuola: 学校;
tea: té: thé: Tee: tè: 茶; coffee: café: café: Kaffee: caffè: 咖啡; big: grande: grand: groß: grande: 大;
small: pequeño: petit: klein: piccolo: 小; beautiful: hermoso: beau: schön: bello: 美丽
""",
)
_LANGUAGES = {"es": "Spanish", "fr": "French", "de": "German", "it": "Italian", "zh": "Chinese"}
TRANSLATIONS = [
    {"word": row["word"], "language": name, "foreign": row[code]}
    for row in _GLOSSARY
    for code, name in _LANGUAGES.items()
]
LETTERS = [{"letter": a.upper(), "next": b.upper()} for a, b in itertools.pairwise(ascii_lowercase)]
STARTERS = rows(
    "letter word",
    """
A: apple; B: ball; C: cat; D: dog; E: elephant; F: fish; G: goat; H: house; I: ice; J: jam; K: king;
L: lion; M: moon; N: nose; O: orange; P: pig; Q: queen; R: rain; S: sun; T: tree; U: umbrella;
V: violin; W: water; X: xylophone; Y: yellow; Z: zebra
""",
)


def _spelled(word: str) -> dict[str, str]:
    return {
        "word": word,
        "letters": "-".join(word.upper()),
        "n": str(len(word)),
        "first": word[0].upper(),
        "last": word[-1].upper(),
        "back": word[::-1],
    }


SPELLINGS = [_spelled(word) for word in SPELL]

TABLES = [
    Table(
        name="spell",
        group="spelling",
        rows=SPELLINGS,
        asks=[
            "[Spell|Please spell|Can you spell] {word}[.|]",
            "How do you spell {word}?",
            "How is {word} spelled?",
            "Spell the word {word}.",
            "Spell “{word}”.",
            "spelling of {word}",
            "{word}, letter by letter",
            "[Show|Tell] me how to spell {word}.",
            "Give me the letters of {word}.",
            "What is the right spelling of {word}?",
            "Could you please spell {word}?",
            "[Which|What] letters are in {word}?",
            "Tell me the spelling of {word}.",
        ],
        held_asks=["Could you spell {word} for me?", "What is the spelling of {word}?"],
        answers=["{letters}."],
        expect="^{letters}",
        follow=["[And|What about|How about|Now] {word}?"],
        weight=7,
    ),
    Table(
        name="letters",
        group="spelling",
        rows=SPELLINGS,
        asks=[
            "How many letters are in {word}?",
            "How many letters does {word} have?",
            "How many letters are in the word {word}?",
            "How long is the word {word}?",
            "Number of letters in {word}?",
            "Count the letters of {word}.",
            "Please count the letters in {word}.",
            "Tell me how many letters {word} has.",
        ],
        held_asks=["Count the letters in {word}."],
        answers=["{letters}: the word {word} has {n} letters."],
        short="{n}.",
        expect=r"\b{n}\b",
        weight=2,
    ),
    Table(
        name="first_letter",
        group="spelling",
        rows=SPELLINGS,
        asks=[
            "What is the first letter of {word}?",
            "[Which|What] letter does {word} start with?",
            "The first letter of {word}?",
            "{word} starts with which letter?",
        ],
        held_asks=["With which letter does {word} start?"],
        answers=["{letters}: the first letter is {first}."],
        short="{first}.",
        expect=r"\b{first}\.",
        weight=1.2,
    ),
    Table(
        name="last_letter",
        group="spelling",
        rows=SPELLINGS,
        asks=[
            "What is the last letter of {word}?",
            "[Which|What] letter does {word} end with?",
            "The last letter of {word}?",
            "{word} ends with which letter?",
        ],
        held_asks=["With which letter does {word} end?"],
        answers=["{letters}: the last letter is {last}."],
        short="{last}.",
        expect=r"\b{last}\.",
        weight=1.2,
    ),
    Table(
        name="opposite",
        group="words",
        rows=OPPOSITES,
        asks=[
            "[What is|What's|Tell me] the opposite of {word}?",
            "opposite of {word}",
            "What is the opposite of “{word}”?",
            "Give me the opposite of {word}.",
            "What word means the opposite of {word}?",
        ],
        held_asks=["Do you know the opposite of {word}?", "Which word is the opposite of {word}?"],
        answers=["The opposite of {word} is {opposite}."],
        short="{opposite}.",
        expect=r"\b{opposite}\b",
        follow=["[And|What about|How about] {word}?"],
        weight=3,
    ),
    Table(
        name="rhyme",
        group="words",
        rows=RHYMES,
        asks=[
            "What rhymes with {word}?",
            "[Give|Tell] me a word that rhymes with {word}.",
            "a rhyme for {word}",
            "Find a rhyme for {word}.",
            "Which word rhymes with {word}?",
        ],
        held_asks=["Do you know a rhyme for {word}?", "Can you rhyme with {word}?"],
        answers=["{rhyme} rhymes with {word}.", "{word} rhymes with {rhyme}."],
        short="{rhyme}.",
        expect=r"\b{rhyme}\b",
        follow=["[And|What about|How about] {word}?"],
        weight=2.5,
    ),
    Table(
        name="plural",
        group="words",
        rows=PLURALS,
        asks=[
            "What is the plural of {word}?",
            "plural of {word}",
            "One {word}, two what?",
            "How do you say more than one {word}?",
        ],
        held_asks=["Tell me the plural of {word}."],
        answers=["The plural of {word} is {plural}."],
        short="{plural}.",
        expect=r"\b{plural}\b",
        follow=["[And|What about|How about] {word}?"],
        weight=1.5,
    ),
    Table(
        name="past",
        group="words",
        rows=PAST,
        asks=[
            "What is the past tense of {word}?",
            "past tense of {word}",
            "[What is|Give me] the past of {word}?",
        ],
        held_asks=["Tell me the past tense of {word}."],
        answers=["The past tense of {word} is {past}."],
        short="{past}.",
        expect=r"\b{past}\b",
        follow=["[And|What about|How about] {word}?"],
        weight=1.5,
    ),
    Table(
        name="translate",
        group="translation",
        rows=TRANSLATIONS,
        asks=[
            "[How do you say|What is|How do I say] {word} in {language}?",
            "Translate {word} [into|to] {language}.",
            "{word} in {language}",
            "[Say|Please say] {word} in {language}.",
            "How do you say “{word}” in {language}?",
            "What does {word} mean in {language}?",
            "What is the {language} for {word}?",
            "{language} for {word}",
            "Give me the {language} word for {word}.",
            "[Which|What] word is {word} in {language}?",
        ],
        held_asks=[
            "Can you translate {word} into {language}?",
            "What's the {language} word for {word}?",
        ],
        answers=["“{word}” in {language} is “{foreign}”."],
        short="{foreign}.",
        expect="{foreign}",
        follow=["And {word} in {language}?", "[What about|How about] {word} in {language}?"],
        weight=5,
    ),
    Table(
        name="next_letter",
        group="spelling",
        rows=LETTERS,
        asks=[
            "[What|Which] letter comes after {letter}?",
            "What is the letter after {letter}?",
            "letter after {letter}",
            "In the alphabet, what comes after {letter}?",
            "What comes after the letter {letter}?",
        ],
        held_asks=["What comes after {letter} in the alphabet?"],
        answers=["{next} comes after {letter}."],
        short="{next}.",
        expect=r"^{next}\b",
        follow=["[And|What about] after {letter}?"],
        weight=1.2,
    ),
    Table(
        name="starter",
        group="words",
        rows=STARTERS,
        asks=[
            "[Give|Tell] me a word that starts with {letter}.",
            "What word starts with {letter}?",
            "a word with {letter}",
            "[Say|Name] a word that begins with {letter}.",
        ],
        held_asks=["Do you know a word that starts with {letter}?"],
        answers=["{letter} is for {word}!"],
        short="{word}.",
        expect=r"\b{word}\b",
        follow=["[And|What about] {letter}?"],
    ),
    Table(
        name="alphabet",
        group="spelling",
        hold="none",
        asks=[
            "[Say|Tell me|What is|Recite|Write] the alphabet[.|?]",
            "alphabet",
            "abc",
            "What are the letters of the alphabet?",
            "List the letters.",
        ],
        held_asks=["[Can you|Could you] say the alphabet?"],
        answers=[", ".join(ascii_lowercase.upper()) + "."],
        expect="^A, B, C, .*X, Y, Z",
    ),
]
