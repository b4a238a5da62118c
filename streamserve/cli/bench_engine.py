"""``streamserve bench latency`` and ``throughput``: a whole engine in one process, without HTTP."""

from __future__ import annotations

import asyncio
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from streamserve.cli.args import check_flags
from streamserve.cli.bench_flags import latency_parser, throughput_parser
from streamserve.cli.bench_floor import ModelCosts, measured_ceilings, model_costs
from streamserve.cli.bench_load import Answer, Load, gaps_between
from streamserve.cli.bench_report import (
    LatencyResult,
    ThroughputResult,
    latency_report,
    throughput_report,
)
from streamserve.cli.bench_steps import Spread, StepProbe, decode_steps
from streamserve.cli.compose import Service, build_service
from streamserve.cli.quantization import agreed_quantization
from streamserve.core.clock import monotonic
from streamserve.core.plan import ModelRunner
from streamserve.engine.garbage import freeze_gc
from streamserve.errors import ConfigError
from streamserve_kernels.ceilings import Ceilings
from streamserve_kernels.machine import describe
from streamserve_loadtest.cli import run_async

_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: an engine whose steps are written down, and what it could do at best."""

    service: Service
    probe: StepProbe
    costs: ModelCosts
    ceilings: Ceilings


def run_latency(flags: Sequence[str], prog: str) -> int:
    """Returns the exit code; raises ``StreamServeError``."""
    args = latency_parser(prog).parse(flags)
    shapes = list(product(args.batch_size, args.input_len, args.output_len))
    subject = build(args, shapes)

    async def measure() -> list[LatencyResult]:
        load = await start(subject, args)
        results = []
        for shape in shapes:
            results.append(await _latency(subject, load, *shape, args.rounds))
            print(latency_report(results[-1:]), flush=True)
            _write(args, subject, "latency", [result.to_json() for result in results])
        await subject.service.engine.stop()
        return results

    results = run_async(measure)
    if len(results) > 1:
        print(latency_report(results))
    return 0


def run_throughput(flags: Sequence[str], prog: str) -> int:
    """Returns the exit code; raises ``StreamServeError``."""
    args = throughput_parser(prog).parse(flags)
    input_len, output_len = (
        round(n * (1.0 + args.spread)) for n in (args.input_len, args.output_len)
    )
    subject = build(args, [(1, input_len, output_len)])

    async def measure() -> ThroughputResult:
        load = await start(subject, args)
        result = await _throughput(subject, load, args)
        await subject.service.engine.stop()
        return result

    result = run_async(measure)
    print(throughput_report(result))
    _write(args, subject, "throughput", [asdict(result)])
    return 0


def build(args: Namespace, shapes: Sequence[tuple[int, int, int]]) -> Subject:
    """Raises ``ConfigError`` for shapes that could not run, before anything is measured.

    `shapes` are (requests at once, tokens of a prompt, tokens of an answer).
    """
    check_flags(args)
    probes: list[StepProbe] = []

    def observed(runner: ModelRunner) -> ModelRunner:
        probes.append(StepProbe(runner))
        return probes[-1]

    service = build_service(args, say=_say, warn=_warn, observed=observed)
    service.finish_warm_up()
    for shape in shapes:
        _check_shape(service, *shape)
    ceilings = measured_ceilings(service)
    rate, dtype = ceilings.best_product
    _say(
        f"  measured      {ceilings.bandwidth / 1e9:.0f} GB/s, {rate / 1e12:.2f} TFLOP/s of {dtype}"
    )
    freeze_gc()
    stored = service.config.stored_quantization
    quantization = agreed_quantization(args.quantization, stored.name if stored else None)
    return Subject(service, probes[-1], model_costs(service, quantization), ceilings)


def _check_shape(service: Service, batch_size: int, input_len: int, output_len: int) -> None:
    """Raises ``ConfigError`` for what the engine would refuse, or could not run all at once."""
    memory = service.memory
    if input_len + output_len > service.max_model_len:
        raise ConfigError(
            f"--input-len and --output-len must be at most {service.max_model_len} together, "
            f"got {input_len} + {output_len}"
        )
    if batch_size > memory.max_num_seqs:
        raise ConfigError(
            f"--batch-size must be at most --max-num-seqs {memory.max_num_seqs}, got {batch_size}"
        )
    blocks = batch_size * -(-(input_len + output_len) // memory.block_size)
    if blocks > memory.num_blocks:
        raise ConfigError(
            f"the KV cache must hold {blocks} blocks for {batch_size} requests of "
            f"{input_len + output_len} tokens, it has {memory.num_blocks}: raise --kv-cache-memory"
        )


async def start(subject: Subject, args: Namespace) -> Load:
    """Start the engine and have it answer once."""
    service = subject.service
    await service.engine.start()
    load = Load(
        service.engine,
        vocab_size=service.config.vocab_size,
        temperature=args.temperature,
        seed=args.seed,
    )
    await load.answer(load.prompt(1), 1)
    return load


async def _latency(
    subject: Subject, load: Load, batch_size: int, input_len: int, output_len: int, rounds: int
) -> LatencyResult:
    """Each round asks for one token of new prompts, then for answers to the same ones.

    The second time the prefix cache has the prompts, so that all requests decode from the first
    steps on; without it their prompts are computed again.
    """
    first_tokens: list[float] = []
    answers: list[list[Answer]] = []
    await load.answers([load.prompt(input_len) for _ in range(batch_size)], _WARM_UP_TOKENS)
    begin, compiled = len(subject.probe.steps), subject.probe.num_compilations
    for _ in range(rounds):
        prompts = [load.prompt(input_len) for _ in range(batch_size)]
        first_tokens += [a.first_token_s for a in await load.answers(prompts, 1)]
        answers.append(await load.answers(prompts, output_len))
    steps = decode_steps(subject.probe.steps[begin:], batch_size)
    gaps = [gaps_between(of_round) for of_round in answers]
    return LatencyResult(
        batch_size=batch_size,
        input_len=input_len,
        output_len=output_len,
        first_token=Spread.of(first_tokens),
        prompt_floor_s=batch_size * subject.costs.prompt_s(input_len, subject.ceilings),
        steps=steps,
        decode_floor_s=subject.costs.decode_s(batch_size, steps.mean_keys, subject.ceilings),
        gaps=Spread.of([time for g in gaps for time in g.times]),
        num_merged=sum(g.num_merged for g in gaps),
        num_compilations=subject.probe.num_compilations - compiled,
    )


async def _throughput(subject: Subject, load: Load, args: Namespace) -> ThroughputResult:
    shapes = [
        (
            load.length_near(args.input_len, args.spread),
            load.length_near(args.output_len, args.spread),
        )
        for _ in range(args.num_requests)
    ]
    prompts = [load.prompt(input_len) for input_len, _ in shapes]
    seats = asyncio.Semaphore(args.concurrency or args.max_num_waiting)
    begin, engine = len(subject.probe.steps), subject.service.engine
    preemptions = engine.stats().num_preemptions

    async def ask(prompt: list[int], output_len: int) -> Answer:
        async with seats:
            return await load.answer(prompt, output_len)

    started = monotonic()
    answers = await asyncio.gather(
        *(ask(prompt, output_len) for prompt, (_, output_len) in zip(prompts, shapes, strict=True))
    )
    seconds = monotonic() - started
    steps = subject.probe.steps[begin:]
    durations = [step.duration_s for step in steps if step.duration_s is not None]
    return ThroughputResult(
        num_requests=len(answers),
        seconds=seconds,
        prompt_tokens=sum(len(prompt) for prompt in prompts),
        output_tokens=sum(answer.num_tokens for answer in answers),
        num_steps=len(steps),
        num_preemptions=engine.stats().num_preemptions - preemptions,
        busy=sum(durations) / seconds if durations else None,
        first_token=Spread.of([answer.first_token_s for answer in answers]),
    )


def _write(args: Namespace, subject: Subject, tool: str, results: list[dict[str, Any]]) -> None:
    if args.json is None:
        return
    content = {
        "tool": tool,
        "machine": describe(subject.service.device),
        "flags": {name: str(v) if name == "json" else v for name, v in vars(args).items()},
        "dtype": str(subject.service.dtype).removeprefix("torch."),
        "ceilings": asdict(subject.ceilings),
        "costs": {**asdict(subject.costs), "weight_bytes": subject.costs.weight_bytes(1)},
        "results": results,
    }
    args.json.write_text(json.dumps(content, indent=1) + "\n")


def _say(line: str) -> None:
    print(line, flush=True)


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)
