"""The tool that makes random checkpoints: what it writes loads, and its text is ASCII."""

from __future__ import annotations

import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from streamserve.models import find_mtp, load_config, load_model, load_mtp_head
from tests.interpreter import run_python
from tests.models.paged import PagedHarness, Sequence
from tools.make_checkpoint import (
    SHAPES,
    SPECIAL_TOKENS,
    make_tokenizer,
    write_checkpoint,
    write_config,
)

CPU = torch.device("cpu")
SCRIPT = "tools/make_checkpoint.py"
PARAMETERS = {
    "smollm-135m": 134_515_008,
    "qwen-0.5b": 494_032_768,
    "qwen3.5-0.8b": 752_393_024,
    "llama-1b": 1_235_814_400,
    "llama-8b": 8_030_261_248,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_checkpoint("tiny", directory)
    return directory


def test_the_script_writes_the_same_bytes_for_the_same_seed(tiny, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    for directory, seed in ((again, "0"), (other, "1")):
        done = run_python(SCRIPT, "tiny", str(directory), "--seed", seed)
        assert "of weights in" in done.stdout
    for file in tiny.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
    weights = "model.safetensors"
    assert (tiny / weights).read_bytes() != (other / weights).read_bytes()


def test_a_config_alone_is_enough_for_random_weights(tiny, kernels, tmp_path):
    run_python(SCRIPT, "tiny", str(tmp_path), "--config-only")
    written = {file.name for file in tmp_path.iterdir()}
    assert written == {file.name for file in tiny.iterdir()} - {"model.safetensors"}
    decoder = load_model(
        tmp_path, dtype=torch.float32, device=CPU, kernels=kernels, load_format="dummy"
    )
    assert PagedHarness(decoder).prefill([Sequence([3, 1, 4])], None)[0].shape[-1] == 1024


def test_it_loads_here_as_in_transformers(tiny, kernels, tmp_path):
    write_checkpoint("tiny", tmp_path, shard_mb=0)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    for directory in (tiny, tmp_path):
        decoder = load_model(directory, dtype=torch.float32, device=CPU, kernels=kernels)
        logits = PagedHarness(decoder).prefill([Sequence(tokens)], None)[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", PARAMETERS)
def test_the_shapes_are_those_of_the_real_models(shape, tmp_path):
    write_config(shape, tmp_path)
    config = load_config(tmp_path)
    # A tied head counts twice.
    tied = config.vocab_size * SHAPES[shape]["hidden_size"] if config.spec.tied_head else 0
    assert config.weight_bytes(torch.float32) // 4 - tied == PARAMETERS[shape]
    assert config.eos_token_ids == (config.vocab_size - 1, config.vocab_size - 3)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == (
        config.vocab_size
    )


@pytest.mark.parametrize("vocab_size", [1024, 49_152, 151_936])
def test_every_id_is_ascii_text_and_every_ascii_text_has_ids(vocab_size):
    tokenizer = make_tokenizer(vocab_size)
    assert tokenizer.get_vocab_size() == vocab_size
    pieces = tokenizer.decode_batch([[token] for token in range(vocab_size)])
    assert all(piece and piece.isascii() for piece in pieces)
    assert len(set(pieces)) == vocab_size
    every_byte = "".join(map(chr, range(128)))
    for text in (every_byte, string.printable, "The quick brown fox, 2024: it's *late*!\n\n\tWhy?"):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("naïve").ids) == "na??ve"


def test_a_guessable_checkpoint_goes_on_as_its_head_guesses_as_often_as_asked(tmp_path, kernels):
    write_checkpoint("tiny-qwen3.5", tmp_path, guessable=0.7)
    config = load_config(tmp_path)
    options = {"dtype": torch.float32, "device": CPU, "kernels": kernels, "config": config}
    target = load_model(tmp_path, **options)
    head = load_mtp_head(find_mtp(tmp_path, config), target)
    sequence = Sequence([5])
    harness = PagedHarness(target)
    harness.decode([sequence], harness.step([(sequence, 1)]), 200)
    tokens = sequence.tokens
    assert len(set(tokens)) == 201  # nothing comes twice, nor ends
    harness, shifted = PagedHarness(head), Sequence(tokens[1:-1])
    batch = harness.batch([(shifted, 199)], all_rows=True)
    with torch.inference_mode():
        states = torch.randn(199, head.spec.hidden_size)  # it makes nothing of them
        guesses, _ = head.guess(replace(batch, hidden_states=states), harness.caches)
    right = [a == b for a, b in zip(guesses.tolist(), tokens[2:], strict=True)]
    assert 0.68 < sum(right) / len(right) < 0.72
    assert (
        len({g for g, is_right in zip(guesses.tolist(), right, strict=True) if not is_right}) == 1
    )


def test_the_chat_template_opens_the_assistants_turn(tiny):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    messages = [{"role": "user", "content": "Hello there"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
    ids = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(text).ids
    assert ids.count(1023) == 1
    assert ids.count(1022) == 2
    assert len(SPECIAL_TOKENS) == 3
    assert tokenizer.eos_token_id == 1023
