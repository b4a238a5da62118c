"""What a parameter may be, by schemas that refer to themselves, to others, or to nothing."""

from __future__ import annotations

import pytest

from streamserve.engine.parsers.argument_types import parameter_types

DEFS = {"$defs": {"a/b": {"type": "integer"}, "c~d": {"type": "array"}}}


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"$ref": "#/$defs/a~1b"}, {"integer"}),
        ({"$ref": "#/$defs/c~0d"}, {"array"}),
        ({"$ref": "#/$defs/nobody"}, {"string"}),
        ({"$ref": "#/$defs/a~1b/type/deeper"}, {"string"}),
        ({"$ref": "https://example.com/x.json#/$defs/a~1b"}, {"string"}),
        (
            {"enum": [True, 1, 1.5, None, "x", [], {}]},
            {"boolean", "integer", "number", "null", "string", "array", "object"},
        ),
        ({"enum": [True]}, {"boolean"}),
        ({"const": {}}, {"object"}),
        ({"allOf": [{"type": "integer"}]}, {"integer"}),
        ({}, {"string"}),
    ],
)
def test_what_a_parameter_may_be(schema, types):
    assert parameter_types({**DEFS, "properties": {"x": schema}}, "x") == types
