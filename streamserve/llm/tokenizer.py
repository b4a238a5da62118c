"""The tokenizer that a program asks for: transformers', with all its methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_transformers_tokenizer(directory: Path) -> Any:
    """Importing transformers takes seconds: nothing else here needs it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
