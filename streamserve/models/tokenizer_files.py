"""A tokenizer from whatever files a checkpoint has, where there is no ``tokenizer.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from streamserve.errors import ModelLoadError
from streamserve.models.slow_tokenizer import SlowTokenizer, load_slow
from streamserve.models.vocabularies import own_tokenizer

_PATTERNS = ("*token*", "vocab*", "merges*", "*.model", "*.tiktoken")
"""Without any such file there is nothing to make a tokenizer of."""


def tokenizer_backend(
    directory: Path, *, trust_remote_code: bool, slow: bool = False
) -> tokenizers.Tokenizer | SlowTokenizer:
    """A tokenizer of the directory's vocabulary, if its files are of a kind that is read here.

    Else what transformers makes of them; importing it takes a second. With ``slow`` it is
    transformers', or the checkpoint's own, in Python. Code that the checkpoint brings runs only if
    it is trusted, and only there. Raises ModelLoadError.
    """
    config = _config(directory)
    if slow:
        return load_slow(directory, config, trust_remote_code=trust_remote_code)
    own = own_tokenizer(directory, config)
    if own is not None:
        return own
    code = _own_code(config)
    if code is not None and not trust_remote_code:
        raise ModelLoadError(
            f"{directory} holds no tokenizer.json, and its tokenizer is code of its own ({code}), "
            "which runs only with --trust-remote-code"
        )
    if not any(found for pattern in _PATTERNS for found in directory.glob(pattern)):
        raise ModelLoadError(
            f"{directory} holds no tokenizer (no tokenizer.json, tokenizer.model or vocab.json): "
            "download the model's tokenizer files, too, or name its directory with --tokenizer"
        )
    from transformers import AutoTokenizer, PreTrainedTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # whatever the files, a library that lacks, or the code raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelLoadError(
            f"{directory} holds no tokenizer.json, and transformers makes no tokenizer of what "
            f"it has ({reason.rstrip(': ')}): download the model's tokenizer.json, too"
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, tokenizers.Tokenizer):
        return backend
    if isinstance(tokenizer, PreTrainedTokenizer):
        return SlowTokenizer(tokenizer)
    raise ModelLoadError(
        f"the tokenizer of {directory} ({type(tokenizer).__name__}) is neither one that can be "
        "written as a tokenizer.json nor transformers' own kind in Python: it is not served"
    )


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _own_code(config: dict[str, Any]) -> str | None:
    """The class that the checkpoint's own code defines, if its tokenizer is one."""
    try:
        entry = config["auto_map"]["AutoTokenizer"]
    except (KeyError, TypeError):
        return None
    names = entry if isinstance(entry, list) else [entry]
    return next((str(name) for name in names if name), None)
