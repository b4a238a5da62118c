"""Texts and directories for the tests of vocabularies that are no ``tokenizer.json``."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import strategies as st

from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.detokenizer import IncrementalDetokenizer
from streamserve.engine.tokenizer import FastTokenizer
from streamserve.models import tokenizer_backend

CORPUS = [
    "Hello there, how are you today? I am fine, thank you very much. What's 12345 + 678?",
    "你好，世界！今天天气怎么样？我很好，谢谢你。日本語のテキスト。",
    "Ünïcödé wörds, naïve café, Straße; Привет, мир!  two  spaces   three\n\nlines\tand tabs",
    "def f(x):\n    return x ** 2  # code\n        deeper\n",
]
_KNOWN = [word for line in CORPUS for word in line.split()]
_EDGES = [
    "<eoh>",
    "ab",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "▁",
    " the",
    "<0x41>",
    "e\u0301",
]
# Anything, with what a vocabulary knows more often than chance would have it.
texts = st.lists(
    st.one_of(st.text(max_size=6), st.sampled_from(_EDGES), st.sampled_from(_KNOWN)), max_size=8
).map("".join)


def write_config(directory: Path, name: str, **config) -> None:
    """As a repository has it whose tokenizer is the class ``name`` of its own code."""
    auto = {"AutoTokenizer": [f"tokenization_it.{name}", None]}
    config = {"tokenizer_class": name, "auto_map": auto, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def read(directory: Path) -> FastTokenizer:
    return FastTokenizer.from_directory(
        directory, backend=tokenizer_backend(directory, trust_remote_code=False)
    )


def streamed(tokenizer: FastTokenizer, prompt: list[int], ids: list[int]) -> str:
    """What a reader gets of ``ids``, which come one by one behind ``prompt``."""
    params = SamplingParams(skip_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, params)
    return "".join(detokenizer.add([token]) for token in ids) + detokenizer.finish()
