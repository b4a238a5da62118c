"""The files that the flags name: the model's, its tokenizer's, and its sampling defaults."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from streamserve.api.sampling import sampling_defaults as checked_defaults
from streamserve.cli.model_setup import Say
from streamserve.errors import ConfigError
from streamserve.models import ModelConfig, read_sampling_defaults, resolve_model
from streamserve.models.config import SAMPLING_FIELDS

BOX = "box"
"""What the model in the box is called where it is named."""


def box_path() -> Path:
    """The directory of the model in the box."""
    return Path(str(files("streamserve") / "assets" / "box"))


def model_directory(args: Namespace, say: Say) -> Path:
    """Where the model is, downloaded if it must be. Raises ``ModelLoadError``."""
    if args.model is None or (args.model == BOX and not Path(BOX).exists()):
        return box_path()
    return _resolve(args, args.model, say, revision=args.revision, load_format=args.load_format)


def named_directory(args: Namespace, name: str, say: Say) -> Path:
    """Where another model is, downloaded if it must be. Raises ``ModelLoadError``."""
    return _resolve(args, name, say, revision=None, load_format=args.load_format)


def tokenizer_directory(args: Namespace, model: Path, say: Say) -> Path:
    """Where the tokenizer's files are: with the model's unless it has a name of its own."""
    if args.tokenizer is None:
        return model
    # No weights: this is as far as ``dummy`` goes.
    revision = args.tokenizer_revision or args.revision
    return _resolve(args, args.tokenizer, say, revision=revision, load_format="dummy")


def sampling_defaults(args: Namespace, config: ModelConfig) -> Mapping[str, Any]:
    """What requests are sampled with where they do not say. Raises ``ConfigError``."""
    source = args.generation_config
    defaults: dict[str, Any] = {}
    if source == "auto":
        defaults.update(config.sampling_defaults)
    elif source != "vllm":
        directory = Path(source).expanduser()
        if not (directory / "generation_config.json").is_file():
            raise ConfigError(
                "--generation-config must be auto, vllm or a directory with a "
                f"generation_config.json, got {source!r}"
            )
        defaults.update(read_sampling_defaults(directory))
    for name, value in (args.override_generation_config or {}).items():
        if name not in SAMPLING_FIELDS:
            raise ConfigError(
                "--override-generation-config must hold only "
                f"{', '.join(SAMPLING_FIELDS)}, got {name!r}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(
                f"--override-generation-config {name} must be a number, got {value!r}"
            )
        defaults[name] = value
    return checked_defaults(defaults)


def _resolve(
    args: Namespace, name: str, say: Say, *, revision: str | None, load_format: Any
) -> Path:
    if not Path(name).expanduser().exists() and not name.startswith(("/", ".", "~")):
        say(f"looking for {name} on the hub")
    return resolve_model(
        name,
        revision=revision,
        cache_dir=None if args.download_dir is None else Path(args.download_dir).expanduser(),
        load_format=load_format,
        token=args.hf_token,
        with_code=args.trust_remote_code,
    )
