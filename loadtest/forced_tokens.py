"""Forced tokens on and off, in turns: how much sooner answers come that follow a schema.

    python -m loadtest.forced_tokens CHECKPOINT --streams 1 8 --rounds 8

Two engines in this process, of which one takes no notice of what a grammar leaves no choice about,
answer the same prompts in turns. The answers are arguments of a tool with six fields; every round
has seeds of its own. A stream's rate begins with its first token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

from loadtest.speculation import play
from streamserve.cli.args import check_flags, parse_args
from streamserve.cli.compose import Service, build_service
from streamserve.core.sampling_params import SamplingParams
from streamserve.core.structured_output import GrammarKind, StructuredOutput
from streamserve.engine.garbage import freeze_gc

SCHEMA = {
    "type": "object",
    "properties": {
        "location": {"type": "string", "maxLength": 20},
        "start_date": {"type": "string", "pattern": "^20[0-9]{2}-[01][0-9]-[0-3][0-9]$"},
        "number_of_days": {"type": "integer", "minimum": 1, "maximum": 14},
        "temperature_unit": {"enum": ["celsius", "fahrenheit"]},
        "include_wind_speed": {"type": "boolean"},
        "detail_level": {"enum": ["summary", "hourly", "complete"]},
    },
    "required": [
        "location", "start_date", "number_of_days", "temperature_unit", "include_wind_speed",
        "detail_level",
    ],
    "additionalProperties": False,
}  # fmt: skip


async def measure(services: Sequence[Service], args: argparse.Namespace) -> None:
    """Off, on, on, off … for each number of streams; prints medians of the ratios."""
    output = StructuredOutput(
        kind=GrammarKind.JSON_SCHEMA,
        text=json.dumps(SCHEMA),
        whitespace_pattern="" if args.no_white_space else None,
    )
    engines = [service.engine for service in services]
    for engine in engines:
        await engine.start()
        await engine.prepare(SamplingParams(structured_output=output))
    for num_streams in args.streams:
        rng = random.Random(num_streams)
        size = services[0].config.vocab_size
        alone: list[float] = []
        ratios: list[float] = []
        num_equal = 0
        before = [replace(s.stats(), speculation=replace(s.stats().speculation)) for s in engines]
        for index in range(args.rounds + 1):
            prompts = [[rng.randrange(size) for _ in range(64)] for _ in range(num_streams)]
            params = SamplingParams(
                temperature=args.temperature,
                max_tokens=300,
                seed=index,
                structured_output=output,
            )
            turns = [0, 1] if index % 2 else [1, 0]
            played = {
                i: await play(services[i], f"{num_streams}-{index}", prompts, params) for i in turns
            }
            if index:  # the first round warms up
                alone.append(played[0][1])
                ratios.append(played[1][1] / played[0][1])
            num_equal += sum(a == b for a, b in zip(played[0][2], played[1][2], strict=True))
        after = [engine.stats() for engine in engines]
        num_tokens = after[1].generation_tokens - before[1].generation_tokens
        forced = after[1].speculation.num_forced_tokens - before[1].speculation.num_forced_tokens
        steps = [a.num_steps - b.num_steps for a, b in zip(after, before, strict=True)]
        print(
            f"{num_streams:3} streams: a stream's tokens/s {statistics.median(alone):.1f} off, "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times that "
            f"on; {num_equal} of {num_streams * (args.rounds + 1)} answers equal; {num_tokens} "
            f"tokens, {forced} of them forced, in {steps[0]} steps off and {steps[1]} on",
            flush=True,
        )
    for engine in engines:
        await engine.stop()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.forced_tokens", description=__doc__.splitlines()[0]
    )
    parser.add_argument("checkpoint", nargs="?", help="default: the model in the box")
    parser.add_argument("--streams", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--no-white-space", action="store_true")
    parser.add_argument("--engine-flags", default="", metavar="'FLAGS'", help="of both engines")
    args = parser.parse_args()
    model = [] if args.checkpoint is None else [args.checkpoint]
    services = []
    for _ in range(2):
        serve = parse_args(["serve", *model, *args.engine_flags.split()])
        check_flags(serve)
        services.append(build_service(serve, say=lambda line: None, warn=print))
        services[-1].finish_warm_up()
    scheduler = services[0].engine._scheduler
    scheduler.guide = lambda request, find_forced: None  # type: ignore[method-assign]
    freeze_gc()
    asyncio.run(measure(services, args))


if __name__ == "__main__":
    main()
