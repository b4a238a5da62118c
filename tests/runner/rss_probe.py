"""Resident bytes as a runner is built and used: a line of JSON for each dtype that is named.

Each has a process of its own, forked from one that has imported everything.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from streamserve.core.plan import BlockCopy, NewRequest, ScheduledRequest, SchedulerOutput
from streamserve.core.sampling_params import SamplingParams
from streamserve.runner.build import build_runner
from tests.runner.tiny_llama import memory_for, tiny_llama

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
NUM_BLOCKS = 512
BLOCK_SIZE = 16
MAX_SEQS = 32
MAX_TOKENS = 256
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(top_p=0.9),
    SamplingParams(top_k=40, min_p=0.01),
    SamplingParams(repetition_penalty=1.1, logprobs=20, logit_bias={5: 1.0}),
]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def mixed_plan(
    step_id: int, rng: random.Random, live: list[str], text: list[int]
) -> SchedulerOutput:
    """Some decodes at any place and one prompt's chunk of any length, all of them new requests.

    Their tokens are some of ``text``.
    """
    plan = SchedulerOutput(step_id, released_ids=live[:])
    if rng.random() < 0.3:
        plan.block_copies.append(BlockCopy(1, 2))
    num_decodes = rng.randrange(MAX_SEQS)
    work = [(rng.randrange(1, 900), 1) for _ in range(num_decodes)]
    if rng.random() < 0.8:
        work.append((rng.randrange(600), rng.randrange(1, MAX_TOKENS - num_decodes)))
    live.clear()
    for i, (start, length) in enumerate(work):
        request_id = f"{step_id}-{i}"
        live.append(request_id)
        first = rng.randrange(len(text) - start - length)
        token_ids = text[first : first + start + length]
        plan.new_requests.append(
            NewRequest(request_id, token_ids, max(1, start - 5), rng.choice(PARAMS), i, 0)
        )
        blocks = rng.choices(range(NUM_BLOCKS), k=-(-len(token_ids) // BLOCK_SIZE))
        plan.scheduled.append(
            ScheduledRequest(request_id, start, token_ids[start:], blocks, rng.random() < 0.9, i)
        )
    return plan


def probe(dtype: torch.dtype, num_steps: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = tiny_llama(Path(directory), dtype=dtype, **SHAPE)
    memory = memory_for(
        model,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_model_len=1024,
        max_num_seqs=MAX_SEQS,
    )
    before = resident_bytes()
    runner, _ = build_runner(model, memory, max_num_batched_tokens=MAX_TOKENS)
    ready = resident_bytes()
    rng = random.Random(1)
    text = rng.choices(range(SHAPE["vocab_size"]), k=4096)
    live: list[str] = []
    sizes = []
    for step_id in range(num_steps):
        plan = mixed_plan(step_id, rng, live, text)
        runner.launch(plan)
        runner.sample(step_id).result(timeout=60)
        sizes.append(resident_bytes())
    runner.close()
    found = {
        "kv": memory.kv_bytes,
        "before": before,
        "ready": ready,
        "largest": max(sizes),
        "last": sizes[-1],
        "minor_faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt,
    }
    print(json.dumps(found), flush=True)


def main() -> None:
    num_steps, *dtypes = sys.argv[1:]
    torch.set_num_threads(1)
    for dtype in dtypes:
        if (child := os.fork()) == 0:
            status = 1
            try:
                probe(getattr(torch, dtype), int(num_steps))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    main()
