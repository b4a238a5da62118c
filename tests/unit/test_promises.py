"""The tests that docs/promises.md and the README name for the promises exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["docs/promises.md", "README.md"])
def test_every_test_that_holds_a_promise_exists(page):
    rows = re.findall(r"^\|.*`tests/.*$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == 10
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", "".join(rows))
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = [
            node.name
            for node in tree.body
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and node.name.startswith("test_")
        ]
        assert (name in functions) if name else functions, f"{file}::{name}"
