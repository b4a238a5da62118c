"""The tokenizer that a program asks for: transformers', with all its methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamserve.config import TextFiles
from streamserve.engine.tokenizer import Tokenizer


def python_tokenizer(tokenizer: Tokenizer) -> Any | None:
    """The one of transformers that the engine itself uses; None where it uses none."""
    return getattr(tokenizer, "python_tokenizer", None)


def load_transformers_tokenizer(path: Path, files: TextFiles | None = None) -> Any:
    """Of a checkpoint's directory, or of ``files`` in its place.

    Importing transformers takes seconds: nothing else here needs it.
    """
    import transformers

    if files is None:
        return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(files.tokenizer)
    make: Any = transformers.PreTrainedTokenizerFast
    return make(tokenizer_object=backend, **files.config)
