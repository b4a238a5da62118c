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
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from tools.box_model.dialogues import dialogue, plain_text
from tools.box_model.muon import Muon
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
LONGEST = 1024
IGNORED = -100


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=SPECIAL_IDS[IM_END],
        pad_token_id=SPECIAL_IDS[END_OF_TEXT],
    )


SPECIAL_IDS = {END_OF_TEXT: 0, IM_END: 2}


Row = tuple[list[int], list[bool]]


def training_row(tokenizer: Tokenizer, rng: Random) -> Row:
    """Ids of one dialogue (or, one time in fifty, of a plain text), and which are learned."""
    if rng.random() < 0.02:
        ids = [*tokenizer.encode(plain_text(rng)).ids, SPECIAL_IDS[END_OF_TEXT]]
        return ids, [True] * len(ids)
    ids, learned = encode_dialogue(tokenizer, dialogue(rng))
    return ids[:LONGEST], learned[:LONGEST]


def batches(
    tokenizer: Tokenizer, tokens: int, pool: int, rank: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(pool number, ids [B, T], labels [B, T]) for ever, from pool number `pool` on.

    Rows of like length share a batch of about `tokens` tokens, so there is little padding and
    no packing: nothing of one dialogue is ever seen by another.
    """
    while True:
        rng = Random(f"{SEED}-{pool}-{rank}")
        rows = sorted((training_row(tokenizer, rng) for _ in range(4000)), key=lambda r: -len(r[0]))
        groups = []
        while rows:
            count = max(1, tokens // (-(-len(rows[0][0]) // 16) * 16))
            if len(rows) >= count:  # a batch of one row would be compiled anew
                groups.append(rows[:count])
            rows = rows[count:]
        rng.shuffle(groups)
        for group in groups:
            length = -(-max(len(ids) for ids, _ in group) // 16) * 16
            padded = torch.full((len(group), length), SPECIAL_IDS[END_OF_TEXT])
            labels = torch.full((len(group), length), IGNORED)
            for i, (ids, learned) in enumerate(group):
                row = torch.tensor(ids)
                padded[i, : len(ids)] = row
                labels[i, : len(ids)] = torch.where(torch.tensor(learned), row, IGNORED)
            yield pool, padded, labels
        pool += 1


class Optimizers:
    """Muon for the matrices of the layers, AdamW for embeddings and norms; one learning rate."""

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_parameters())
        self.muon = Muon([p for n, p in named if p.ndim == 2 and "layers" in n])
        rest = [p for n, p in named if p.ndim != 2 or "layers" not in n]
        self.adamw = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    def step(self, rate: float) -> None:
        self.muon.step(rate)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        return {"muon": self.muon.state(), "adamw": self.adamw.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.muon.load(state["muon"])
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
        pad_token_id=SPECIAL_IDS[END_OF_TEXT],
        max_new_tokens=512,
        do_sample=False,
    )
    weights.save_pretrained(out)
    save(tokenizer, out)


def average_gradients(model: nn.Module) -> None:
    """The mean gradient of all processes, in one message."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def train(rank: int, args: argparse.Namespace) -> None:
    """One of `args.processes` processes, each on one thread: they meet once per step.

    On a machine shared with other work this wastes far less than threads that meet at every
    matrix product.
    """
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(args.work / "store"), args.processes),
        rank=rank,
        world_size=args.processes,
        timeout=timedelta(hours=2),
    )
    tokenizer = Tokenizer.from_file(str(args.work / "tokenizer.json"))
    model = LlamaForCausalLM(config())
    optimizers = Optimizers(model)
    step, first_pool = 0, 0
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizers.load(saved["optimizers"])
        step, first_pool = saved["step"], saved["pool"] + 1
    body = model.model if args.no_compile else torch.compile(model.model, dynamic=True)
    if rank == 0:
        count = sum(p.numel() for p in model.parameters())
        print(f"{count:,} parameters, from step {step}", flush=True)

    started, seen, total = time.monotonic(), 0, 0.0
    for pool, ids, labels in batches(tokenizer, args.tokens, first_pool, rank):
        if step >= args.steps:
            break
        with torch.autocast("cpu", torch.bfloat16):
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state
            targets = labels[:, 1:]
            logits = model.lm_head(hidden[:, :-1][targets != IGNORED])
        loss = nn.functional.cross_entropy(logits.float(), targets[targets != IGNORED])
        loss.backward()
        average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(learning_rate(step, args.steps, args.rate))
        step, seen, total = step + 1, seen + int((ids != 0).sum()), total + loss.item()
        if rank == 0 and step % 20 == 0:
            rate = args.processes * seen / (time.monotonic() - started)
            line = {
                "step": step,
                "loss": round(total / 20, 4),
                "pool": pool,
                "tokens": args.processes * seen,
                "tokens_per_s": round(rate),
            }
            print(json.dumps(line), flush=True)
            total = 0.0
        if rank == 0 and (step % 100 == 0 or step == args.steps):
            temporary = checkpoint.with_suffix(".new")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizers": optimizers.state(),
                    "step": step,
                    "pool": pool,
                },
                temporary,
            )
            temporary.replace(checkpoint)
    if rank == 0:
        export(model, tokenizer, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and log")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--steps", type=int, default=3650)
    parser.add_argument("--tokens", type=int, default=3072, help="tokens per step and process")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "store").unlink(missing_ok=True)
    tokenizer_file = args.work / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(SEED).save(str(tokenizer_file))
    torch.multiprocessing.spawn(train, (args,), nprocs=args.processes)


if __name__ == "__main__":
    main()
