"""Flags of llama.cpp's server, TGI and others: refused with the name that they have here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

_HERE: dict[str, tuple[str, ...]] = {
    "MODEL": ("-m", "-hf", "--hf-repo", "--model-id", "--model-path"),
    "--max-model-len": (
        *("-c", "--ctx-size", "--context-length"),
        *("--max-total-tokens", "--max-input-length", "--max-input-tokens"),
    ),
    "--max-num-seqs": ("-np", "--parallel", "--max-running-requests"),
    "--max-num-waiting": ("--max-concurrent-requests",),
    "--device": ("-ngl", "--gpu-layers", "--n-gpu-layers"),
    "--tensor-parallel-size": ("--num-shard", "--tp", "--tp-size"),
    "--quantization": ("--quantize",),
    "--served-model-name": ("-a", "--alias"),
    "--gpu-memory-utilization": ("--cuda-memory-fraction", "--mem-fraction-static"),
    "--host": ("--hostname",),
    "OMP_NUM_THREADS in the environment": ("-t", "--threads"),
}


def add_peer_flags(parser: argparse.ArgumentParser) -> None:
    """Let ``parser`` know them: alone, argparse takes ``-c`` for a longer flag's beginning."""
    for here, names in _HERE.items():
        parser.add_argument(*names, action=PeerAction, here=here)


class PeerAction(argparse.Action):
    """What the command line does with one of them."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, here: str) -> None:
        super().__init__(
            option_strings,
            argparse.SUPPRESS,
            nargs="?",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
        self.here = here

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        parser.error(f"{option_string} is another server's: here it is {self.here}")
