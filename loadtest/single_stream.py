"""One stream against the memory floor, and the first byte of an answer.

    python -m loadtest.single_stream /tmp/ckpt/smollm-135m --rounds 5

Starts ``streamserve serve`` on the checkpoint and, round by round, measures in turn

* the read bandwidth that two threads reach over a buffer far larger than the caches,
* tokens per second of one stream (64 in, 128 out, greedy, ``ignore_eos``), counted by ``usage`` and
  timed from the first content byte to the last, so that prefill is not in it,
* the time from sending a request to its first content byte (a fresh 50-token prompt, idle server).

The floor of a decode step is the bytes of the weights it must read, divided by that bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from streamserve_loadtest.floor import num_weights, read_bandwidth

PROMPT_TOKENS = 64
FIRST_BYTE_PROMPT_TOKENS = 50
OUTPUT_TOKENS = 128


@dataclass(frozen=True)
class Round:
    """One round's figures."""

    read_gb_s: float
    tokens_per_s: float
    first_byte_ms: float


def stream_once(
    client: httpx.Client, prompt: list[int], max_tokens: int
) -> tuple[float, float, int]:
    """Seconds to the first content byte, seconds from it to the last, completion tokens."""
    body = {
        "model": "bench",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = time.perf_counter()
    first = last = 0.0
    num_tokens = 0
    with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            now = time.perf_counter()
            chunk = json.loads(line[6:])
            if chunk["choices"] and chunk["choices"][0]["text"]:
                first = first or now
                last = now
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
    return first - start, last - first, num_tokens


def measure(url: str, vocab_size: int, rounds: int) -> list[Round]:
    """Run the rounds; prompts are new in each, so that no prefix is cached."""
    rng = np.random.default_rng(0)
    buffer = np.ones(2**27, dtype=np.float32)
    figures = []
    with httpx.Client(base_url=url, timeout=600) as client:
        for index in range(rounds + 1):
            bandwidth = read_bandwidth(buffer)
            prompt = rng.integers(256, vocab_size, PROMPT_TOKENS).tolist()
            _, seconds, num_tokens = stream_once(client, prompt, OUTPUT_TOKENS)
            firsts = []
            for _ in range(4):
                prompt = rng.integers(256, vocab_size, FIRST_BYTE_PROMPT_TOKENS).tolist()
                firsts.append(stream_once(client, prompt, 2)[0])
            if index:  # the first round warms up
                rate = (num_tokens - 1) / seconds
                figures.append(Round(bandwidth, rate, 1000 * statistics.median(firsts)))
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.single_stream", description=__doc__.splitlines()[0]
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    config = json.loads((args.checkpoint / "config.json").read_text())
    command = [sys.executable, "-m", "streamserve", "serve", str(args.checkpoint), "--port", "0"]
    command += ["--dtype", args.dtype, "--served-model-name", "bench"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as server:
        assert server.stdout is not None
        try:
            url = ""
            for line in server.stdout:
                print(" ", line, end="")
                if match := re.search(r"ready .*?(http://[\d.:]+)", line):
                    url = match[1]
                    break
            figures = measure(url, config["vocab_size"], args.rounds)
        finally:
            server.terminate()
    size = num_weights(args.checkpoint) * (4 if args.dtype == "float32" else 2)
    shares = [f.tokens_per_s * size / (f.read_gb_s * 1e9) for f in figures]
    for figure, share in zip(figures, shares, strict=True):
        print(
            f"read {figure.read_gb_s:5.1f} GB/s   {figure.tokens_per_s:6.1f} tokens/s = "
            f"{share:4.0%} of the floor   first byte {figure.first_byte_ms:6.1f} ms"
        )
    print(
        f"median: {statistics.median(f.tokens_per_s for f in figures):.1f} tokens/s, "
        f"{statistics.median(shares):.0%} of the floor ({size / 1e6:.0f} MB a step), "
        f"first byte {statistics.median(f.first_byte_ms for f in figures):.1f} ms"
    )


if __name__ == "__main__":
    main()
