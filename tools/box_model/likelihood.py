"""What quantised weights cost: the likelihood of right answers to held-out questions.

python -m tools.box_model.likelihood --model streamserve/assets/box

Each answer is fed behind its dialogue, through the kernels that serve, and the mean negative
log-likelihood of its tokens (with the end token) is compared between the precisions; the quantised
ones run in bfloat16.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import streamserve_kernels
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.tokenizer import FastTokenizer
from streamserve.models import Decoder, ForwardBatch, allocate_kv_cache, load_model
from streamserve_kernels import Quantization
from tools.box_model.heldout import BUILDERS, SYSTEM_TONE, held_out_sample

BLOCK_SIZE = 16
# What the weights are read as, and how they are quantised while they are loaded.
PRECISIONS: tuple[tuple[str, torch.dtype, Quantization | None], ...] = (
    ("float32", torch.float32, None),
    ("bfloat16", torch.bfloat16, None),
    ("int8", torch.bfloat16, "int8"),
    ("fp8", torch.bfloat16, "fp8"),
    ("int4", torch.bfloat16, "int4"),
)


@dataclass(frozen=True, slots=True)
class Answered:
    """A dialogue's ids with its answer's at the end; only the last `num_answer` are judged."""

    ids: list[int]
    num_answer: int


def answered_dialogues(folder: Path, count: int) -> list[Answered]:
    """`count` dialogues of each kind with an answer that does not depend on a tone."""
    tokenizer = FastTokenizer.from_directory(folder)
    template = ChatTemplate.from_directory(folder, special_tokens=tokenizer.special_tokens)
    dialogues = []
    for kind in BUILDERS:
        if kind == SYSTEM_TONE:
            continue
        for item in held_out_sample(kind, count, seed=11):
            prompt = tokenizer.encode(template.render(item.messages), add_special_tokens=False)
            answer = tokenizer.encode(item.answer + "<|im_end|>", add_special_tokens=False)
            dialogues.append(Answered(prompt + answer, len(answer)))
    return dialogues


@torch.inference_mode()
def answer_logits(decoder: Decoder, dialogue: Answered) -> Tensor:
    """Logits [num_answer, V] that each token of the answer is drawn from."""
    count = len(dialogue.ids) - 1
    blocks = -(-count // BLOCK_SIZE)
    caches = allocate_kv_cache(
        decoder.spec, blocks, BLOCK_SIZE, decoder.dtype, decoder.device, decoder.kernels
    )
    batch = ForwardBatch(
        input_ids=torch.tensor(dialogue.ids[:-1]),
        positions=torch.arange(count),
        slot_mapping=torch.arange(count),
        query_start_loc=torch.tensor([0, count], dtype=torch.int32),
        seq_lens=torch.tensor([count], dtype=torch.int32),
        block_table=torch.arange(blocks, dtype=torch.int32)[None],
        logits_indices=torch.arange(count - dialogue.num_answer, count),
    )
    return decoder.forward(batch, caches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60, help="dialogues per kind")
    options = parser.parse_args()
    device = torch.device("cpu")
    dialogues = answered_dialogues(options.model, options.count)
    tokens = sum(dialogue.num_answer for dialogue in dialogues)
    print(f"{len(dialogues)} dialogues, {tokens} tokens of answers")
    print("weights   weight MB  NLL/token  perplexity  same best token  mean |logit error|")
    reference: list[Tensor] = []
    for name, dtype, quantization in PRECISIONS:
        decoder = load_model(
            options.model,
            dtype=dtype,
            device=device,
            kernels=streamserve_kernels.load(device, dtype=dtype),
            quantization=quantization,
        )
        loss, same, error = 0.0, 0, 0.0
        for index, dialogue in enumerate(dialogues):
            logits = answer_logits(decoder, dialogue)
            targets = torch.tensor(dialogue.ids[-dialogue.num_answer :])
            loss += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            if dtype == torch.float32:
                reference.append(logits)
            same += int((logits.argmax(-1) == reference[index].argmax(-1)).sum())
            error += float((logits - reference[index]).abs().mean(-1).sum())
        mean = loss / tokens
        print(
            f"{name:<10}{decoder.nbytes / 1e6:>9.2f}{mean:>11.4f}"
            f"{math.exp(mean):>12.4f}{same / tokens:>17.2%}{error / tokens:>20.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
