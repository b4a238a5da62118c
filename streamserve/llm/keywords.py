"""The keywords of `LLM` are the flags of ``streamserve serve``: one meaning, one set of checks."""

from __future__ import annotations

import argparse
import json
import os
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from streamserve.cli.args import add_engine_flags, add_model_flags, check_flags
from streamserve.cli.source_flags import add_seed_flag
from streamserve.cli.vllm_flags import FOREIGN_FLAGS, option
from streamserve.errors import ConfigError

_OF_A_SERVER = frozenset(
    {
        "lora_modules",
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
        named = re.sub(r"^argument (-\w+/)?--([\w-]+)\S*:", _keyword_named, message)
        raise ConfigError(named) from None  # what a parser said before helps nobody


def _keyword_named(match: re.Match[str]) -> str:
    return _keyword(match[2]) + ":"


def _keyword(flag: str) -> str:
    return flag.replace("-", "_")


@contextmanager
def named_as_keywords() -> Iterator[None]:
    """What is said of ``--a-flag`` within is said of ``a_flag``."""
    try:
        yield
    except ConfigError as error:
        message = re.sub(r"(?<!\S)--([a-z][\w-]+)", lambda m: _keyword(m[1]), str(error))
        raise ConfigError(message) from None


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
            words += _words(action, name, value)
        elif name in _OF_A_SERVER:
            if value:
                raise ConfigError(f"{name} is for `streamserve serve`: here nothing is served")
        elif name not in FOREIGN_FLAGS:
            raise TypeError(f"LLM() got an unexpected keyword argument {name!r}")
        elif (refusal := FOREIGN_FLAGS[name].refusal(value)) is not None:
            raise ConfigError(f"{name} {refusal}, got {value!r}")
    args = parser.parse_args(words)
    args.model = None if model is None else _text("model", model)
    with named_as_keywords():
        check_flags(args)
    return args


def _words(action: argparse.Action, name: str, value: Any) -> Iterator[str]:
    """How ``value`` is written on a command line; of no such type it is a ``ConfigError``."""
    flag = option(name)
    if value is None:
        return
    is_switch = action.nargs == 0
    if isinstance(value, bool) and (is_switch or action.nargs == "?"):
        if value:
            yield flag
        elif isinstance(action, argparse.BooleanOptionalAction):
            yield option(f"no_{name}")
    elif is_switch:
        raise ConfigError(f"{name} must be True or False, got {value!r}")
    elif isinstance(value, list | tuple) and action.nargs == "+":
        yield flag
        yield from map(str, value)
    elif isinstance(value, Mapping) and action.metavar == "JSON":
        yield f"{flag}={json.dumps(value)}"
    elif action.type is None and action.choices is None:
        yield f"{flag}={_text(name, value)}"
    else:
        yield f"{flag}={str(value).removeprefix('torch.')}"  # a dtype may be torch's


def _text(name: str, value: Any) -> str:
    """A name, a path, or what writes itself as one (torch's device)."""
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "torch":
        return str(value)
    raise ConfigError(f"{name} must be a string, got {value!r}")
