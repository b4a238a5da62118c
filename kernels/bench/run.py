"""Checks, then times, the kernels of a device: `python kernels/bench/run.py`.

On a GPU: every row is compared with its naive twin at the very shape that is then timed, and what
fails is not timed. The table says what a row must read or multiply at least, what that would take
at the rates measured first, and the share of it that the kernel reaches. `--tiny` rehearses all
rows at small shapes, on a CPU too (with TRITON_INTERPRET=1 also Triton's kernels).

On a CPU: `cpu.py`, with its own flags (`python kernels/bench/run.py --device cpu --help`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# What the server sets, and like it before torch loads libgomp: see "Waiting" in kernels/README.md.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from device_bench.measure import failures
from device_bench.table import (
    describe,
    markdown,
    replace_text,
    terminal_head,
    terminal_line,
    to_json,
)
from device_bench.worker import Options, Report, supervise, worker_main


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a row failed its check or raised."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--worker"]:
        return worker_main(arguments[1], int(arguments[2]))
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    first.add_argument("--tiny", action="store_true")
    where, rest = first.parse_known_args(arguments)
    if where.device == "cpu" and not where.tiny:
        import cpu

        cpu.main(rest)
        return 0
    return bench(parser().parse_args(arguments), where.device)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--device", help="(default: the GPU if there is one, else cpu)")
    made.add_argument("--backend", help="of the kernels (default: what the server would take)")
    made.add_argument("--dtype", help="(default: bfloat16, on a CPU float32)")
    made.add_argument("--only", default="", metavar="WORDS", help="rows with all of these words")
    made.add_argument("--quick", action="store_true", help="fewer rows, timed for less")
    made.add_argument("--rest", action="store_true", help="the rows that --quick leaves out")
    made.add_argument("--tiny", action="store_true", help="a rehearsal at small shapes")
    made.add_argument("--flex", action="store_true", help="flex attention too; it compiles long")
    made.add_argument("--row-timeout", type=float, default=60.0, metavar="S", help="of one row")
    made.add_argument("--limit", type=float, default=300.0, metavar="S", help="of the table")
    made.add_argument("--markdown", type=Path, metavar="FILE")
    made.add_argument("--json", type=Path, metavar="FILE")
    return made


def bench(args: argparse.Namespace, device: str) -> int:
    options = Options(
        device=device,
        backend=args.backend,
        dtype=args.dtype or ("float32" if device == "cpu" else "bfloat16"),
        tiny=args.tiny,
        quick=args.quick,
        flex=args.flex,
        only=args.only,
        rest=args.rest,
    )
    if not options.rows():
        print(f"no row has all of the words {args.only!r}", file=sys.stderr)
        return 2

    def show(report: Report) -> None:
        if not report.results:
            print("\n".join(describe(report)), flush=True)
            return
        *before, last = report.results
        if last.status == "SKIPPED":
            return  # counted at the end, and in the files
        if not before or before[-1].group != last.group:
            print(terminal_head(last.group))
        print(terminal_line(last), flush=True)
        # What ends this process early does not take the table with it.
        write(report)

    def write(report: Report) -> None:
        if args.markdown is not None:
            replace_text(args.markdown, markdown(report))
        if args.json is not None:
            replace_text(args.json, json.dumps(to_json(report), indent=1) + "\n")

    report = supervise(
        options,
        row_timeout_s=args.row_timeout,
        limit_s=args.limit,
        on_change=show,
        script=Path(__file__),
    )
    write(report)
    num_failed = failures(report.results)
    skipped = sum(result.status == "SKIPPED" for result in report.results)
    print(f"\n{len(report.results)} rows, {num_failed} failed, {skipped} not run")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
