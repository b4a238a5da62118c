"""``LLM("model.gguf")``: the answers of the directory that the file was made of."""

from __future__ import annotations

import json

import gguf
import torch
import transformers
from gguf import TokenType
from tokenizers import Tokenizer

from streamserve import LLM, SamplingParams
from tests.e2e.servers import SMALL
from tests.llm.conftest import SIZES, VOCAB_SIZE, _write_model
from tests.models.gguf_files import Kind, write_gguf
from tools.make_checkpoint import CHAT_TEMPLATE

VALUES = {
    "context_length": 512,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
}
CHAT = [{"role": "user", "content": "what is it"}]
GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=1)


def test_answers_are_those_of_the_same_weights_in_a_directory(tmp_path):
    directory, path = tmp_path / "model", tmp_path / "model-Q8_0.gguf"
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    _write_model(directory, config)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def text(writer: gguf.GGUFWriter) -> None:
        vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
        added = tokenizer.get_added_tokens_decoder()
        kinds = [
            TokenType.USER_DEFINED if n in added else TokenType.NORMAL for n in range(VOCAB_SIZE)
        ]
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(vocabulary)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(pair) for pair in merges])
        writer.add_eos_token_id(VOCAB_SIZE - 1)
        writer.add_chat_template(CHAT_TEMPLATE)

    write_gguf(path, model, "llama", VALUES, kind=lambda name: Kind.Q8_0, text=text)
    model.save_pretrained(directory)  # the weights that the file stands for
    answers = []
    for source in (directory, path):
        with LLM(str(source), **SMALL, kv_cache_memory="64MiB") as llm:
            answers.append(llm.chat(CHAT, GREEDY, use_tqdm=False)[0])
            asked = llm.get_tokenizer()
            rendered = asked.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
            assert asked(rendered)["input_ids"] == answers[-1].prompt_token_ids
    theirs, ours = answers
    assert ours.prompt_token_ids == theirs.prompt_token_ids
    # Products with packed weights may quantise their inputs: near ties may fall either way.
    pairs = zip(ours.outputs[0].token_ids, theirs.outputs[0].token_ids, strict=True)
    assert sum(a == b for a, b in pairs) >= 9
