"""``streamserve bench``: the load test, and the comparison with other servers."""

from __future__ import annotations

from argparse import Namespace


def run_bench(args: Namespace) -> int:
    """Run the tool with its own flags. Returns the exit code; raises ``StreamServeError``."""
    prog = f"streamserve bench {args.tool}"
    if args.tool == "serve":
        from streamserve_loadtest.cli import main

        return main(args.flags, prog=prog)
    from streamserve_loadtest.compare import main as compare

    return compare(args.flags, prog=prog)
