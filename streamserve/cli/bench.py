"""``streamserve bench``: load tests, comparisons of servers, and an engine timed without HTTP."""

from __future__ import annotations

from argparse import Namespace


def run_bench(args: Namespace) -> int:
    """Run the tool with its own flags. Returns the exit code; raises ``StreamServeError``."""
    prog = f"streamserve bench {args.tool}"
    if args.tool == "serve":
        from streamserve_loadtest.cli import main

        return main(args.flags, prog=prog)
    if args.tool == "compare":
        from streamserve_loadtest.compare import main as compare

        return compare(args.flags, prog=prog)
    from streamserve.cli.bench_engine import run_latency, run_throughput

    run = run_latency if args.tool == "latency" else run_throughput
    return run(args.flags, prog=prog)
