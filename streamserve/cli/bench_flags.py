"""The flags of ``streamserve bench latency`` and ``throughput``: the engine's, and the load."""

from __future__ import annotations

import argparse
from pathlib import Path

from streamserve.cli.args import CommandParser, add_engine_flags, add_model_flags
from streamserve.cli.values import integer, number, positive


def latency_parser(prog: str) -> CommandParser:
    """A batch of requests at a time, for every batch size and both lengths."""
    parser = _parser(
        prog,
        "Times an engine in this process, without HTTP: the first token of a batch of prompts, "
        "then the steps in which the whole batch decodes.",
    )
    group = parser.add_argument_group("load")
    group.add_argument(
        "--batch-size",
        nargs="+",
        type=positive,
        default=[1],
        metavar="N",
        help="requests at a time; several are tried in turn (default: 1)",
    )
    group.add_argument(
        "--input-len",
        nargs="+",
        type=positive,
        default=[128],
        metavar="N",
        help="tokens of a prompt (default: 128)",
    )
    group.add_argument(
        "--output-len",
        nargs="+",
        type=positive,
        default=[64],
        metavar="N",
        help="tokens of an answer (default: 64)",
    )
    group.add_argument(
        "--rounds", type=positive, default=1, metavar="N", help="with new prompts (default: 1)"
    )
    _add_common(group)
    return parser


def throughput_parser(prog: str) -> CommandParser:
    """Many requests at once."""
    parser = _parser(
        prog,
        "Has an engine in this process answer many requests as fast as it can, without HTTP.",
    )
    group = parser.add_argument_group("load")
    group.add_argument(
        "--num-requests", type=positive, default=100, metavar="N", help="(default: 100)"
    )
    group.add_argument(
        "--concurrency",
        type=positive,
        metavar="N",
        help="requests in the engine at a time (default: as many as may wait)",
    )
    group.add_argument(
        "--input-len", type=positive, default=128, metavar="N", help="(default: 128)"
    )
    group.add_argument("--output-len", type=positive, default=64, metavar="N", help="(default: 64)")
    group.add_argument(
        "--spread",
        type=_share,
        default=0.0,
        metavar="F",
        help="draw both lengths from within this share of them, 0 to 1 (default: 0)",
    )
    _add_common(group)
    return parser


def _parser(prog: str, description: str) -> CommandParser:
    parser = CommandParser(prog=prog, description=description, allow_abbrev=False)
    add_model_flags(parser)
    add_engine_flags(parser)
    return parser


def _add_common(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--temperature", type=number, default=0.0, metavar="T", help="(default: 0, greedy)"
    )
    group.add_argument("--seed", type=integer, default=0, help="the same seed, the same prompts")
    group.add_argument("--json", type=Path, metavar="FILE", help="write every number there")


def _share(text: str) -> float:
    value = number(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value
