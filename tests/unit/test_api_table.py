"""``docs/api.md`` is what the server does: both come from the same tables."""

import argparse

from streamserve.api.chat_request import CHAT_TABLE
from streamserve.api.completion_request import COMPLETION_TABLE
from streamserve.cli.vllm_flags import RefuseAction
from tools.api_table import FILE, render, serve_actions


def test_the_file_is_up_to_date():
    assert FILE.read_text(encoding="utf-8") == render(), "run: python tools/api_table.py"


def test_every_field_and_every_flag_is_in_it():
    text = FILE.read_text(encoding="utf-8")
    for table in (CHAT_TABLE, COMPLETION_TABLE):
        for name in table.honoured:
            assert f"| `{name}` | honoured" in text
        for name in table.refused:
            assert f"| `{name}` | refused |" in text
        for name in table.annotations:
            assert f"| `{name}` | no effect |" in text
    for action in serve_actions():
        if isinstance(action, RefuseAction):
            assert f"| `{action.option_strings[0]}` | honoured" not in text
            assert action.flag.instead in text
            continue
        for flag in action.option_strings:
            assert f"`{flag}`" in text
    assert argparse.SUPPRESS not in text
