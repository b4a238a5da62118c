"""The tokens that end an answer and their like, as llama.cpp finds them in a GGUF file."""

from __future__ import annotations

from streamserve.models.gguf.metadata import Metadata

_PREFIX = "tokenizer.ggml."
# What ends a turn by its text, whatever the file says of it: files name one end, chats have two.
_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "<turn|>",
    "<|tool_response>",
)
_NAMED_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# SentencePiece's own numbers, for files that name none.
_SENTENCE_PIECE = {"bos": 1, "eos": 2, "unknown": 0}


def special_token_id(metadata: Metadata, name: str) -> int | None:
    """The id of ``bos``, ``eos``, ``unknown``, ``padding`` and the like; None if there is none."""
    found = metadata.optional_integer(f"{_PREFIX}{name}_token_id")
    if found is None and metadata.optional_text(_PREFIX + "model") == "llama":
        return _SENTENCE_PIECE.get(name)
    return found


def end_token_ids(metadata: Metadata) -> tuple[int, ...]:
    """Every id that ends an answer, those that the file names first."""
    tokens = metadata.texts(_PREFIX + "tokens")
    named = [special_token_id(metadata, "eos")]
    named += [metadata.optional_integer(_PREFIX + name) for name in _NAMED_ENDS[1:]]
    ends = [token for token in named if token is not None]
    found = {token: index for index, token in enumerate(tokens) if token in _ENDS}
    if "<|return|>" in found and "<|call|>" in found:
        found.pop("<|end|>", None)  # ends a channel there, not the answer
    ends += found.values()
    return tuple(dict.fromkeys(token for token in ends if 0 <= token < max(len(tokens), 1)))
