"""A tokenizer from whatever files a checkpoint has, where there is no ``tokenizer.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from streamserve.errors import ModelLoadError


def tokenizer_backend(directory: Path, *, trust_remote_code: bool) -> tokenizers.Tokenizer:
    """What transformers makes of the directory's vocabulary; importing it takes a second.

    Code that the checkpoint brings runs only if it is trusted. Raises ModelLoadError.
    """
    code = _own_code(directory)
    if code is not None and not trust_remote_code:
        raise ModelLoadError(
            f"{directory} holds no tokenizer.json, and its tokenizer is code of its own ({code}), "
            "which runs only with --trust-remote-code"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # whatever the files, a library that lacks, or the code raise
        raise ModelLoadError(
            f"{directory} holds no tokenizer.json, and transformers makes no tokenizer of what "
            f"it has: {error}"
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ModelLoadError(
            f"the tokenizer of {directory} ({type(tokenizer).__name__}) cannot be written as a "
            "tokenizer.json: only such are served"
        )
    return backend


def _own_code(directory: Path) -> str | None:
    """The class that the checkpoint's own code defines, if its tokenizer is one."""
    try:
        config = json.loads((directory / "tokenizer_config.json").read_bytes())
        entry = config["auto_map"]["AutoTokenizer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    names = entry if isinstance(entry, list) else [entry]
    return next((str(name) for name in names if name), None)
