"""Arithmetic with small numbers, counting, and the calendar."""

# ruff: noqa: SIM905 - a table reads best with one row a line, a word list as words
from __future__ import annotations

from tools.box_model.grammar import Table, rows

WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
MONTH_DAYS = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
).split()
THINGS = "apples oranges books coins pens cakes marbles balloons cookies stars".split()
# Every newcomer types these, so they are trained in all phrasings.
KEPT_SUMS = {(1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (5, 5), (10, 10)}


def number_word(n: int) -> str:
    """`n` in English, 0 to 100."""
    if n == 100:
        return "one hundred"
    if n <= 20:
        return WORDS[n]
    tens, ones = TENS[n // 10 - 2], n % 10
    return f"{tens}-{WORDS[ones]}" if ones else tens


def _pair_row(a: int, b: int, result: int) -> dict[str, str]:
    low, high = sorted((a, b))
    row = {"a": str(a), "b": str(b), "c": str(result), "hold": f"{low}|{high}"}
    if max(a, b) <= 20:
        row |= {"aw": WORDS[a], "bw": WORDS[b]}
    return row


def _keep(table: list[dict[str, str]], pairs: set[tuple[int, int]]) -> frozenset[str]:
    return frozenset(
        "|".join(row.values())
        for row in table
        if tuple(sorted((int(row["a"]), int(row["b"])))) in pairs
    )


SUMS = [_pair_row(a, b, a + b) for a in range(21) for b in range(21)]
WIDE_SUMS = [_pair_row(a, b, a + b) for a in range(51) for b in range(51) if max(a, b) > 20]
DIFFERENCES = [_pair_row(a, b, a - b) for a in range(21) for b in range(a + 1)]
PRODUCTS = [_pair_row(a, b, a * b) for a in range(11) for b in range(11)]
QUOTIENTS = [
    {"a": str(a * b), "b": str(b), "c": str(a)} for a in range(1, 11) for b in range(1, 11)
]
STORY_SUMS = [
    row | {"things": things}
    for row in SUMS
    if 0 < int(row["a"]) <= 12 and 0 < int(row["b"]) <= 12
    for things in THINGS
]
STORY_DIFFERENCES = [
    row | {"things": things}
    for row in DIFFERENCES
    if 0 < int(row["b"]) < int(row["a"]) <= 12
    for things in THINGS
]
COMPARISONS = [
    {"a": str(a), "b": str(b), "big": str(max(a, b)), "small": str(min(a, b))}
    for a in range(101)
    for b in range(101)
    if a != b and (a * 7 + b * 13) % 5 == 0
]
SUM_ANSWERS = ["{a} + {b} = {c}.", "{a} plus {b} is {c}."]


def count_text(start: int, stop: int, step: int = 1) -> str:
    end = stop + (1 if step > 0 else -1)
    return ", ".join(str(n) for n in range(start, end, step))


COUNTS = [{"n": str(n), "nw": number_word(n), "list": count_text(1, n)} for n in range(3, 51)]
COUNTDOWNS = [
    {"n": str(n), "nw": number_word(n), "list": count_text(n, 1, -1)} for n in range(3, 21)
]
RANGES = [
    {"a": str(a), "b": str(a + k), "list": count_text(a, a + k)}
    for a in range(2, 60)
    for k in range(3, 13)
]
STEPS = rows(
    "by upto list",
    "; ".join(
        f"{word}: {n}: {count_text(step, n, step)}"
        for word, step in (("twos", 2), ("threes", 3), ("fives", 5), ("tens", 10))
        for n in range(4 * step, 11 * step, step)
    ),
)
NEIGHBOURS = [{"n": str(n), "next": str(n + 1), "previous": str(n - 1)} for n in range(1, 100)]
NUMBER_WORDS = [{"n": str(n), "word": number_word(n)} for n in range(101)]
PARITY = [
    {"n": str(n), "parity": "even" if n % 2 == 0 else "odd", "yes": "Yes" if n % 2 == 0 else "No"}
    for n in range(101)
]
HALVES = [{"n": str(2 * n), "half": str(n), "double": str(4 * n)} for n in range(1, 26)]
DAY_ROWS = [
    {"day": day, "next": DAYS[(i + 1) % 7], "previous": DAYS[i - 1], "nth": ORDINALS[i]}
    for i, day in enumerate(DAYS)
]
MONTH_ROWS = [
    {
        "month": month,
        "next": MONTHS[(i + 1) % 12],
        "previous": MONTHS[i - 1],
        "nth": ORDINALS[i],
        "days": str(MONTH_DAYS[i]),
        "season": ["winter", "spring", "summer", "autumn"][(i + 1) % 12 // 3],
    }
    for i, month in enumerate(MONTHS)
]

TABLES = [
    Table(
        name="sum",
        group="sums",
        rows=SUMS,
        hold="row",
        keep=_keep(SUMS, KEPT_SUMS),
        asks=[
            "[What is|What's|Calculate|Compute|How much is|] {a} [+|plus] {b}?",
            "{a}+{b}",
            "{a}+{b}=",
            "{a} + {b} =",
            "what is {a}+{b}",
            "Add {a} and {b}.",
            "[What is|Tell me] the sum of {a} and {b}?",
            "[What is|How much is|] {aw} plus {bw}?",
            "What do you get if you add {a} and {b}?",
            "What do {a} and {b} make?",
            "{a} and {b} makes what?",
            "What does {a} + {b} make?",
            "[Work out|Please add|Tell me] {a} [+|plus] {b}.",
            "What is {a} and {b}?",
            "the sum of {a} and {b}",
        ],
        held_asks=[
            "[Can you tell me|Do you know] what {a} [+|plus] {b} is?",
            "{a} and {b} together make?",
        ],
        answers=SUM_ANSWERS,
        short="{c}.",
        expect=r"(?<!\d){c}\.?$",
        follow=["[And|What about|How about] {a} + {b}?", "And {a} plus {b}?"],
        weight=14,
    ),
    Table(
        name="wide_sum",
        group="larger sums",
        rows=WIDE_SUMS,
        hold="row",
        asks=["[What is|What's|How much is|] {a} [+|plus] {b}?", "{a}+{b}", "Add {a} and {b}."],
        held_asks=["Can you tell me what {a} + {b} is?"],
        answers=SUM_ANSWERS,
        short="{c}.",
        expect=r"(?<!\d){c}\.?$",
        weight=6,
    ),
    Table(
        name="difference",
        group="differences",
        rows=DIFFERENCES,
        hold="row",
        asks=[
            "[What is|What's|How much is|] {a} [-|minus] {b}?",
            "{a}-{b}",
            "{a}-{b}=",
            "Take {b} from {a}.",
            "Subtract {b} from {a}.",
            "[What is|] {aw} minus {bw}?",
            "What is the difference between {a} and {b}?",
            "Work out {a} [-|minus] {b}.",
            "[Tell me|Please tell me] {a} [-|minus] {b}.",
            "What do you get if you take {b} from {a}?",
        ],
        held_asks=["[Can you tell me|Do you know] what {a} [-|minus] {b} is?"],
        answers=["{a} - {b} = {c}.", "{a} minus {b} is {c}."],
        short="{c}.",
        expect=r"(?<!\d){c}\.?$",
        follow=["[And|What about] {a} - {b}?"],
        weight=9,
    ),
    Table(
        name="product",
        group="times table",
        rows=PRODUCTS,
        hold="pair",
        asks=[
            "[What is|What's|How much is|] {a} [times|x|*|×] {b}?",
            "{a}*{b}",
            "{a} x {b} =",
            "Multiply {a} by {b}.",
            "[What is|] {aw} times {bw}?",
            "[Tell me|Work out] {a} [times|x] {b}.",
        ],
        held_asks=["Can you tell me what {a} times {b} is?"],
        answers=["{a} × {b} = {c}.", "{a} times {b} is {c}."],
        short="{c}.",
        expect=r"(?<!\d){c}\.?$",
        follow=["[And|What about] {a} times {b}?"],
        weight=6,
    ),
    Table(
        name="quotient",
        group="times table",
        rows=QUOTIENTS,
        hold="pair",
        asks=[
            "[What is|What's|] {a} [divided by|/|÷] {b}?",
            "{a}/{b}",
            "Divide {a} by {b}.",
            "[Tell me|Work out] {a} divided by {b}.",
        ],
        held_asks=["Can you tell me what {a} divided by {b} is?"],
        answers=["{a} ÷ {b} = {c}.", "{a} divided by {b} is {c}."],
        short="{c}.",
        expect=r"(?<!\d){c}\.?$",
        weight=2,
    ),
    Table(
        name="story_sum",
        group="word problems",
        rows=STORY_SUMS,
        hold="row",
        asks=[
            "I have {a} {things} and get {b} more. How many {things} do I have?",
            "If I have {a} {things} and you give me {b}, how many do I have?",
            "Tom has {a} {things}. He buys {b} more. How many does he have now?",
            "{a} {things} and {b} {things}: how many is that?",
            "There are {a} {things}. Then come {b} more. How many are there?",
        ],
        held_asks=["There are {a} {things} here and {b} there. How many {things} are there?"],
        answers=["{a} + {b} = {c}, so that makes {c} {things}."],
        short="{c}.",
        expect=r"= {c}\b",
        weight=4,
    ),
    Table(
        name="story_difference",
        group="word problems",
        rows=STORY_DIFFERENCES,
        hold="row",
        asks=[
            "I have {a} {things} and lose {b}. How many {things} are left?",
            "I had {a} {things} and gave away {b}. How many do I have now?",
            "Anna has {a} {things}. She sells {b}. How many are left?",
            "There are {a} {things}. Someone takes {b}. How many are left?",
        ],
        held_asks=["There were {a} {things} and {b} went away. How many {things} remain?"],
        answers=["{a} - {b} = {c}, so {c} {things} are left."],
        short="{c}.",
        expect=r"= {c}\b",
        weight=4,
    ),
    Table(
        name="count",
        group="counting",
        rows=COUNTS,
        asks=[
            "[Count|Please count|Can you count|Count for me] [to|up to] {n}.",
            "count to {nw}",
            "Count [from 1|from one] to {n}.",
            "Count to {nw}, please.",
            "List the numbers up to {n}.",
            "I want to see the numbers from 1 to {n}.",
            "Numbers from 1 to {n}",
        ],
        held_asks=["[Could you|Would you] count to {n}?", "I want to hear you count to {nw}."],
        answers=["{list}."],
        expect=r"^{list}\.?",
        weight=2,
    ),
    Table(
        name="countdown",
        group="counting",
        rows=COUNTDOWNS,
        asks=[
            "Count down from {n}.",
            "Count backwards from {n}.",
            "countdown from {nw}",
            "Count from {n} to 1.",
            "Can you count down from {n}?",
            "Do a countdown from {n}.",
        ],
        held_asks=["[Could you|Please] count down from {n}?"],
        answers=["{list}. 🚀"],
        expect=r"^{list}\.?",
        weight=1.8,
    ),
    Table(
        name="range",
        group="counting",
        rows=RANGES,
        hold="row",
        asks=[
            "Count from {a} to {b}.",
            "List the numbers from {a} to {b}.",
            "Please count from {a} up to {b}.",
        ],
        held_asks=["Could you count from {a} to {b}?"],
        answers=["{list}."],
        expect=r"^{list}\.?",
        weight=1,
    ),
    Table(
        name="steps",
        group="counting",
        rows=STEPS,
        asks=[
            "Count by {by} to {upto}.",
            "Count in {by} up to {upto}.",
            "count to {upto} by {by}",
            "Can you count by {by} to {upto}?",
            "Count by {by} until {upto}.",
        ],
        held_asks=["Could you count by {by} to {upto}?"],
        answers=["{list}."],
        expect=r"^{list}\.?",
    ),
    Table(
        name="next_number",
        group="numbers",
        rows=NEIGHBOURS,
        asks=[
            "What [number |]comes after {n}?",
            "[What is|] the number after {n}?",
            "[Which|What] number follows {n}?",
            "The number after {n} is?",
            "[Which|What] number is right after {n}?",
        ],
        held_asks=["Which number is next after {n}?"],
        answers=["{next} comes after {n}."],
        short="{next}.",
        expect=r"(?<!\d){next}\b",
        follow=["[And|What about] after {n}?"],
        weight=1.2,
    ),
    Table(
        name="previous_number",
        group="numbers",
        rows=NEIGHBOURS,
        asks=[
            "What [number |]comes before {n}?",
            "[What is|] the number before {n}?",
            "[Which|What] number is right before {n}?",
            "The number before {n} is?",
        ],
        held_asks=["Which number is just before {n}?"],
        answers=["{previous} comes before {n}."],
        short="{previous}.",
        expect=r"(?<!\d){previous}\b",
        follow=["[And|What about] before {n}?"],
    ),
    Table(
        name="number_word",
        group="numbers",
        rows=NUMBER_WORDS,
        asks=[
            "[Write|Spell] {n} in words.",
            "How do you write {n} in words?",
            "{n} in words",
            "How do you spell the number {n}?",
        ],
        held_asks=["What is {n} in words?"],
        answers=["{n} in words is {word}."],
        short="{word}.",
        expect=r"\b{word}\b",
    ),
    Table(
        name="parity",
        group="numbers",
        rows=PARITY,
        asks=[
            "Is {n} [even or odd|odd or even]?",
            "Is {n} an even or an odd number?",
            "{n}: even or odd?",
        ],
        held_asks=["Tell me if {n} is even or odd."],
        answers=["{n} is {parity}."],
        short="{parity}.",
        expect="{parity}",
        follow=["[And|What about] {n}?"],
    ),
    Table(
        name="bigger",
        group="numbers",
        rows=COMPARISONS,
        hold="row",
        asks=[
            "[Which|What] is [bigger|larger], {a} or {b}?",
            "[Which|What] is more, {a} or {b}?",
            "Is {a} or {b} bigger?",
            "Is {a} bigger than {b}, or {b}?",
            "[Which|What] number is bigger, {a} or {b}?",
            "Compare {a} and {b}.",
        ],
        held_asks=["Which number is larger: {a} or {b}?"],
        answers=["{big} is bigger than {small}."],
        short="{big}.",
        expect=r"^{big}\b",
        weight=2,
    ),
    Table(
        name="half",
        group="numbers",
        rows=HALVES,
        asks=["What is half of {n}?", "half of {n}"],
        held_asks=["How much is half of {n}?"],
        answers=["Half of {n} is {half}."],
        short="{half}.",
        expect=r"(?<!\d){half}\.?$",
    ),
    Table(
        name="double",
        group="numbers",
        rows=HALVES,
        asks=["What is double {n}?", "double {n}", "What is twice {n}?"],
        held_asks=["How much is twice {n}?"],
        answers=["Twice {n} is {double}."],
        short="{double}.",
        expect=r"(?<!\d){double}\.?$",
    ),
    Table(
        name="day_after",
        group="calendar",
        rows=DAY_ROWS,
        asks=[
            "[What|Which] day comes after {day}?",
            "What is the day after {day}?",
            "[What|Which] day follows {day}?",
            "day after {day}",
            "If today is {day}, what day is tomorrow?",
            "After {day} comes which day?",
            "{day} is followed by which day?",
            "[What|Which] day is right after {day}?",
            "Today is {day}. What is tomorrow?",
        ],
        held_asks=["After {day}, what day is it?"],
        answers=["{next} comes after {day}."],
        short="{next}.",
        expect="^{next}",
        follow=["[And|What about] after {day}?"],
        weight=1.5,
    ),
    Table(
        name="day_before",
        group="calendar",
        rows=DAY_ROWS,
        asks=[
            "[What|Which] day comes before {day}?",
            "What is the day before {day}?",
            "day before {day}",
            "If today is {day}, what day was yesterday?",
            "Before {day} comes which day?",
            "[What|Which] day is right before {day}?",
            "Today is {day}. What was yesterday?",
        ],
        held_asks=["Before {day}, what day is it?"],
        answers=["{previous} comes before {day}."],
        short="{previous}.",
        expect="^{previous}",
        follow=["[And|What about] before {day}?"],
        weight=1.2,
    ),
    Table(
        name="month_after",
        group="calendar",
        rows=MONTH_ROWS,
        asks=[
            "[What|Which] month comes after {month}?",
            "What is the month after {month}?",
            "[What|Which] month follows {month}?",
            "month after {month}",
            "After {month} comes which month?",
            "{month} is followed by which month?",
            "[What|Which] month is right after {month}?",
            "It is {month}. What is next month?",
        ],
        held_asks=["After {month}, what month is it?"],
        answers=["{next} comes after {month}."],
        short="{next}.",
        expect="^{next}",
        follow=["[And|What about] after {month}?"],
        weight=1.5,
    ),
    Table(
        name="month_before",
        group="calendar",
        rows=MONTH_ROWS,
        asks=[
            "[What|Which] month comes before {month}?",
            "What is the month before {month}?",
            "month before {month}",
            "Before {month} comes which month?",
            "[What|Which] month is right before {month}?",
            "It is {month}. What was last month?",
        ],
        held_asks=["Before {month}, what month is it?"],
        answers=["{previous} comes before {month}."],
        short="{previous}.",
        expect="^{previous}",
        follow=["[And|What about] before {month}?"],
        weight=1.2,
    ),
    Table(
        name="month_days",
        group="calendar",
        rows=MONTH_ROWS,
        asks=[
            "How many days [are in|does|has] {month}?",
            "How many days does {month} have?",
            "days in {month}",
            "How long is {month}?",
            "Number of days of {month}?",
        ],
        held_asks=["What is the number of days in {month}?"],
        answers=["{month} has {days} days."],
        short="{days}.",
        expect="{days}",
        follow=["[And|What about|How about] {month}?"],
        weight=1.2,
    ),
    Table(
        name="month_nth",
        group="calendar",
        rows=MONTH_ROWS,
        asks=[
            "[What|Which] is the {nth} month?",
            "[What|Which] is the {nth} month of the year?",
            "the {nth} month",
        ],
        held_asks=["Name the {nth} month of the year."],
        answers=["The {nth} month is {month}."],
        short="{month}.",
        expect="{month}",
    ),
    Table(
        name="month_season",
        group="calendar",
        rows=MONTH_ROWS,
        asks=[
            "[What|Which] season is {month} in?",
            "In which season is {month}?",
            "[What|Which] season is it in {month}?",
            "{month}: which season?",
            "The season of {month}?",
        ],
        held_asks=["{month} is in which season?"],
        answers=["In the northern half of the world, {month} is in {season}."],
        short="{season}.",
        expect="{season}",
        follow=["[And|What about] {month}?"],
    ),
    Table(
        name="day_nth",
        group="calendar",
        rows=DAY_ROWS,
        asks=["[What|Which] is the {nth} day of the week?", "the {nth} day of the week"],
        held_asks=["Name the {nth} day of the week."],
        answers=["Counting from Monday, the {nth} day is {day}."],
        short="{day}.",
        expect="{day}",
    ),
    Table(
        name="days_list",
        group="calendar",
        hold="none",
        asks=[
            "[What are|List|Name|Tell me|Say] the days of the week[.|?]",
            "days of the week",
            "What days are in a week?",
            "List all the days of the week.",
            "What are the seven days?",
        ],
        held_asks=["[Can you|Could you] name the days of the week?", "Which days are in a week?"],
        answers=["The days of the week are " + ", ".join(DAYS[:-1]) + " and Sunday."],
        expect="Monday, .*Wednesday, .*Sunday",
    ),
    Table(
        name="months_list",
        group="calendar",
        hold="none",
        asks=[
            "[What are|List|Name|Tell me|Say] the months of the year[.|?]",
            "months of the year",
            "What months are in a year?",
            "List all the months.",
            "What are the twelve months?",
        ],
        held_asks=[
            "[Can you|Could you] name the months of the year?",
            "Which months are in a year?",
        ],
        answers=["The months of the year are " + ", ".join(MONTHS[:-1]) + " and December."],
        expect="January, .*June, .*December",
    ),
]
