"""Drafts on and off, in turns: how much sooner the same tokens come.

    python -m loadtest.speculation CHECKPOINT --streams 1 4 --rounds 5

Two engines in this process, one with ``--speculative-config`` (by default prompt lookup) and one
without, take turns answering the same prompts; only one works at a time. A stream's rate begins
with its first token, that of all together with the first of the first stream. The prompts are
random tokens, or with ``--text FILE`` pieces of a file; with ``--temperature 1`` hardly anything
repeats, which is what lookup may cost when it is of no use. Both engines are on one device: on a
GPU, ``--engine-flags`` must give each of them a KV cache of a size, as ``--kv-cache-memory 4GiB``
does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from streamserve.cli.args import check_flags, parse_args
from streamserve.cli.compose import Service, build_service
from streamserve.core.sampling_params import SamplingParams
from streamserve.engine.garbage import freeze_gc

SPECULATIVE = (
    '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2,'
    ' "prompt_lookup_max": 4}'
)


async def answer(
    service: Service, name: str, prompt: list[int], params: SamplingParams
) -> tuple[float, float, list[int]]:
    """When the first token came, and the last; all ids."""
    stream = service.engine.submit(prompt, params, request_id=name)
    token_ids: list[int] = []
    first = 0.0
    async for output in stream:
        first = first or time.perf_counter()
        token_ids += output.token_ids
    return first, time.perf_counter(), token_ids


async def play(
    service: Service, name: str, prompts: Sequence[list[int]], params: SamplingParams
) -> tuple[float, float, list[list[int]]]:
    """Tokens per second of all streams together and of one (their geometric mean); their ids."""
    answers = await asyncio.gather(
        *(answer(service, f"{name}-{i}", prompt, params) for i, prompt in enumerate(prompts))
    )
    seconds = max(last for _, last, _ in answers) - min(first for first, _, _ in answers)
    together = sum(len(ids) - 1 for _, _, ids in answers) / seconds
    each = [(len(ids) - 1) / (last - first) for first, last, ids in answers]
    return together, statistics.geometric_mean(each), [ids for _, _, ids in answers]


def prompts_of(
    service: Service, rng: random.Random, args: argparse.Namespace, count: int
) -> list[list[int]]:
    """New prompts of ``--input-len`` tokens."""
    if args.text is None:
        size = service.config.vocab_size
        return [[rng.randrange(size) for _ in range(args.input_len)] for _ in range(count)]
    ids = service.tokenizer.encode(args.text.read_text(), add_special_tokens=False)
    starts = [rng.randrange(max(len(ids) - args.input_len, 1)) for _ in range(count)]
    return [ids[start : start + args.input_len] for start in starts]


async def measure(services: Sequence[Service], args: argparse.Namespace) -> None:
    """Off, on, off, on … for each number of streams; prints medians, writes all ratios."""
    found: list[dict[str, object]] = []
    params = SamplingParams(
        temperature=args.temperature, max_tokens=args.output_len, ignore_eos=True, seed=1
    )
    for service in services:
        await service.engine.start()
    for num_streams in args.streams:
        rng = random.Random(num_streams)
        together: list[float] = []
        each: list[float] = []
        alone: list[float] = []
        num_equal = 0
        before = services[1].engine.stats()
        for index in range(args.rounds + 1):
            prompts = prompts_of(services[0], rng, args, num_streams)
            turns = [0, 1] if index % 2 else [1, 0]
            played = {
                i: await play(services[i], f"{num_streams}-{index}", prompts, params) for i in turns
            }
            off, on = played[0], played[1]
            if index:  # the first round warms up
                together.append(on[0] / off[0])
                each.append(on[1] / off[1])
                alone.append(off[1])
            num_equal += sum(a == b for a, b in zip(off[2], on[2], strict=True))
        stats = services[1].engine.stats()
        found.append(
            {
                "streams": num_streams,
                "tokens_per_second_off": alone,
                "stream_ratios": each,
                "total_ratios": together,
                "num_equal": num_equal,
                "num_answers": num_streams * (args.rounds + 1),
                "num_steps_on": stats.num_steps - before.num_steps,
                "num_tokens_on": stats.generation_tokens - before.generation_tokens,
            }
        )
        print(
            f"{num_streams:3} streams: a stream's tokens/s {statistics.median(alone):.1f} off, "
            f"{_spread(each)} times that on; of all together {_spread(together)}; "
            f"{num_equal} of {num_streams * (args.rounds + 1)} answers equal; "
            f"{stats.generation_tokens - before.generation_tokens} tokens in "
            f"{stats.num_steps - before.num_steps} steps, {stats.speculation}",
            flush=True,
        )
        if args.json is not None:
            args.json.write_text(json.dumps(found))
    for service in services:
        await service.engine.stop()


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.speculation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("checkpoint", nargs="?", help="default: the model in the box")
    parser.add_argument("--streams", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--text", type=Path, metavar="FILE")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--speculative-config", default=SPECULATIVE)
    parser.add_argument("--engine-flags", default="", metavar="'FLAGS'", help="of both engines")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    model = [] if args.checkpoint is None else [args.checkpoint]
    services = []
    for flags in ([], ["--speculative-config", args.speculative_config]):
        common = ["serve", *model, "--dtype", args.dtype, *args.engine_flags.split()]
        serve = parse_args([*common, *flags])
        check_flags(serve)
        services.append(build_service(serve, say=lambda line: None, warn=print))
        services[-1].finish_warm_up()
    freeze_gc()
    asyncio.run(measure(services, args))


if __name__ == "__main__":
    main()
