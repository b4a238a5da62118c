"""How a checkpoint makes vectors of texts, by the files that sentence-transformers leaves in it.

``modules.json`` lists what comes after the model: a pooling, whose ``config.json`` says which, and
perhaps a normalisation, which here is the request's choice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from streamserve.config import EmbeddingConfig
from streamserve.errors import ModelLoadError, UnsupportedModelError

_MODES = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}
_INSTEAD = "--pooling last or mean sets it aside"


def read_embedding_config(
    directory: Path, size: int, *, pooling: str | None = None
) -> EmbeddingConfig:
    """What the files say; ``pooling``, if given, comes first. The model's states are ``size`` wide.

    Without such files it is the last token's state. Raises UnsupportedModelError, naming the file
    and the value, for what is not built, and ModelLoadError for a damaged file.
    """
    return EmbeddingConfig(
        pooling=pooling or _pooling(directory) or "last",
        size=size,
        matryoshka=_matryoshka(directory / "config.json"),
    )


def _pooling(directory: Path) -> str | None:
    modules = _read(directory / "modules.json")
    folder = "1_Pooling"
    for module in modules or ():
        if not isinstance(module, dict):
            raise ModelLoadError(f"{directory / 'modules.json'} must hold objects")
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            folder = str(module.get("path") or folder)
        elif kind not in ("Transformer", "Normalize"):
            raise UnsupportedModelError(
                f"{directory / 'modules.json'}: a module {kind!r} is not supported; {_INSTEAD}"
            )
    file = directory / folder / "config.json"
    values = _read(file)
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ModelLoadError(f"{file} must hold an object")
    named = [
        name for name, is_on in values.items() if name.startswith("pooling_mode_") and is_on is True
    ]
    if len(named) != 1 or named[0] not in _MODES:
        raise UnsupportedModelError(
            f"{file}: {', '.join(named) or 'no pooling mode'} is not supported; {_INSTEAD}"
        )
    return _MODES[named[0]]


def _matryoshka(file: Path) -> tuple[int, ...] | bool:
    values = _read(file) or {}
    sizes = values.get("matryoshka_dimensions")
    if isinstance(sizes, list) and all(isinstance(size, int) for size in sizes):
        return tuple(sizes)
    return values.get("is_matryoshka") is True


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):  # a checkpoint may be one file
        return None
    except ValueError as error:
        raise ModelLoadError(f"{file} is no JSON: {error}") from error
