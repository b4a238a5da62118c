"""Real server processes for tests that act as a user would."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from openai import AsyncOpenAI, OpenAI

ROOT = Path(__file__).parents[2]
READY = re.compile(r"ready .*(http://\S+)")
LAST_LINE = re.compile(r" +-d '")  # of the request to try
Run = Callable[..., subprocess.CompletedProcess[str]]
# Python 3.14 says so of the import of langchain-core.
LANGCHAINS = (
    "ignore:'asyncio.iscoroutinefunction':DeprecationWarning:langsmith._internal._beta_decorator"
)
# Little to warm up: half a second to build where others take one and a half.
SMALL = {"dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 64}
SMALL_FLAGS = tuple(
    text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))
)
# Imports what a command does, which takes seconds, and runs each command line, or each script that
# one begins with, in a fork of that.
FORKS = """
import json, os, runpy, sys, warnings
import streamserve.cli.bench, streamserve.cli.compose, streamserve.cli.compose_cpu, torch
from streamserve.cli import main

warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)  # none of them are ours
for line in sys.stdin:
    argv, *files = json.loads(line)
    if (pid := os.fork()) == 0:
        for number, path in enumerate(files):
            os.dup2(os.open(path, os.O_RDWR), number)
        sys.stdin = open(0, closefd=False)
        if argv and argv[0].endswith(".py"):
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
            sys.exit()
        code = 1
        try:
            code = main(argv)
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class Server:
    """A running `streamserve serve` and what it printed."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def client(self, **kwargs: object) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **kwargs)

    def async_client(self, **kwargs: object) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **kwargs)

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name without labels; the last one of each name."""
        text = httpx.get(f"{self.url}/metrics").raise_for_status().text
        rows = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name.split("{")[0]: float(value) for name, value in rows}


def environment() -> dict[str, str]:
    """The checkout first on the path, whatever is installed; nothing from outside."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("STREAMSERVE_")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / part) for part in (".", "kernels", "loadtest")])
    env["HF_HUB_OFFLINE"] = "1"
    env["PYTHONWARNINGS"] = f"error,{LANGCHAINS}"
    return env


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "streamserve", *args]


@contextmanager
def forked_commands(directory: Path) -> Iterator[Run]:
    """Yields what runs a command line, or a script, to its end.

    The directory is for what it reads and says.
    """
    paths = [directory / name for name in ("stdin", "stdout", "stderr")]
    process = subprocess.Popen(
        [sys.executable, "-c", FORKS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def run(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        for path, text in zip(paths, (stdin, "", ""), strict=True):
            path.write_text(text)
        print(json.dumps([args, *map(str, paths)]), file=process.stdin, flush=True)
        code = int(process.stdout.readline())
        return subprocess.CompletedProcess(args, code, *(path.read_text() for path in paths[1:]))

    try:
        yield run
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


@contextmanager
def running_server(*args: str) -> Iterator[Server]:
    """Start `streamserve serve` on a free port, wait until it says ready, end it with SIGTERM."""
    process = subprocess.Popen(
        command("serve", *args, "--port", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    server = Server(process, url="")
    try:
        for line in process.stdout:
            server.lines.append(line)
            if match := READY.search(line):
                server.url = match[1]
            if server.url and LAST_LINE.match(line):
                break
        assert server.url, f"the server ended before it was ready:\n{server.output}"
        # Keep reading, or a full pipe would stop the server.
        reader = threading.Thread(target=lambda: server.lines.extend(process.stdout), daemon=True)
        reader.start()
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
