"""Write what can be served, into ``docs/models.md`` and into the list of the README.

    python -m tools.models_table

It is made from what `streamserve models` says, which is what the loader reads. A test compares the
files with what this makes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from textwrap import fill

from streamserve.cli.args import DTYPES
from streamserve.cli.models import CHECKPOINT_FORMATS
from streamserve.cli.quantization import QUANTIZATIONS
from streamserve.models.catalogue import (
    THROUGH_TRANSFORMERS,
    native_entries,
)
from tools.api_table import markdown_table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- by tools/models_table.py -->\n", "<!-- end -->\n"
_README_WIDTH = 108

_INTRO = """# What can be served

Made by `python -m tools.models_table` from what the loader reads; a test keeps it in step.
`streamserve models` prints the same, `streamserve models NAME` the part of it that you look for,
and `--json` everything for programs.

A checkpoint's `config.json` names an architecture; fine-tunes have that of the model they began as.
All below are served by one decoder of our own. Of checkpoints that have parts for pictures or sound
beside it, the text is served ([model_impl.md](model_impl.md)).

"""

_CHECKED = """
## How each row is checked

On random weights, against transformers, or against a plain model of our own where transformers
has none, by `tests/runner/test_families.py`: the model runs behind the real scheduler, cache
manager and runner. Prompts come in chunks, beside others that are being answered, behind prefixes
that are cached up to a block's end or its middle, and once more after preemptions.
Log-probabilities of the 20 likeliest tokens are compared at every row of a prompt and at every
token of the answers, and each of 32 greedy tokens with the judge's. A test fails where a row has
no case, or no case has what the row says. GGUF files and quantised checkpoints have tests of
their own ([gguf.md](gguf.md), [quantization.md](quantization.md)).

Frequencies that transformers changes with the length of a text (dynamic NTK, Qwen 1's too;
LongRoPE: Phi 3's 128k) are fixed here for `--max-model-len`, since keys in the cache cannot be
turned again: within the trained length they are the short ones, else the long ones for all.
"""


def render_page() -> str:
    """``docs/models.md``."""
    entries = native_entries()
    rows = (
        (
            entry.title,
            f"`{entry.architecture}`",
            f"`{entry.model_type}`",
            _codes(entry.gguf),
            ", ".join(entry.features),
            ", ".join(entry.rope_scaling),
            _codes(entry.lora),
            _codes(entry.text_of),
        )
        for entry in entries
    )
    head = (
        "models",
        "architecture",
        "`model_type`",
        "GGUF",
        "has",
        "rope scaling",
        "LoRA",
        "text of",
    )
    common = f"""
**All of these**: `--dtype` {_codes(DTYPES)}; `--quantization` {_codes(QUANTIZATIONS)} while the
weights are loaded; checkpoints in {", ".join(CHECKPOINT_FORMATS)}
([quantization.md](quantization.md)); LoRA adapters on the modules named, as PEFT's
`target_modules` name them ([lora.md](lora.md)).

**Through transformers** ([model_impl.md](model_impl.md)): any model that it builds and that attends
through its attention interface, with the same `--dtype` and `--quantization`; no LoRA, no GGUF, no
checkpoints that are quantised already. What cannot run so is refused with the reason. Checked are
{", ".join(THROUGH_TRANSFORMERS.values())}.
"""
    return _INTRO + markdown_table(head, list(rows)) + common + _CHECKED


def render_readme(text: str) -> str:
    """The README with its list made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{_readme_list()}{END}{after}"


def _readme_list() -> str:
    entries = native_entries()
    names = dict.fromkeys(entry.title for entry in entries)
    without = dict.fromkeys(entry.title for entry in entries if not entry.gguf)
    parts = sum(len(entry.text_of) for entry in entries)
    foreign = ", ".join(THROUGH_TRANSFORMERS.values())
    said = (
        f"**Native**: {'; '.join(names)}. All of these but {', '.join(without)} are read from GGUF "
        f"files too, and of {parts} architectures with parts for pictures or sound the text is "
        "served.",
        f"**Through transformers**: {foreign}, …",
    )
    return "\n\n".join(fill(text, _README_WIDTH, break_long_words=False) for text in said) + "\n"


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
    README.write_text(render_readme(README.read_text(encoding="utf-8")), encoding="utf-8")
