"""``streamserve models``, docs/models.md and the README's table say what the loader reads."""

from __future__ import annotations

import json
import re

import pytest

from streamserve.cli import main
from streamserve.cli.args import DTYPES
from streamserve.models.catalogue import THROUGH_TRANSFORMERS, native_entries
from streamserve.models.families import FAMILIES
from streamserve.models.gguf.architectures import ARCHITECTURES
from streamserve.models.gguf.kinds import served_kinds
from streamserve.models.loader import DTYPES as LOADED_DTYPES
from tests.interpreter import run_python
from tools.models_table import PAGE, README, render_page, render_readme


def test_the_files_are_up_to_date():
    advice = "run: python -m tools.models_table"
    assert PAGE.read_text(encoding="utf-8") == render_page(), advice
    text = README.read_text(encoding="utf-8")
    assert text == render_readme(text), advice


def test_the_page_of_gguf_names_all_that_is_read():
    page = (PAGE.parent / "gguf.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert named - {"general.architecture"} == set(ARCHITECTURES)
    [kinds] = re.findall(r"^## Kinds of weights\n\n(.*?), in any mixture", page, re.M | re.S)
    assert set(re.split(r"[,;]\s+", kinds)) == set(served_kinds())


def test_the_list_is_the_loaders():
    entries = {entry.architecture: entry for entry in native_entries()}
    assert set(entries) == set(FAMILIES)
    for name, held in ARCHITECTURES.items():
        for architecture in (held.family, *held.also):
            assert name in entries[architecture].gguf
    assert {"auto", *LOADED_DTYPES} == set(DTYPES)


@pytest.mark.parametrize(
    ("architecture", "has"),
    [
        ("LlamaForCausalLM", ()),
        ("GPT2LMHeadModel", ("learned positions",)),
        ("MixtralForCausalLM", ("sliding windows", "experts")),
        ("GptOssForCausalLM", ("sliding windows", "experts", "attention sinks")),
        ("BaichuanForCausalLM", ("ALiBi",)),
        ("Qwen2MoeForCausalLM", ("experts", "shared experts")),
        ("Gemma2ForCausalLM", ("sliding windows", "soft caps")),
        (
            "Qwen3_5ForCausalLM",
            ("query and key norms", "delta nets", "output gates", "multi-token prediction"),
        ),
    ],
)
def test_what_a_family_can_have_is_found_by_its_own_reading(architecture, has):
    [entry] = [entry for entry in native_entries() if entry.architecture == architecture]
    assert tuple(f for f in entry.features if f != "rotary positions") == has


def test_lora_is_told_by_the_names_that_peft_has():
    entries = {entry.architecture: entry.lora for entry in native_entries()}
    assert entries["MixtralForCausalLM"] == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert entries["GPT2LMHeadModel"] == ("c_attn", "c_proj", "c_fc")


def test_it_is_printed_without_torch():
    code = (
        "import sys; from streamserve.cli import main; main(['models', '--json']); "
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    done = run_python("-c", code)
    assert done.stderr.strip() == "set()"
    printed = json.loads(done.stdout)
    assert {entry["architecture"] for entry in printed["native"]} == set(FAMILIES)
    assert [entry["title"] for entry in printed["transformers"]] == [*THROUGH_TRANSFORMERS.values()]


def test_a_name_selects(capsys):
    assert main(["models", "qwen-3"]) == 0
    printed = capsys.readouterr().out
    assert "Qwen3ForCausalLM" in printed
    assert "Qwen3MoeForCausalLM" in printed
    assert "LlamaForCausalLM" not in printed
    assert main(["models", "granite"]) == 0
    assert "Granite 3 MoE" in capsys.readouterr().out


def test_names_and_flags_that_nobody_knows(capsys):
    assert main(["models", "llamma"]) == 1
    assert "no family has 'llamma' in its name (did you mean" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["models", "--jsno"])
    assert "unrecognized arguments: --jsno (did you mean --json?)" in capsys.readouterr().err
