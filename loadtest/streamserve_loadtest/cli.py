"""The load test's command line.

python -m loadtest W1 W2 --url http://127.0.0.1:8000          in a checkout
streamserve bench serve W1 W2 --url http://127.0.0.1:8000     once installed
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from streamserve_loadtest.arrivals import ARRIVALS
from streamserve_loadtest.client import Target, first_model
from streamserve_loadtest.drive import Driver, Progress, warm_up
from streamserve_loadtest.prompts import ExactPrompts, PromptMaker, WordPrompts
from streamserve_loadtest.records import Run
from streamserve_loadtest.stats import summarize
from streamserve_loadtest.terminal import workload_report
from streamserve_loadtest.workloads import (
    LARGER_MODEL,
    SMALL_MODEL,
    WORKLOADS,
    ClosedLoop,
    Group,
    Kind,
    OpenLoop,
    Turn,
    Workload,
)

_CUSTOM = "custom"
T = TypeVar("T")


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m loadtest") -> int:
    """Run the load test; 0 if no request failed, 1 otherwise."""
    args = build_parser(prog).parse_args(argv)
    workloads = chosen_workloads(args)
    try:
        model = args.model or first_model(args.url, args.api_key)
    except OSError as error:
        print(f"{args.url} cannot be asked for its models: {error}", file=sys.stderr)
        return 1
    prompts = make_prompts(args.tokenizer, model)
    target = Target(args.url, model, args.api_key, args.extra_body)
    runs: list[Run] = []
    for workload in workloads:
        first = run_async(partial(warm_up, target, workload, prompts))
        if first.error:
            print(f"{args.url} cannot be tested: {first.error}", file=sys.stderr)
            return 1
        for round_number in range(args.rounds):
            for step, rate in steps_of(workload):
                driver = Driver(
                    target,
                    step,
                    prompts,
                    seed=args.seed,
                    round_number=round_number,
                    timeout_s=args.timeout,
                    on_progress=progress_line(label_of(workload, round_number, rate)),
                )
                runs.append(run_async(partial(driver.run, args.url, rate)))
        clear_line()
        limits = workload.limits
        summaries = [summarize(run, limits) for run in runs if run.workload == workload.name]
        print(workload_report(summaries, workload.name, workload.title), end="\n\n")
    write_reports(runs, workloads, args.json, args.html, title=f"{model} at {args.url}")
    return 1 if any(record.error for run in runs for record in run.records) else 0


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Plays workloads against an OpenAI-compatible chat server and reports "
        "latencies as a reader sees them.",
        epilog="workloads: " + "; ".join(f"{w.name} {w.title}" for w in WORKLOADS.values()),
    )
    parser.add_argument(
        "workloads", nargs="*", metavar="WORKLOAD", help="W1 to W6, or custom (default: W1)"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="(default: %(default)s)")
    parser.add_argument("--model", help="(default: the first that the server lists)")
    parser.add_argument("--api-key", metavar="KEY", help="bearer token")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="the checkpoint's directory, for prompts of exact lengths (default: the model's name, "
        "if that is a directory; without one a word stands for a token)",
    )
    add_run_flags(parser)
    custom = parser.add_argument_group("the workload called custom")
    custom.add_argument("--prompt-tokens", type=int, default=64, metavar="N")
    custom.add_argument("--output-tokens", type=int, default=64, metavar="N")
    custom.add_argument("--prefix-tokens", type=int, default=0, metavar="N", help="shared by all")
    custom.add_argument("--turns", type=int, default=1, metavar="N", help="of a conversation")
    custom.add_argument("--clients", type=int, default=8, metavar="N", help="of a closed loop")
    custom.add_argument("--conversations", type=int, default=4, metavar="N", help="of each client")
    custom.add_argument("--arrivals", choices=ARRIVALS, help="an open loop instead, at --rates")
    custom.add_argument("--burst-size", type=int, default=8, metavar="N")
    custom.add_argument("--cancel-share", type=float, default=0.0, metavar="F", help="0 to 1")
    custom.add_argument("--cancel-after", type=int, default=8, metavar="N", help="tokens")
    return parser


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """What the load test and the comparison have in common."""
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="new prompts in each")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same load")
    parser.add_argument(
        "--extra-body",
        type=fields_of,
        default={},
        metavar="JSON",
        help='fields of each request: \'{"temperature": 0.7, "top_p": 0.8}\' (greedy without)',
    )
    parser.add_argument(
        "--rates", type=float, nargs="+", metavar="R", help="conversations/s of W6's open loop"
    )
    parser.add_argument("--duration", type=float, metavar="S", help="of an open loop at each rate")
    parser.add_argument(
        "--limits",
        choices=("small", "larger"),
        help="when a request of W6 is good: first token within 0.5 s and inter-token p99 within "
        "100 ms (small, the default), or 1.5 s and 250 ms",
    )
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="of one request (default: 300)"
    )
    parser.add_argument(
        "--json", type=writable_file, metavar="FILE", help="write every request's times"
    )
    parser.add_argument(
        "--html", type=writable_file, metavar="FILE", help="write a report with plots"
    )


def fields_of(text: str) -> dict[str, Any]:
    """A JSON object. Raises argparse.ArgumentTypeError."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text}")
    return fields


def chosen_workloads(args: argparse.Namespace) -> list[Workload]:
    """The named workloads with the flags applied. Exits with a usage line for another name."""
    chosen = []
    for name in args.workloads or ["W1"]:
        if name == _CUSTOM:
            workload = custom_workload(args)
        elif name.upper() in WORKLOADS:
            workload = WORKLOADS[name.upper()]
        else:
            known = ", ".join((*WORKLOADS, _CUSTOM))
            raise SystemExit(f"there is no workload {name!r}; known are {known}")
        if args.rates and workload.rates:
            workload = replace(workload, rates=tuple(sorted(args.rates)))
        if args.duration and workload.rates:
            workload = workload.lasting(args.duration)
        if args.limits and workload.limits:
            limits = SMALL_MODEL if args.limits == "small" else LARGER_MODEL
            workload = replace(workload, limits=limits)
        chosen.append(workload)
    return chosen


def custom_workload(args: argparse.Namespace) -> Workload:
    """A workload of one group, from the flags."""
    turns = (Turn(args.prompt_tokens, args.output_tokens),) * args.turns
    kind = Kind("custom", turns, args.prefix_tokens)
    load: ClosedLoop | OpenLoop = ClosedLoop(args.clients, args.conversations)
    rates: tuple[float, ...] = ()
    if args.arrivals:
        load = OpenLoop(args.arrivals, 1.0, 30.0, args.burst_size)
        rates = (1.0,)
    group = Group(
        "custom",
        (kind,),
        load,
        cancel_share=args.cancel_share,
        cancel_after=args.cancel_after,
    )
    limits = SMALL_MODEL if rates else None
    return Workload(_CUSTOM, "as the flags say", (group,), rates=rates, limits=limits)


def steps_of(workload: Workload) -> list[tuple[Workload, float | None]]:
    """The workload itself, or one for each of its rates."""
    if not workload.rates:
        return [(workload, None)]
    return [(workload.at_rate(rate), rate) for rate in workload.rates]


def label_of(workload: Workload, round_number: int, rate: float | None, server: str = "") -> str:
    """What a progress line begins with."""
    at_rate = "" if rate is None else f" at {rate:g}/s"
    of_server = f" {server}" if server else ""
    return f"{workload.name}{at_rate} round {round_number + 1}{of_server}"


def make_prompts(tokenizer: Path | None, model: str) -> PromptMaker:
    """Exact prompts if a tokenizer is at hand. Raises ``ModelLoadError`` for an unreadable one."""
    if tokenizer is None and (Path(model) / "tokenizer.json").is_file():
        tokenizer = Path(model)
    return WordPrompts() if tokenizer is None else ExactPrompts.from_directory(tokenizer)


def progress_line(label: str) -> Progress | None:
    """A line that is written over every second; nothing if nobody watches."""
    if not sys.stderr.isatty():
        return None
    started = time.monotonic()

    def show(num_ended: int, num_chunks: int) -> None:
        elapsed = time.monotonic() - started
        text = f"{label}: {elapsed:.0f} s, {num_ended} requests ended, {num_chunks} chunks"
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    return show


def clear_line() -> None:
    """Take the progress line away."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def run_async(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine on the fastest event loop there is."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(make())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(make())


def writable_file(text: str) -> Path:
    """A report's path, known to be writable before hours are spent on what it is to say."""
    path = Path(text)
    try:
        with path.open("a"):
            pass
    except OSError as exc:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {exc.strerror}") from exc
    return path


def write_reports(
    runs: list[Run],
    workloads: Sequence[Workload],
    json_path: Path | None,
    html_path: Path | None,
    *,
    title: str,
    notes: dict[str, Any] | None = None,
) -> None:
    """Write what was asked for."""
    limits = {workload.name: workload.limits for workload in workloads}
    summaries = [summarize(run, limits[run.workload]) for run in runs]
    content = {
        "title": title,
        "written_at": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        **(notes or {}),
        "workloads": {workload.name: workload.title for workload in workloads},
        "summaries": summaries,
        "runs": [run.to_json() for run in runs],
    }
    if json_path is not None:
        json_path.write_text(json.dumps(content) + "\n")
        print(f"wrote {json_path}")
    if html_path is not None:
        from streamserve_loadtest.html import html_report

        html_path.write_text(html_report(content))
        print(f"wrote {html_path}")


if __name__ == "__main__":
    sys.exit(main())
