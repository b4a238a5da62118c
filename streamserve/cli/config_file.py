"""``serve --config FILE``: flags from a YAML file, named as on the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from streamserve.errors import ConfigError


def split_config_flag(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file that ``serve`` is to read its flags from, if any, and ``argv`` without it."""
    if not argv or argv[0] != "serve":
        return None, list(argv)
    parser = argparse.ArgumentParser(
        prog="streamserve serve", add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS
    )
    parser.add_argument("--config")
    known, rest = parser.parse_known_args(argv)
    return known.config, rest


def config_flags(file: str, parser: argparse.ArgumentParser) -> list[str]:
    """The settings in ``file`` as flags of ``parser``, the model's name last.

    Raises ``ConfigError`` naming the file, and the setting that is none.
    """
    settings = _read(file)
    model = settings.pop("model", None)
    flags = [flag for name, value in settings.items() for flag in _flags(file, name, value, parser)]
    return flags if model is None else [*flags, "--model", str(model)]


def _read(file: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config {file} must hold settings by name, got {type(content).__name__}"
        )
    return {str(name).replace("_", "-"): value for name, value in content.items()}


def _flags(file: str, name: str, value: Any, parser: argparse.ArgumentParser) -> Iterator[str]:
    known = parser._option_string_actions
    flag, opposite = f"--{name}", f"--no-{name}"
    if flag not in known:
        raise ConfigError(f"--config {file}: there is no flag {flag}")
    if value is None:
        return
    if isinstance(value, bool):
        if value or opposite in known:
            yield flag if value else opposite
        return
    yield flag
    if isinstance(value, list):
        yield from map(str, value)
    else:
        yield json.dumps(value) if isinstance(value, dict) else str(value)
