"""Write ``docs/api.md``: every request field and every flag of ``serve``, honoured or refused.

    python tools/api_table.py

It is made from the tables that requests are read through and from the parser of the command line,
so it says what the server does. A test compares the file with what this makes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamserve.api.fields import STATUS
from streamserve.api.openapi import ENDPOINTS, OBJECTS, described
from streamserve.cli.args import build_parser
from streamserve.cli.peer_flags import PeerAction
from streamserve.cli.vllm_flags import RefuseAction

FILE = Path(__file__).parents[1] / "docs" / "api.md"

_INTRO = """# The API: every request field and every flag

Made by `python tools/api_table.py` from the tables that requests are read through and from the
command line's parser; a test keeps it in step. A running server shows the fields at `/docs`, and as
a schema at `/openapi.json`; `streamserve serve --help` shows the flags.

**Honoured**: does what it does at OpenAI's or in vLLM (`/v1/messages`: at Anthropic's).
**Refused**: only the values that ask for nothing pass, anything else is a 400 that names the field.
**No effect**: says something about the request, not about the answer. `null` always means "not
given". A field that is in no table is named in the `X-Ignored-Fields` response header, or refused
with `--strict-fields`.
"""

_AFTER_FIELDS = """
### What `include_timing` and `include_progress` send

Each choice's last chunk (the one with a `finish_reason`) has a `timing` beside it; without
`stream`, top-level `include_timing` puts it into each choice:

```json
{"queue_ms": 0.21, "prefill_ms": 31.9, "first_token_ms": 32.6, "inter_token_p50_ms": 9.8,
 "inter_token_p99_ms": 12.4, "total_ms": 1291.0, "cached_tokens": 48}
```

Times count from the request's arrival, tokenising included, to the first step (`queue_ms`) or to
frames that have left for the socket; `prefill_ms` is from the first step to the first token. Until
a stream's first token, `include_progress` adds comments, which every SSE client skips, whenever
something has changed:

```
: progress {"index":0,"state":"queued","place":3}
: progress {"index":0,"state":"prefill","computed_tokens":512,"prompt_tokens":2048}
```
"""

_FOREIGN = """
## Flags of vLLM's `serve` that this server has not

Refused by name, except with values that ask for nothing.

"""


def render() -> str:
    """The whole page."""
    parts = [_INTRO]
    for endpoint in ENDPOINTS:
        parts.append(f"\n## POST {endpoint.path}\n\n{endpoint.summary}.\n\n")
        parts.append(_fields(described(endpoint.table)))
    for name, table in OBJECTS:
        parts.append(f"\n### In `{name}`\n\n{_fields(described(table))}")
    parts += [_AFTER_FIELDS, "\n## Flags of `streamserve serve`\n\n", _flags()]
    return "".join(parts)


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = []
    for name, field in schema["properties"].items():
        status = field[STATUS] + (", required" if name in required else "")
        values = "" if field[STATUS] == "no effect" else values_of(field)
        rows.append((f"`{name}`", status, values, field.get("description", "")))
    return markdown_table(("field", "", "values", ""), rows)


def values_of(schema: dict[str, Any]) -> str:
    """The values that a schema allows, in a few words."""
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(v)}`" for v in schema["enum"] if v is not None)
    if "anyOf" in schema and "type" not in schema:
        kinds = dict.fromkeys(values_of(part) for part in schema["anyOf"])
        return ", or ".join(kind for kind in kinds if kind != "null")
    kinds = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", [])
    if kinds == ["null"]:
        return "null"
    kind = " or ".join(kind for kind in kinds if kind != "null") or "anything"
    if "items" in schema:
        kind = f"array of {values_of(schema['items'])}"
    return kind + "".join(_limits(schema))


def _limits(schema: dict[str, Any]) -> Iterator[str]:
    low, high = schema.get("minimum"), schema.get("maximum")
    low, high = (None if x is not None and abs(x) >= 2**31 - 1 else x for x in (low, high))
    above = schema.get("exclusiveMinimum")
    if above is not None:
        yield f", above {above:g}"
    if low is not None and high is not None:
        yield f", {low:g} to {high:g}"
    elif low is not None:
        yield f", at least {low:g}"
    elif high is not None:
        yield f", at most {high:g}"
    if "maxItems" in schema:
        yield f", at most {schema['maxItems']}"
    if "maxLength" in schema:
        yield f", at most {schema['maxLength']} characters"


def _flags() -> str:
    rows = []
    foreign = []
    for action in serve_actions():
        if isinstance(action, RefuseAction):
            foreign.append(_foreign(action))
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar}`"
        help_text = (action.help or "") % {**vars(action), "prog": "streamserve"}
        choices = " ".join(f"`{choice}`" for choice in action.choices or ())
        rows.append((names, "honoured", choices, help_text))
    own = markdown_table(("flag", "", "values", ""), rows)
    return own + _FOREIGN + markdown_table(("flag", "", "instead"), foreign)


def _foreign(action: RefuseAction) -> tuple[str, ...]:
    flag = action.flag
    name = f"`{action.option_strings[0]}`"
    if flag.neutral is None:
        return name, "no effect", flag.instead
    values = " or ".join(f"`{value}`" for value in sorted(flag.neutral))
    return name, "refused" + (f", but for {values}" if values else ""), flag.instead


def serve_actions() -> list[argparse.Action]:
    """What ``streamserve serve`` can be told, in the order of its help."""
    [commands] = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    actions = commands.choices["serve"]._actions
    return [
        action for action in actions if action.dest != "help" and not isinstance(action, PeerAction)
    ]


def markdown_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A header, and a row for each of ``rows``."""
    lines = [head, ("---",) * len(head), *rows]
    cells = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return "".join(f"| {line} |\n" for line in cells)


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(render(), encoding="utf-8")
