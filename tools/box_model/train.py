"""Train Box from scratch on the CPU and write its files.

    python -m tools.box_model.train --work build/box --out streamserve/assets/box

Resumes from the last checkpoint in `--work`. `kill -STOP` and `-CONT` pause it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tools.box_model.dialogues import dialogue, plain_text
from tools.box_model.tokenizer import (
    CONTEXT,
    END_OF_TEXT,
    IM_END,
    VOCAB_SIZE,
    encode_dialogue,
    save,
    train_tokenizer,
)

SEED = 20
# Few padded lengths: each is compiled once. Rows per batch keep the tokens per step even.
LENGTHS = (64, 128, 256, 1024)
IGNORED = -100


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=704, num_hidden_layers=7,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, rms_norm_eps=1e-5, bos_token_id=None,
        eos_token_id=SPECIAL_IDS[IM_END], pad_token_id=SPECIAL_IDS[END_OF_TEXT],
    )


SPECIAL_IDS = {END_OF_TEXT: 0, IM_END: 2}


def batches(tokenizer: Tokenizer, tokens: int, first_pool: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(pool number, ids [B, T], labels [B, T]) for ever; rows of one batch have like lengths."""
    pool_number = first_pool
    while True:
        rng = Random(f"{SEED}-{pool_number}")
        groups: dict[int, list[tuple[list[int], list[bool]]]] = {length: [] for length in LENGTHS}
        for _ in range(6000):
            if rng.random() < 0.02:
                ids = [*tokenizer.encode(plain_text(rng)).ids, SPECIAL_IDS[END_OF_TEXT]]
                row = ids, [True] * len(ids)
            else:
                row = encode_dialogue(tokenizer, dialogue(rng))
            row = row[0][: LENGTHS[-1]], row[1][: LENGTHS[-1]]
            groups[next(length for length in LENGTHS if len(row[0]) <= length)].append(row)
        pool = []
        for length, entries in groups.items():
            count = tokens // length
            # A last, smaller batch is dropped: its shape would be compiled for nothing.
            pool += [(length, entries[i : i + count]) for i in range(0, len(entries) - count + 1, count)]
        rng.shuffle(pool)
        for length, entries in pool:
            ids_tensor = torch.full((len(entries), length), SPECIAL_IDS[END_OF_TEXT])
            labels = torch.full((len(entries), length), IGNORED)
            for i, (ids, learned) in enumerate(entries):
                row_ids = torch.tensor(ids)
                ids_tensor[i, : len(ids)] = row_ids
                labels[i, : len(ids)] = torch.where(torch.tensor(learned), row_ids, IGNORED)
            yield pool_number, ids_tensor, labels
        pool_number += 1


class Optimizers:
    """Muon for the matrices of the layers, AdamW for embeddings and norms; one learning rate."""

    def __init__(self, model: nn.Module) -> None:
        layers = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
        rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers" not in n]
        self.muon = torch.optim.Muon(layers, lr=1.0, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    def step(self, rate: float) -> None:
        for group in self.muon.param_groups:
            group["lr"] = 1.5 * rate
        for group in self.adamw.param_groups:
            group["lr"] = rate
        for optimizer in (self.muon, self.adamw):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, object]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load(self, state: dict[str, dict]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to 2% of the peak."""
    if step < 60:
        return peak * (step + 1) / 60
    done = min(1.0, (step - 60) / max(1, steps - 60))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    weights = LlamaForCausalLM(model.config).to(torch.bfloat16)
    weights.load_state_dict(model.state_dict())
    weights.generation_config = GenerationConfig(
        eos_token_id=[SPECIAL_IDS[IM_END], SPECIAL_IDS[END_OF_TEXT]],
        pad_token_id=SPECIAL_IDS[END_OF_TEXT], max_new_tokens=512, do_sample=False,
    )
    weights.save_pretrained(out)
    save(tokenizer, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and log")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--tokens", type=int, default=6144, help="tokens per step")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.set_num_threads(2)

    tokenizer_file = args.work / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(SEED).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    model = LlamaForCausalLM(config())
    optimizers = Optimizers(model)
    step, pool = 0, 0
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizers.load(saved["optimizers"])
        step, pool = saved["step"], saved["pool"] + 1
    body = model.model if args.no_compile else torch.compile(model.model, dynamic=False)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, from step {step}", flush=True)

    started, seen, total = time.monotonic(), 0, 0.0
    for pool, ids, labels in batches(tokenizer, args.tokens, pool):
        if step >= args.steps:
            break
        with torch.autocast("cpu", torch.bfloat16):
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state
            targets = labels[:, 1:]
            logits = model.lm_head(hidden[:, :-1][targets != IGNORED])
        loss = nn.functional.cross_entropy(logits.float(), targets[targets != IGNORED])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(learning_rate(step, args.steps, args.rate))
        step, seen, total = step + 1, seen + ids.numel(), total + loss.item()
        if step % 50 == 0:
            line = {"step": step, "loss": round(total / 50, 4), "pool": pool,
                    "tokens_per_s": round(seen / (time.monotonic() - started))}
            print(json.dumps(line), flush=True)
            total = 0.0
        if step % 250 == 0 or step == args.steps:
            temporary = checkpoint.with_suffix(".new")
            torch.save({"model": model.state_dict(), "optimizers": optimizers.state(),
                        "step": step, "pool": pool}, temporary)
            temporary.replace(checkpoint)
    export(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
