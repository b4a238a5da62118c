"""Tokenizers that transformers has in Python only, or that a checkpoint brings as code.

transformers 5 makes a `tokenizers` object of nearly every vocabulary and reads ``use_fast`` no
more: what is in Python there are the classes that were never written otherwise (CTRL's, BioGPT's,
GPT-SW3's, ByT5's, …), and what repositories ship. Those are served as they are. They hold the
interpreter lock while they work, have no table of pieces, and their decoders may change the end of
a text when it goes on.
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamserve.errors import EngineError, InvalidParameterError, ModelLoadError


class SlowTokenizer:
    """The engine's `Tokenizer` over one of transformers' in Python.

    ``python_tokenizer`` is that object. Decoding leaves out ids without a token, and the cleaning
    of spaces that some classes do at the end: it would change what a reader was shown.
    """

    decodes_in_order = False

    def __init__(self, python_tokenizer: Any) -> None:
        self.python_tokenizer = python_tokenizer
        python_tokenizer.model_max_length = int(1e30)  # says it is too long, and is not asked
        self._lock = threading.Lock()
        vocabulary: dict[str | bytes, int] = {
            **python_tokenizer.get_vocab(),
            **python_tokenizer.get_added_vocab(),
        }
        self._tokens = {
            token_id: token.decode("utf-8", "replace") if isinstance(token, bytes) else token
            for token, token_id in vocabulary.items()
        }
        self._ids = {token: token_id for token_id, token in self._tokens.items()}
        self._vocab_size = 1 + max(self._tokens, default=-1)
        self._special = frozenset(python_tokenizer.all_special_ids).union(
            token_id
            for token_id, token in python_tokenizer.added_tokens_decoder.items()
            if token.special
        )
        self.special_tokens: dict[str, str] = {
            name: str(token)
            for name, token in python_tokenizer.special_tokens_map.items()
            if not isinstance(token, list | tuple)
        }

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def all_special_ids(self) -> frozenset[int]:
        return self._special

    def encode(self, text: str, *, add_special_tokens: bool, salt: str | None = None) -> list[int]:
        del salt  # nothing is remembered
        try:
            with self._lock:
                ids = self.python_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # whatever the class raises
            raise InvalidParameterError(
                "the tokenizer cannot encode this text", code="tokenizer_failed"
            ) from error
        return list(ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        known = [
            i for i in ids if i in self._tokens and not (skip_special_tokens and i in self._special)
        ]
        if not known:
            return ""
        try:
            with self._lock:
                text = self.python_tokenizer.decode(
                    known, skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
        except Exception as error:  # whatever the class raises
            raise EngineError("the tokenizer cannot decode these tokens") from error
        return str(text)

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """Of a part of a character, U+FFFD's."""
        return self.token_text(token_id).encode()

    def id_to_token(self, token_id: int) -> str:
        return self._tokens.get(token_id, "")

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's text, ``None`` if the vocabulary lacks it."""
        return self._ids.get(token)

    def pieces(self, *, skip_special_tokens: bool) -> None:
        """There is no table."""


def python_class(directory: Path, config: dict[str, Any], *, trust_remote_code: bool) -> Any:
    """The directory's tokenizer class in Python. Raises ModelLoadError: there is none.

    ``config`` is ``tokenizer_config.json``.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    code = _own_class(config)
    if code is not None:
        if not trust_remote_code:
            raise ModelLoadError(
                f"{directory}: its tokenizer in Python is code of its own ({code}), which runs "
                "only with --trust-remote-code"
            )
        return get_class_from_dynamic_module(code, str(directory))
    name = _class_name(directory, config)
    found = None if name is None else tokenizer_class_from_name(name.removesuffix("Fast"))
    # A name without a class of its own stands for the base.
    if (
        isinstance(found, type)
        and issubclass(found, transformers.PreTrainedTokenizer)
        and found is not transformers.PreTrainedTokenizer
    ):
        return found
    version = importlib.metadata.version("transformers")
    raise ModelLoadError(
        f"{directory}: transformers {version} has no tokenizer in Python for "
        f"{name or 'a checkpoint that names no tokenizer_class'}: leave --tokenizer-mode slow out"
    )


def load_slow(directory: Path, config: dict[str, Any], *, trust_remote_code: bool) -> SlowTokenizer:
    """Raises ModelLoadError where there is no tokenizer in Python, or it cannot be made."""
    try:
        found = python_class(directory, config, trust_remote_code=trust_remote_code)
        made = found.from_pretrained(
            str(directory), trust_remote_code=trust_remote_code, local_files_only=True
        )
        return SlowTokenizer(made)
    except ModelLoadError:
        raise
    except Exception as error:  # whatever the files, a library that lacks, or the code raise
        raise ModelLoadError(
            f"the tokenizer in Python of {directory} cannot be made: {error}"
        ) from error


def _own_class(config: dict[str, Any]) -> str | None:
    """The first of ``auto_map``'s two is the one in Python."""
    try:
        entry = config["auto_map"]["AutoTokenizer"]
    except (KeyError, TypeError):
        return None
    first = entry[0] if isinstance(entry, list) and entry else entry
    return str(first) if first else None


def _class_name(directory: Path, config: dict[str, Any]) -> str | None:
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    if config.get("tokenizer_class"):
        return str(config["tokenizer_class"])
    values, _ = transformers.PreTrainedConfig.get_config_dict(str(directory))
    named = values.get("tokenizer_class") or TOKENIZER_MAPPING_NAMES.get(
        str(values.get("model_type"))
    )
    return None if named is None else str(named)
