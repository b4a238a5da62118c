"""The box model's data: the split is disjoint, the generator deterministic, the files sound."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from tools.box_model import dialogues, memory, names, numbers, persona, stories
from tools.box_model.grammar import expand, held_out, normalise
from tools.box_model.heldout import BUILDERS, FLOORS, ci_sample, floor_of, held_out_sample
from tools.box_model.tokenizer import CHAT_TEMPLATE

BOX = Path(__file__).parents[2] / "streamserve" / "assets" / "box"


def trained_questions() -> set[str]:
    return {q for table in dialogues.TABLES for q in table.questions("train")}


def test_tables_split_their_questions_without_overlap() -> None:
    held = dialogues.held_questions()
    assert len(held) > 10_000
    assert not trained_questions() & held


def test_every_fact_is_trained_in_some_phrasing_and_held_out_in_another() -> None:
    for table in dialogues.TABLES:
        if table.group != "facts" or table.hold != "pair":
            continue
        for row in table.rows:
            sides = {table.side(ask, row) for ask in table._asks}
            assert "train" in sides, (table.name, row)
        assert table.held_asks


def test_generated_dialogues_contain_no_held_out_question() -> None:
    held, rng = dialogues.held_questions(), Random(3)
    for _ in range(3000):
        for message in dialogues.chat(rng):
            if message.role == "user":
                assert normalise(message.content) not in held


def test_lists_of_phrasings_are_disjoint() -> None:
    splits = [
        *stories.ASK_SPLITS,
        (persona.NAME_PROMPTS, persona.NAME_PROMPTS_HELD),
        (persona.NAME_ASKS, persona.NAME_ASKS_HELD),
        (persona.END_PROMPTS, persona.END_PROMPTS_HELD),
        (persona.START_PROMPTS, persona.START_PROMPTS_HELD),
        *((tone.prompts, tone.prompts_held) for tone in persona.TONES),
        *((recall.tell, recall.tell_held) for recall in memory.RECALLS),
        *((recall.ask, recall.ask_held) for recall in memory.RECALLS),
    ]
    for train, held in splits:
        assert held
        assert not {normalise(t) for t in train} & {normalise(t) for t in held}


def test_names_are_on_one_side_each() -> None:
    rng = Random(4)
    train = {names.person(rng, "train").lower() for _ in range(3000)}
    held = {names.person(rng, "held").lower() for _ in range(1000)}
    assert len(train) > 1000
    assert not train & held
    assert all(held_out("name", name) for name in held)


def test_held_out_sums_are_held_out_in_both_orders() -> None:
    table = next(t for t in dialogues.TABLES if t.name == "sum")
    side = {(int(r["a"]), int(r["b"])): table.side("{a}+{b}", r) for r in numbers.SUMS}
    assert all(side[a, b] == side[b, a] for a, b in side)
    assert 0.05 < Counter(side.values())["held"] / len(side) < 0.2
    assert side[2, 2] == "train"


def test_answers_meet_their_own_checks() -> None:
    rng = Random(5)
    for kind in dialogues.KINDS:
        for split in ("train", "held"):
            for _ in range(20):
                exchange = kind.sample(rng, split)
                found = re.search(exchange.expect, exchange.answer, re.IGNORECASE)
                assert found, (kind.name, exchange)


def test_generator_is_deterministic() -> None:
    first, second = Random(6), Random(6)
    assert [dialogues.dialogue(first) for _ in range(200)] == [
        dialogues.dialogue(second) for _ in range(200)
    ]
    assert held_out_sample("facts", 20) == held_out_sample("facts", 20)


def test_ci_sample_covers_every_floor() -> None:
    counts = Counter(floor_of(item.kind) for item in ci_sample())
    assert sum(counts.values()) == 200
    assert set(counts) == set(FLOORS)


@pytest.mark.parametrize("kind", BUILDERS)
def test_every_kind_has_held_out_dialogues(kind: str) -> None:
    items = held_out_sample(kind, 30, seed=8)
    assert len(items) == 30
    assert all(item.messages[-1]["role"] == "user" for item in items)


def test_expand_lists_all_choices() -> None:
    assert expand("[Hi|Hey] you[!|]") == ["Hi you!", "Hi you", "Hey you!", "Hey you"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BOX / "tokenizer.json"))


@pytest.mark.parametrize(
    "text",
    [
        "Hello, Box!",
        "法国的首都是巴黎。",
        "👩‍👩‍👧 🏳️‍🌈",
        "ελληνικά العربية \x00\x7f",
        "  two  spaces\n\n\ttab",
    ],
)
def test_any_unicode_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("12345").ids) == 5


def test_chat_template_renders_in_a_sandbox() -> None:
    config = json.loads((BOX / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHAT_TEMPLATE
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        config["chat_template"]
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert template.render(messages=messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_files_are_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in BOX.iterdir()) < 25_000_000
