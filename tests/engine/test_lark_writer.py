"""How grammars are put together: special tokens as themselves, the longest first."""

from __future__ import annotations

from streamserve.engine.lark_writer import LarkWriter, with_special_ids


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
