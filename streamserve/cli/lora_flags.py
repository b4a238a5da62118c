"""The flags of adapters, named as vLLM's."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from pathlib import Path

from streamserve.cli.values import positive
from streamserve.config import AdapterConfig
from streamserve.errors import ConfigError

_DEFAULT_LORAS = 4
_NAMES = ("name", "path")


def add_lora_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapters")
    group.add_argument(
        "--enable-lora",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="serve LoRA adapters beside the model (default: with --lora-modules or "
        "--allow-runtime-lora-updating)",
    )
    group.add_argument(
        "--max-loras",
        type=positive,
        metavar="N",
        help=f"adapters loaded at a time (default: those of --lora-modules, at least "
        f"{_DEFAULT_LORAS})",
    )
    group.add_argument(
        "--max-cpu-loras",
        type=positive,
        metavar="N",
        help="as --max-loras, of which the larger counts: there is one place for each",
    )
    group.add_argument(
        "--max-lora-rank",
        type=positive,
        default=16,
        metavar="N",
        help="the largest rank that an adapter may have (default: 16)",
    )


def add_lora_serving_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("adapters of a server")
    group.add_argument(
        "--lora-modules",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="adapters in PEFT's format, each served as a model of its name; or as JSON, "
        '{"name": …, "path": …}',
    )
    group.add_argument(
        "--allow-runtime-lora-updating",
        action="store_true",
        help="POST /v1/load_lora_adapter and /v1/unload_lora_adapter load and unload adapters, of "
        "any directory that the server can read (default: the paths do not exist)",
    )


def adapter_config(args: Namespace) -> AdapterConfig | None:
    """What the flags ask for, None without adapters. Raises ``ConfigError``."""
    modules = tuple(_module(text) for text in getattr(args, "lora_modules", ()))
    is_updated = getattr(args, "allow_runtime_lora_updating", False)
    if args.enable_lora is False and (modules or is_updated):
        raise ConfigError("--no-enable-lora goes with no --lora-modules")
    if not (args.enable_lora or modules or is_updated):
        return None
    names = [name for name, _ in modules]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--lora-modules names {name!r} more than once")
    asked = max(args.max_loras or 0, args.max_cpu_loras or 0)
    if asked and asked < len(modules):
        raise ConfigError(f"--max-loras must be at least {len(modules)}, the modules, got {asked}")
    return AdapterConfig(
        num_adapters=asked or max(len(modules), _DEFAULT_LORAS),
        max_rank=args.max_lora_rank,
        modules=modules,
    )


def _module(text: str) -> tuple[str, Path]:
    name, has_path, path = text.partition("=")
    if text.startswith("{"):
        try:
            value = json.loads(text)
            name, path = (value[key] for key in _NAMES)
        except (ValueError, KeyError) as error:
            raise ConfigError(f"--lora-modules: JSON needs name and path, got {text!r}") from error
        if unknown := value.keys() - {*_NAMES, "base_model_name"}:
            raise ConfigError(f"--lora-modules: {min(unknown)!r} is not supported, in {text!r}")
    elif not has_path:
        raise ConfigError(f"--lora-modules must be NAME=PATH or JSON, got {text!r}")
    if not isinstance(name, str) or not isinstance(path, str) or not name or not path:
        raise ConfigError(f"--lora-modules must have a name and a path, got {text!r}")
    return name, Path(path).expanduser()
