"""``streamserve models``: which models there are, and what can be done with each. No torch."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from textwrap import wrap
from typing import Any

from streamserve.cli.args import DTYPES
from streamserve.cli.quantization import QUANTIZATIONS, STORED_METHODS
from streamserve.errors import ConfigError
from streamserve.models.catalogue import (
    THROUGH_TRANSFORMERS,
    Entry,
    native_entries,
    peculiarities,
    usual_rope_scaling,
)

# GGUF files are another kind of checkpoint, which only some families have.
CHECKPOINT_FORMATS = tuple(method for method in STORED_METHODS if method != "gguf")


def run_models(args: Namespace) -> int:
    """Print the list. Returns the exit code; raises ``ConfigError`` where nothing has the name."""
    entries, foreign = find_models(args.name)
    if args.as_json:
        print(json.dumps(as_json(entries, foreign), indent=2, ensure_ascii=False))
    else:
        sys.stdout.write(as_text(entries, foreign))
    return 0


def find_models(name: str | None) -> tuple[list[Entry], dict[str, str]]:
    """Native families, and those through transformers, that ``name`` is a part of a name of."""
    entries, foreign = native_entries(), dict(THROUGH_TRANSFORMERS)
    if name is None:
        return entries, foreign
    wanted = _plain(name)
    found = [e for e in entries if any(wanted in _plain(known) for known in _names(e))]
    others = {k: v for k, v in foreign.items() if wanted in _plain(k) or wanted in _plain(v)}
    if not found and not others:
        known = {_plain(n): n for entry in entries for n in _names(entry)}
        known |= {_plain(n): n for n in foreign}
        close = [known[match] for match in get_close_matches(wanted, known, 3)]
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise ConfigError(
            f"models: no family has {name!r} in its name{hint}. Without a name, all are listed; a "
            "model that is not may still run through transformers (docs/model_impl.md)"
        )
    return found, others


def as_json(entries: Sequence[Entry], foreign: dict[str, str]) -> dict[str, Any]:
    """The same for programs: everything about each family in its own entry."""
    both = {"dtypes": DTYPES, "quantization": QUANTIZATIONS}
    return {
        "native": [
            {**asdict(entry), **both, "checkpoint_formats": CHECKPOINT_FORMATS} for entry in entries
        ],
        "transformers": [
            {"model_type": kind, "title": title, **both, "checkpoint_formats": [], "lora": []}
            for kind, title in foreign.items()
        ],
    }


def as_text(entries: Sequence[Entry], foreign: dict[str, str]) -> str:
    """Two lines for each family, and what is the same for all of them at the end."""
    usual = usual_rope_scaling(native_entries())
    lines = []
    for entry in entries:
        gguf = f"GGUF {', '.join(entry.gguf)}" if entry.gguf else "no GGUF"
        lines += [f"{entry.title}: {entry.architecture}"]
        lines += _paragraph("; ".join([gguf, *peculiarities(entry, usual)]))
        if entry.text_of:
            lines += _paragraph(f"the text of {', '.join(entry.text_of)}")
    if entries:
        lines += ["", "Each of these, with a decoder of our own:"]
        for fact in _COMMON:
            lines += _paragraph(fact)
        lines += _paragraph(f"rope scaling {', '.join(usual)}, where nothing else is said")
    if foreign:
        lines += ["", "Through transformers (--model-impl auto):"]
        lines += _paragraph(f"{', '.join(foreign.values())}; {_FOREIGN}")
    return "\n".join(lines).lstrip() + "\n"


_COMMON = (
    f"--dtype {', '.join(DTYPES)}",
    f"--quantization {', '.join(QUANTIZATIONS)} while the weights are loaded",
    f"checkpoints in {', '.join(CHECKPOINT_FORMATS)}",
    "LoRA adapters on the linear layers of the blocks, experts aside",
)
_FOREIGN = (
    "and what else attends through transformers' attention interface. --dtype and --quantization "
    "as above; no LoRA, no GGUF, no checkpoints that are quantised already"
)


def _paragraph(text: str) -> list[str]:
    return wrap(text, 96, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)


def _names(entry: Entry) -> tuple[str, ...]:
    return (
        entry.title,
        entry.series,
        entry.architecture,
        entry.model_type,
        *entry.gguf,
        *entry.text_of,
    )


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
