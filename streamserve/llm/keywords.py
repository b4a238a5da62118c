"""The keywords of `LLM` are the flags of ``streamserve serve``: one meaning, one set of checks."""

from __future__ import annotations

import argparse
import json
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from streamserve.cli.args import add_engine_flags, add_model_flags, check_flags
from streamserve.cli.source_flags import add_seed_flag
from streamserve.cli.vllm_flags import FOREIGN_FLAGS, option
from streamserve.errors import ConfigError

_OF_A_SERVER = frozenset(
    {
        "reasoning_parser",
        "served_model_name",
        "shutdown_timeout",
        "trust_request_chat_template",
    }
)
"""What vLLM takes here as well."""


class _KeywordParser(argparse.ArgumentParser):
    """Raises ``ConfigError`` in the keyword's name where a command line would end the process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(re.sub(r"^argument (-\w+/)?--([\w-]+)\S*:", _keyword_named, message))


def _keyword_named(match: re.Match[str]) -> str:
    return match[2].replace("-", "_") + ":"


def flags_of(model: str | None, keywords: Mapping[str, Any]) -> Namespace:
    """What the flags are for ``LLM(model, **keywords)``; a keyword that is ``None`` is not given.

    Raises ``ConfigError`` for a value that cannot be served, or a keyword of vLLM's that is not
    built, and ``TypeError`` for one that nobody knows.
    """
    parser = _KeywordParser(prog="LLM", add_help=False, allow_abbrev=False)
    add_model_flags(parser)
    add_engine_flags(parser)
    add_seed_flag(parser)
    words: list[str] = []
    for name, value in keywords.items():
        action = parser._option_string_actions.get(option(name))
        if action is not None:
            words += _words(action, option(name), value)
        elif name in _OF_A_SERVER:
            if value:
                raise ConfigError(f"{name} is for `streamserve serve`: here nothing is served")
        elif name not in FOREIGN_FLAGS:
            raise TypeError(f"LLM() got an unexpected keyword argument {name!r}")
        elif (refusal := FOREIGN_FLAGS[name].refusal(value)) is not None:
            raise ConfigError(f"{name} {refusal}, got {value!r}")
    args = parser.parse_args(words)
    args.model = model
    check_flags(args)
    return args


def _words(action: argparse.Action, flag: str, value: Any) -> Iterator[str]:
    """How ``value`` is written on a command line."""
    if value is None:
        return
    if isinstance(value, bool) and action.type is None and action.nargs in (0, "?"):
        if value:
            yield flag
        elif isinstance(action, argparse.BooleanOptionalAction):
            yield option(f"no_{flag[2:]}")
        return
    if isinstance(value, list | tuple) and action.nargs == "+":
        yield flag
        yield from map(_word, value)
        return
    yield f"{flag}={_word(value)}"


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value)
    if isinstance(value, Path | str):
        return str(value)
    return str(value).removeprefix("torch.")  # a dtype may be torch's
