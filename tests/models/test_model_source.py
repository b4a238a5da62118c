"""Where sampling defaults and tokenizers come from, and whose code runs."""

import json
import sys
from pathlib import Path

import pytest

from streamserve.cli.args import parse_args
from streamserve.cli.model_source import (
    box_path,
    model_directory,
    sampling_defaults,
    tokenizer_directory,
)
from streamserve.errors import ConfigError, ModelLoadError, UnsupportedModelError
from streamserve.models import load_config, tokenizer_backend
from tools.make_checkpoint import make_tokenizer, write_config


@pytest.fixture
def model(tmp_path):
    write_config("tiny", tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.6, "top_k": 20, "eos_token_id": 1022}))
    return tmp_path


def defaults(model, *flags):
    return sampling_defaults(parse_args(["serve", *flags]), load_config(model))


def test_defaults_are_the_models_or_openais_or_a_folders_and_can_be_overridden(model, tmp_path):
    assert defaults(model) == {"temperature": 0.6, "top_k": 20}
    assert defaults(model, "--generation-config", "vllm") == {}
    other = tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text('{"top_p": 0.5, "do_sample": true}')
    assert defaults(model, "--generation-config", str(other)) == {"top_p": 0.5}
    override = ["--override-generation-config", '{"top_k": 5, "min_p": 0.1}']
    assert defaults(model, *override) == {"temperature": 0.6, "top_k": 5, "min_p": 0.1}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--generation-config", "/nowhere"], "must be auto, vllm or a directory"),
        (["--override-generation-config", '{"max_new_tokens": 5}'], "only .*'max_new_tokens'"),
        (["--override-generation-config", '{"top_k": "5"}'], "top_k must be a number, got '5'"),
    ],
)
def test_what_is_no_default_is_refused(model, flags, message):
    with pytest.raises(ConfigError, match=message):
        defaults(model, *flags)


def test_the_model_in_the_box_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = parse_args(["serve", "box"])
    assert model_directory(args, print) == box_path()
    (tmp_path / "box").mkdir()
    assert model_directory(args, print) == Path("box")


def test_the_tokenizer_may_lie_elsewhere(tmp_path):
    args = parse_args(["serve", "--tokenizer", str(tmp_path)])
    assert tokenizer_directory(args, box_path(), print) == tmp_path
    assert tokenizer_directory(parse_args(["serve"]), box_path(), print) == box_path()


def test_a_checkpoints_code_runs_only_where_it_is_trusted(tmp_path, monkeypatch):
    """The tokenizer is a class in the directory; it says that it ran by writing a file."""
    modules = str(tmp_path / "modules")  # transformers copies such code before it runs it
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ran = tmp_path / "ran"
    backend = tmp_path / "vocabulary.json"
    make_tokenizer(512).save(str(backend))
    (tmp_path / "tokenization_mine.py").write_text(
        "from pathlib import Path\n"
        "from tokenizers import Tokenizer\n"
        "from transformers import PreTrainedTokenizerFast\n"
        f"Path({str(ran)!r}).touch()\n"
        "class MineTokenizer(PreTrainedTokenizerFast):\n"
        "    def __init__(self, **given):\n"
        f"        super().__init__(tokenizer_object=Tokenizer.from_file({str(backend)!r}))\n"
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "MineTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_mine.MineTokenizer", None]},
            }
        )
    )
    with pytest.raises(ModelLoadError, match=r"tokenization_mine.* only with --trust-remote-code"):
        tokenizer_backend(tmp_path, trust_remote_code=False)
    assert not ran.exists()
    tokenizer = tokenizer_backend(tmp_path, trust_remote_code=True)
    assert ran.exists()
    assert tokenizer.encode("hello").ids == make_tokenizer(512).encode("hello").ids


def test_a_vocabulary_without_code_needs_no_trust(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    vocabulary = json.loads(make_tokenizer(300).to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in vocabulary["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    tokenizer = tokenizer_backend(tmp_path, trust_remote_code=False)
    assert tokenizer.encode("th").ids == make_tokenizer(300).encode("th").ids


def test_no_tokenizer_at_all(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"holds no tokenizer \(no .*name its directory with"):
        tokenizer_backend(tmp_path, trust_remote_code=False)


def test_files_of_which_no_tokenizer_is_made(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"no tokenizer.json, and transformers makes no"):
        tokenizer_backend(tmp_path, trust_remote_code=False)


def test_a_models_own_code_is_not_run_unless_it_is_trusted(tmp_path):
    config = {"architectures": ["Mine"], "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="which runs with --trust-remote-code only"):
        load_config(tmp_path)
