"""How grammars are put together: special tokens as themselves, the longest first."""

from __future__ import annotations

import json

from streamserve.engine.lark_writer import LarkWriter, with_special_ids
from streamserve.engine.parsers.tagged_formats import Qwen3CoderParser
from streamserve.engine.tagged_grammar import Values


def test_special_tokens_stand_in_texts_as_themselves():
    writer = LarkWriter(["<a>", "<a>b"], {})
    assert writer.text("x<a>b<a>y") == '"x" <[special:1]> <[special:0]> "y"'
    assert writer.text("") == ""
    assert with_special_ids(writer.text("<a>b<a>"), [7, 9]) == "<[9]> <[7]>"
    assert writer.either(["x", ""]) == '(x | "")'


def test_a_marker_is_written_with_its_special_token_or_without():
    writer = LarkWriter(["<a>"], {})
    assert writer.until("<a>y") == '(r0 | FREE <[special:0]> "y")'
    assert writer.until("y") == "r1"
    written = writer.render("r1")
    assert 'r0[lazy]: FREE "<a>y"' in written
    assert 'r1[lazy]: FREE "y"' in written


def test_a_part_is_rendered_without_what_stands_beside_it():
    """Else a grammar of N tools would be read N times."""
    writer = LarkWriter([], {})
    schemas = [writer.json({"const": value}) for value in (1, 2, 1)]
    others = [writer.grammar(f'start: "{name}"') for name in "xy"]
    writer.rule(writer.either([*schemas, *others]))
    parts = writer.render_parts()
    assert parts[:2] == [LarkWriter([], {}).render(body) for body in schemas[:2]]
    assert [json.loads(part)["grammars"][1:] for part in parts[2:]] == [
        [{"name": "g0", "lark_grammar": 'start: "x"'}],
        [{"name": "g1", "lark_grammar": 'start: "y"'}],
    ]


def rules(schema) -> str:
    """What may stand for a parameter of this schema between two tags."""
    writer = LarkWriter([], {})
    Values(Qwen3CoderParser.style, "x", {}, writer).all(schema)
    return writer.render("")


def test_fixed_values_are_no_patterns_and_patterns_may_stand_anywhere():
    assert r"a\.b" in rules({"enum": ["a.b"]})
    assert rules({"const": "a.b"}) == rules({"enum": ["a.b"]})
    anywhere, begins, whole = (
        rules({"type": "string", "pattern": pattern}) for pattern in ("b", "^b", "^b$")
    )
    assert len(anywhere) > len(begins) > len(whole)
