"""Everything that is measured on a GPU, in one go: `python kernels/bench/gpu.py OUTPUT`.

In order, each with a limit, and a log in OUTPUT of its own: the tests of the GPU, the kernels'
table, an engine without HTTP, the same engine behind HTTP under load, and transformers on the same
shape. A step that fails or hangs does not keep the next from running, and whatever it started is
ended with it. `summary.txt` is written after each step.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ("tests/kernels", "tests/models", "tests/runner")  # the others know nothing of a device
_POLL_S = 0.2
_SUMMARY_LINES = {"tests": 12, "kernels": 4, "latency": 10, "throughput": 8, "serve": 14, "peer": 8}
_LIMITS = {
    "tests": 240.0,
    "kernels": 150.0,
    "latency": 120.0,
    "throughput": 120.0,
    "serve": 200.0,
    "peer": 120.0,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What the steps run on."""

    output: Path
    shape: str
    device: str | None
    engine_flags: tuple[str, ...]
    kernel_flags: tuple[str, ...]
    test_flags: tuple[str, ...]
    streams: tuple[int, ...]
    input_len: int
    output_len: int
    batch_sizes: tuple[int, ...]
    limits: dict[str, float] = field(default_factory=lambda: dict(_LIMITS))
    grace_s: float = 5.0  # for a process to end when it is asked to

    @property
    def model(self) -> Path:
        return self.output / self.shape

    def engine(self) -> list[str]:
        """Flags of the engine: random weights in the shape."""
        made = [str(self.model), "--load-format", "dummy", *self.engine_flags]
        return [*made, "--device", self.device] if self.device else made


class StepError(Exception):
    """A step that did not do what it should; the message says what."""


class Step:
    """One step's processes and its log. `left` is what remains of its time."""

    def __init__(self, plan: Plan, name: str) -> None:
        self.plan = plan
        self.log = plan.output / f"{name}.log"
        self.log.write_bytes(b"")
        self._end = time.monotonic() + plan.limits[name]

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def run(self, command: Sequence[str]) -> None:
        """Runs a command to its end. Raises StepError for a status, or for too long."""
        with self.started(command) as process:
            try:
                status = process.wait(self.left)
            except subprocess.TimeoutExpired:
                raise StepError("did not end in time") from None
        if status:
            raise StepError(f"ended with {status}")

    @contextmanager
    def started(self, command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
        """A process in a group of its own, which is ended on the way out."""
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                list(command),
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            end_group(process, self.plan.grace_s)


def environment() -> dict[str, str]:
    """The checkout first on the path, nothing from outside."""
    parts = [str(ROOT / part) for part in (".", "kernels", "loadtest")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(parts), "HF_HUB_OFFLINE": "1"}


def end_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Ends a process and all that it started: asked first, then killed."""
    for number, patience in ((signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s)):
        if process.poll() is None or number is signal.SIGKILL:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
    process.wait()


def run_tests(step: Step) -> None:
    command = [sys.executable, "-m", "pytest", *TESTS, "-m", "gpu", "-q", *step.plan.test_flags]
    command += [
        "-p",
        "no:benchmark",
    ]  # if it is there, it warns of workers, and warnings are errors
    if importlib.util.find_spec("xdist") is not None and "-n" not in command:
        command += ["-n", "12"]
    step.run(command)


def run_kernels(step: Step) -> None:
    output = step.plan.output
    command = [sys.executable, "kernels/bench/run.py", *step.plan.kernel_flags]
    command += ["--markdown", str(output / "kernels.md"), "--json", str(output / "kernels.json")]
    step.run([*command, "--limit", f"{0.95 * step.left:.0f}"])


def run_latency(step: Step) -> None:
    plan = step.plan
    command = [sys.executable, "-m", "streamserve", "bench", "latency", *plan.engine()]
    command += ["--batch-size", *map(str, plan.batch_sizes)]
    command += ["--input-len", str(plan.input_len), "--output-len", str(plan.output_len)]
    step.run([*command, "--json", str(plan.output / "latency.json")])


def run_throughput(step: Step) -> None:
    plan = step.plan
    command = [sys.executable, "-m", "streamserve", "bench", "throughput", *plan.engine()]
    command += ["--num-requests", str(4 * max(plan.batch_sizes)), "--spread", "0.5"]
    command += ["--input-len", str(plan.input_len), "--output-len", str(plan.output_len)]
    step.run([*command, "--json", str(plan.output / "throughput.json")])


def run_serve(step: Step) -> None:
    """One server, and the load test at each number of streams."""
    plan = step.plan
    port = free_port()
    command = [sys.executable, "-m", "streamserve", "serve", *plan.engine(), "--port", str(port)]
    if not any(flag.startswith("--max-num-seqs") for flag in plan.engine_flags):
        command += ["--max-num-seqs", str(max(plan.streams))]
    url = f"http://127.0.0.1:{port}"
    with step.started(command) as server:
        wait_until_ready(server, f"{url}/health", step.left)
        failed = []
        for streams in plan.streams:
            load = [sys.executable, "-m", "loadtest", "custom", "--url", url]
            load += ["--tokenizer", str(plan.model), "--clients", str(streams)]
            load += ["--conversations", "2", "--prompt-tokens", str(plan.input_len)]
            load += ["--output-tokens", str(plan.output_len)]
            try:
                step.run([*load, "--json", str(plan.output / f"serve-{streams}.json")])
            except StepError as error:
                failed.append(f"{streams} streams: {error}")
    if failed:
        raise StepError("; ".join(failed))


def run_peer(step: Step) -> None:
    plan = step.plan
    command = [sys.executable, "kernels/bench/transformers_peer.py", str(plan.model)]
    command += ["--batch-size", *map(str, plan.batch_sizes)]
    command += ["--input-len", str(plan.input_len), "--output-len", str(plan.output_len)]
    command += ["--limit", f"{0.6 * step.left:.0f}", "--json", str(plan.output / "peer.json")]
    step.run([*command, "--device", plan.device] if plan.device else command)


STEPS: dict[str, Callable[[Step], None]] = {
    "tests": run_tests,
    "kernels": run_kernels,
    "latency": run_latency,
    "throughput": run_throughput,
    "serve": run_serve,
    "peer": run_peer,
}
_DEFAULT_STEPS = ("tests", "kernels", "latency", "serve")


def wait_until_ready(server: subprocess.Popen[bytes], url: str, seconds: float) -> None:
    """Raises StepError if the server ends, or does not answer in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise StepError(f"the server ended with {server.returncode} before it was ready")
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except (OSError, urllib.error.URLError):
            time.sleep(_POLL_S)
    raise StepError("the server was not ready in time")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def run_all(plan: Plan, names: Sequence[str]) -> int:
    """Runs the steps in the order of `STEPS`; returns how many failed."""
    made = [sys.executable, "tools/make_checkpoint.py", plan.shape, str(plan.model)]
    subprocess.run([*made, "--config-only"], cwd=ROOT, env=environment(), check=True)
    summary: list[str] = []
    num_failed = 0
    for name in (name for name in STEPS if name in names):
        print(f"{name}: at most {plan.limits[name]:g} s", flush=True)
        step, started = Step(plan, name), time.monotonic()
        try:
            STEPS[name](step)
            verdict = "done"
        except Exception as error:
            verdict = f"FAILED: {error}"
            num_failed += 1
        heading = f"{name}: {verdict} ({time.monotonic() - started:.0f} s)"
        summary += [heading, *(f"    {line}" for line in last_lines(step.log, name)), ""]
        (plan.output / "summary.txt").write_text("\n".join(summary))
        print(heading, flush=True)
    print("\n" + "\n".join(summary), flush=True)
    return num_failed


def last_lines(log: Path, name: str) -> list[str]:
    """The end of a log, which is where each step says what came of it."""
    lines = log.read_text(errors="replace").splitlines()
    return [line[:240] for line in lines if line.strip()][-_SUMMARY_LINES[name] :]


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    # What ends this process ends what it has started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    limits = {name: args.scale_limits * limit for name, limit in _LIMITS.items()}
    plan = Plan(
        output=output,
        shape=args.shape,
        device=args.device,
        engine_flags=tuple(args.engine_flags.split()),
        kernel_flags=tuple(args.kernel_flags.split()),
        test_flags=tuple(args.test_flags.split()),
        streams=tuple(args.streams),
        input_len=args.input_len,
        output_len=args.output_len,
        batch_sizes=tuple(args.batch_size),
        limits=limits | {name: float(seconds) for name, seconds in args.limit},
    )
    return 1 if run_all(plan, args.steps) else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("output", type=Path, help="a directory for logs and results")
    made.add_argument(
        "--steps",
        nargs="+",
        choices=STEPS,
        default=_DEFAULT_STEPS,
        help=f"(default: {' '.join(_DEFAULT_STEPS)})",
    )
    made.add_argument("--shape", default="llama-8b", help="of tools/make_checkpoint.py")
    made.add_argument("--device", help="for every step but the tests (default: each one's own)")
    made.add_argument("--engine-flags", default="", metavar="'FLAGS'", help="of the engine")
    made.add_argument("--kernel-flags", default="", metavar="'FLAGS'", help="of run.py")
    made.add_argument("--test-flags", default="", metavar="'FLAGS'", help="of pytest")
    made.add_argument("--batch-size", type=int, nargs="+", default=[1, 64], metavar="N")
    made.add_argument("--streams", type=int, nargs="+", default=[64, 256], metavar="N")
    made.add_argument("--input-len", type=int, default=1024, metavar="N")
    made.add_argument("--output-len", type=int, default=128, metavar="N")
    made.add_argument(
        "--limit",
        nargs=2,
        action="append",
        default=[],
        metavar=("STEP", "S"),
        help="seconds of a step; may be given for several",
    )
    made.add_argument("--scale-limits", type=float, default=1.0, metavar="F", help="of all steps")
    return made


if __name__ == "__main__":
    sys.exit(main())
