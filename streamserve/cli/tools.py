"""Commands beside serving and chatting: their part of the command line."""

from __future__ import annotations

import argparse
from typing import Any


def add_tool_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """``bench`` and ``models``."""
    bench = commands.add_parser(
        "bench",
        help="load-test a server, compare servers, time an engine; `bench serve --help` says how",
        usage="%(prog)s {serve,compare,latency,throughput} [flags]",
    )
    bench.add_argument(
        "tool",
        choices=("serve", "compare", "latency", "throughput"),
        help="serve: play workloads against one server; compare: start several and take turns; "
        "latency: first tokens and decode steps of an engine in this process, without HTTP; "
        "throughput: many requests to such an engine",
    )
    bench.add_argument("flags", nargs=argparse.REMAINDER, metavar="...", help="of the tool")

    models = commands.add_parser(
        "models",
        help="list the families of models and what can be done with each",
        description="Lists the families of models and what can be done with each: architectures, "
        "kinds of layers, GGUF files, dtypes, quantisation, adapters.",
        usage="%(prog)s [NAME] [--json]",
        allow_abbrev=False,
    )
    models.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="a part of a family's, architecture's or type's name",
    )
    models.add_argument("--json", dest="as_json", action="store_true", help="for programs")
