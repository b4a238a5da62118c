"""The command line. The only reader of argv and the environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from streamserve.cli.args import parse_args
from streamserve.cli.environment import prepare_environment, tolerate_any_encoding
from streamserve.errors import StreamServeError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 refused (with a line why), 130 Ctrl-C."""
    prepare_environment()
    tolerate_any_encoding()
    try:
        args = parse_args(argv)
        if args.command == "serve":
            from streamserve.cli.serve import run_serve

            return run_serve(args)
        if args.command == "bench":
            from streamserve.cli.bench import run_bench

            return run_bench(args)
        if args.command == "models":
            from streamserve.cli.models import run_models

            return run_models(args)
        from streamserve.cli.chat import run_chat

        return run_chat(args)
    except StreamServeError as error:
        print(f"streamserve: {error}", file=sys.stderr)
        return 1
    except MemoryError as error:
        hint = "--kv-cache-memory asks for less, and `ulimit -v` shows the limit of a process"
        print(f"streamserve: not enough memory: {error}; {hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # A device thread may be inside torch: an orderly exit would tear it down there and abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)
