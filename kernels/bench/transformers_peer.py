"""The same model run by transformers: `python kernels/bench/transformers_peer.py DIRECTORY`.

Random weights in the shape of the directory's config; only the config is read. With a static cache
(`--compile`: decode steps through torch.compile too), and by its continuous batching where it has
that. A step's time is what N tokens take longer than one, over N - 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from streamserve_kernels.machine import describe


@dataclass(frozen=True, slots=True)
class Load:
    """Equal requests, all at once."""

    batch_size: int
    input_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds; tokens per second are of the answers alone, prompts' time included."""

    how: str
    load: Load
    first_token_s: float
    step_s: float
    tokens_per_s: float


def main() -> int:
    """Returns 1 if a way of running the model failed."""
    args = _parser().parse_args()
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype)
    config = AutoConfig.from_pretrained(args.directory)
    torch.manual_seed(0)
    started = time.monotonic()
    with device, torch.inference_mode():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.eval()
    print(f"transformers {transformers.__version__}, {time.monotonic() - started:.1f} s to build")
    results: list[Measured] = []
    errors: dict[str, str] = {}
    for how, load, run in _ways(args, model):
        if time.monotonic() - started > args.limit:
            errors[f"{how} {load.batch_size}"] = f"not run: over the limit of {args.limit:g} s"
            continue
        try:
            results.append(measure(how, load, run, device))
        except Exception as error:
            errors[f"{how} {load.batch_size}"] = " ".join(f"{error!r}".split())[:300]
        else:
            print(line(results[-1]), flush=True)
        if args.json is not None:
            content = {"machine": describe(device), "transformers": transformers.__version__}
            content |= {"results": [asdict(r) for r in results], "errors": errors}
            args.json.write_text(json.dumps(content, indent=1) + "\n")
    for name, error in errors.items():
        print(f"{name}: {error}")
    return 1 if errors else 0


def measure(
    how: str, load: Load, run: Callable[[list[list[int]], int], None], device: torch.device
) -> Measured:
    """Both lengths once to warm up, then once to be timed."""
    run(_prompts(load), 1)
    run(_prompts(load), load.output_len)
    one = _seconds(run, load, 1, device)
    all_of_it = _seconds(run, load, load.output_len, device)
    return Measured(
        how,
        load,
        first_token_s=one,
        step_s=(all_of_it - one) / max(1, load.output_len - 1),
        tokens_per_s=load.batch_size * load.output_len / all_of_it,
    )


def line(measured: Measured) -> str:
    load = measured.load
    return (
        f"{measured.how:<16} {load.batch_size:>3} x {load.input_len} + {load.output_len}: "
        f"first token {1e3 * measured.first_token_s:.1f} ms, step {1e3 * measured.step_s:.2f} ms, "
        f"{measured.tokens_per_s:.1f} tokens/s"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="with a config.json")
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if has_gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if has_gpu else "float32")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--compile", action="store_true", help="the static cache compiled, too")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds; nothing starts later")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def _ways(
    args: argparse.Namespace, model: Any
) -> Iterator[tuple[str, Load, Callable[[list[list[int]], int], None]]]:
    loads = [Load(size, args.input_len, args.output_len) for size in args.batch_size]
    for load in loads:
        yield "static cache", load, lambda prompts, n: _static(model, prompts, n, False)
    if hasattr(model, "generate_batch"):
        for load in loads:
            yield "continuous", load, lambda prompts, n: _continuous(model, prompts, n)
    if args.compile:
        for load in loads:
            yield "static, compiled", load, lambda prompts, n: _static(model, prompts, n, True)


def _static(model: Any, prompts: list[list[int]], num_tokens: int, compiled: bool) -> None:
    ids = torch.tensor(prompts, device=model.device)
    with torch.inference_mode():
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_greedy(num_tokens),
            cache_implementation="static",
            disable_compile=not compiled,
        )
    _check(answer.shape[1] - ids.shape[1], num_tokens)


def _continuous(model: Any, prompts: list[list[int]], num_tokens: int) -> None:
    options = {}
    if model.device.type == "cpu":
        # Its own choice, by the memory that is free, has it clear all of that.
        blocks = len(prompts) * (2 + (len(prompts[0]) + num_tokens) // 256)
        options["continuous_batching_config"] = transformers.ContinuousBatchingConfig(
            num_blocks=blocks, max_batch_tokens=256
        )
    with torch.inference_mode():
        outputs = model.generate_batch(
            prompts, generation_config=_greedy(num_tokens, end=-1), **options
        )
    if len(outputs) != len(prompts):
        raise RuntimeError(f"{len(outputs)} of {len(prompts)} answers came back")
    for output in outputs.values():
        if output.error is not None:
            raise RuntimeError(output.error)
        _check(len(output.generated_tokens), num_tokens)


def _greedy(num_tokens: int, end: int | None = None) -> GenerationConfig:
    """Answers of exactly that length: no id ends them."""
    return GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=end, pad_token_id=0
    )


def _check(num_tokens: int, wanted: int) -> None:
    if num_tokens != wanted:
        raise RuntimeError(f"an answer has {num_tokens} tokens, not {wanted}")


def _prompts(load: Load) -> list[list[int]]:
    """New ones each time, so that no cache of prefixes helps; ids that any vocabulary has."""
    return torch.randint(1, 256, (load.batch_size, load.input_len)).tolist()


def _seconds(
    run: Callable[[list[list[int]], int], None], load: Load, num_tokens: int, device: torch.device
) -> float:
    prompts = _prompts(load)
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run(prompts, num_tokens)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
