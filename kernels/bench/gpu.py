"""All that is measured on a GPU: `python kernels/bench/gpu.py OUTPUT 1`, then 2, or 3.

Steps come in the order of what is least known: in part 1 the tests of the GPU, an engine without
HTTP, the same engine behind HTTP under load; in part 2 the kernels' table, what a step takes its
time with, throughput, and transformers on the same shape; in part 3, when those are known, the
rows that the table leaves out, and sizes of attention. Each has a limit, and the command has one; a
step that fails or hangs does not keep the next from running, and whatever it started is ended with
it. `--steps lookup` and `heads` are in no part: two engines, with and without prompt lookup, or
with and without a draft head that is right three times of four.

OUTPUT holds a few files, written as things happen, so that nothing is lost with a machine:

    log.txt        all that the steps say, and so does the terminal
    tests.jsonl    each test, when it has ended; its failure stands in the log
    kernels.json   each row of the table, when it has been timed; kernels.md the table
    rest.json, rest.md      the rows of part 3
    results.jsonl  what the other steps measured, each when it has ended
    summary.txt    after each step
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
_GPU_MARK = "mark.gpu"
_GIVEN_DEVICE = re.compile(r"def \w+\([^)]*\bdevice\b")
ONE_ENGINE = ("tests/runner/",)  # which the tests of a file share: a worker's each would be built
# What no card has run to its end, then what so much has changed in that it is as good as new.
FIRST_TESTS = (
    "tests/runner/cuda/",
    "tests/runner/test_gpu_memory.py",
    "tests/kernels/test_adapters.py",
    "tests/kernels/test_triton_moe.py",
    "tests/kernels/test_triton_attention.py",
    "tests/kernels/test_triton_linear.py",
    "tests/kernels/test_triton_quantised.py",
)
_POLL_S = 0.2
_SUMMARY_LINES = {
    "tests": 30,
    "kernels": 4,
    "rest": 4,
    "sweep": 70,
    "latency": 10,
    "profile": 60,
    "throughput": 8,
    "serve": 14,
    "peer": 8,
    "lookup": 8,
    "heads": 8,
}
_LIMITS = {
    "tests": 170.0,
    "latency": 80.0,
    "serve": 100.0,
    "kernels": 110.0,
    "profile": 130.0,
    "throughput": 60.0,
    "peer": 60.0,
    "rest": 300.0,
    "sweep": 240.0,
    "lookup": 240.0,
    "heads": 240.0,
}
# A quarter of an hour on a rented machine: two commands of ten minutes at most, and its start. Part
# 3 takes one of its own.
PARTS = {
    1: ("tests", "latency", "serve"),
    2: ("kernels", "profile", "throughput", "peer"),
    3: ("rest", "sweep"),
}
_LOOKUP_CACHE = "12GiB"  # of each engine: 64 streams of 1,152 tokens take 9
_MAKE_CHECKPOINT = Path(__file__).parents[2] / "tools" / "make_checkpoint.py"
_GUESSED = "qwen3.5-0.8b"
_GRACE_S = 5.0  # for a process to end when it is asked to


@dataclass(frozen=True, slots=True)
class Plan:
    """What the steps run on. ``work`` is for what nobody will look at."""

    output: Path
    work: Path
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
    grace_s: float = _GRACE_S

    @property
    def model(self) -> Path:
        return self.work / self.shape

    def engine(self) -> list[str]:
        """Flags of the engine: random weights in the shape."""
        return [str(self.model), "--load-format", "dummy", *self.common()]

    def common(self) -> list[str]:
        """Flags of the engine, whatever the weights."""
        on_device = ["--device", self.device] if self.device else []
        return [*self.engine_flags, *on_device]


class StepError(Exception):
    """A step that did not do what it should; the message says what."""


class Step:
    """One step's processes and what they say. `left` is what remains of its time."""

    def __init__(self, plan: Plan, name: str, limit_s: float | None = None) -> None:
        self.plan = plan
        self.name = name
        self.lines: list[str] = []
        self._end = time.monotonic() + (plan.limits[name] if limit_s is None else limit_s)

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
    def started(self, command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
        """A process in a group of its own, which is ended on the way out."""
        self.say(f"$ {' '.join(command)}")
        process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert process.stdout is not None
        reader = threading.Thread(target=self._listen, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            yield process
        finally:
            end_group(process, self.plan.grace_s)
            reader.join(self.plan.grace_s)  # what left the group may hold the pipe

    def _listen(self, said: IO[str]) -> None:
        with said:
            for line in said:
                self.say(line.rstrip("\n"))

    def say(self, line: str) -> None:
        """Tells the terminal and the log."""
        self.lines.append(line)
        with (self.plan.output / "log.txt").open("a") as log:
            log.write(f"{self.name}| {line}\n")
        print(line[:1000], flush=True)

    def keep(self, file: Path, name: str) -> None:
        """Adds what a command measured to the results, if it came so far."""
        if file.exists():
            with (self.plan.output / "results.jsonl").open("a") as results:
                results.write(json.dumps({name: json.loads(file.read_text())}) + "\n")


def environment() -> dict[str, str]:
    """The checkout first on the path, nothing from outside; what is said is said at once."""
    parts = [str(ROOT / part) for part in (".", "kernels", "kernels/bench", "loadtest")]
    parts += filter(None, [os.environ.get("PYTHONPATH")])
    said = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(parts), **said}


def end_group(process: subprocess.Popen[Any], grace_s: float) -> None:
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


def gpu_test_files() -> list[str]:
    """The files with tests of the GPU: the others, ten times as many tests, need not be collected.

    They mark them, or ask for the device that a conftest.py above gives with such a mark.
    """
    tests = ROOT / "tests"
    giving = [p.parent for p in tests.rglob("conftest.py") if _GPU_MARK in p.read_text()]
    found = []
    for path in sorted(tests.rglob("test_*.py")):
        text = path.read_text()
        is_given = any(path.is_relative_to(folder) for folder in giving)
        if _GPU_MARK in text or (is_given and _GIVEN_DEVICE.search(text)):
            found.append(str(path.relative_to(ROOT)))
    return found


def run_tests(step: Step) -> None:
    """Raises StepError that names the files which could not be collected; the others have run."""
    told = step.plan.output / "tests.jsonl"
    command = [sys.executable, "-m", "pytest", *gpu_test_files(), "-m", "gpu", "-q", "--tb=short"]
    command += ["--continue-on-collection-errors"]
    command += ["-p", "tell_failures", "--tell-to", str(told)]
    command += [f"--first={path}" for path in FIRST_TESTS]
    command += step.plan.test_flags
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark"]  # it warns of workers
    if importlib.util.find_spec("xdist") is not None and "-n" not in command:
        command += ["-n", str(min(14, os.cpu_count() or 1)), "--dist", "loadgroup"]
        command += [f"--together={path}" for path in ONE_ENGINE]
    try:
        with compiling(step):
            step.run(command)
    except StepError as error:
        if missing := not_collected(told):
            raise StepError(f"{error}; not collected: {' '.join(missing)}") from None
        raise


def not_collected(told: Path) -> list[str]:
    """The files of which `tell_failures` says so."""
    tests = map(json.loads, told.read_text().splitlines() if told.exists() else ())
    return [test["test"] for test in tests if test["outcome"] == "not collected"]


@contextmanager
def compiling(step: Step) -> Iterator[None]:
    """Meanwhile the table's kernels are compiled, by making the table: Triton keeps them on disk.

    What is measured and tuned beside the tests is worth nothing, and kept nowhere.
    """
    kept = environment()
    cache = kept.get("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    process = subprocess.Popen(
        kernels_command(step.plan.kernel_flags, step.left),
        cwd=ROOT,
        env=kept | {"HOME": str(step.plan.work), "TRITON_CACHE_DIR": cache},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        end_group(process, step.plan.grace_s)


def kernels_command(flags: Sequence[str], seconds: float) -> list[str]:
    command = [sys.executable, "kernels/bench/run.py", *flags]
    return [*command, "--limit", f"{0.95 * seconds:.0f}"]


def run_kernels(step: Step) -> None:
    make_table(step, step.plan.kernel_flags)


def run_rest(step: Step) -> None:
    make_table(step, [*step.plan.kernel_flags, "--rest"])


def make_table(step: Step, flags: Sequence[str]) -> None:
    """Kernels' rows, into files of the step's name."""
    output = str(step.plan.output / step.name)
    command = kernels_command(flags, step.left)
    step.run([*command, "--markdown", f"{output}.md", "--json", f"{output}.json"])


def run_sweep(step: Step) -> None:
    command = [sys.executable, "kernels/bench/attention_sweep.py"]
    step.run([*command, "--limit", f"{0.9 * step.left:.0f}"])


def run_latency(step: Step) -> None:
    measure(step, "latency", ["--batch-size", *map(str, step.plan.batch_sizes)])


def run_profile(step: Step) -> None:
    plan, found = step.plan, step.plan.work / "profile.json"
    command = [sys.executable, "kernels/bench/step_profile.py", *plan.engine(), "--sweep"]
    command += ["--batch-size", *map(str, plan.batch_sizes), "--input-len", str(plan.input_len)]
    try:
        step.run([*command, "--json", str(found)])
    finally:
        step.keep(found, "profile")


def run_throughput(step: Step) -> None:
    requests = str(4 * max(step.plan.batch_sizes))
    measure(step, "throughput", ["--num-requests", requests, "--spread", "0.5"])


def measure(step: Step, what: str, flags: Sequence[str]) -> None:
    """One of the benches that need no server."""
    plan, found = step.plan, step.plan.work / f"{what}.json"
    command = [sys.executable, "-m", "streamserve", "bench", what, *plan.engine(), *flags]
    command += ["--input-len", str(plan.input_len), "--output-len", str(plan.output_len)]
    try:
        step.run([*command, "--json", str(found)])
    finally:
        step.keep(found, what)


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
            found = plan.work / f"serve-{streams}.json"
            try:
                step.run([*load, "--json", str(found)])
            except StepError as error:
                failed.append(f"{streams} streams: {error}")
            finally:
                step.keep(found, f"serve-{streams}")
    if failed:
        raise StepError("; ".join(failed))


def run_peer(step: Step) -> None:
    plan, found = step.plan, step.plan.work / "peer.json"
    command = [sys.executable, "kernels/bench/transformers_peer.py", str(plan.model)]
    command += ["--batch-size", *map(str, plan.batch_sizes)]
    command += ["--input-len", str(plan.input_len), "--output-len", str(plan.output_len)]
    command += ["--limit", f"{0.6 * step.left:.0f}", "--json", str(found)]
    try:
        step.run([*command, "--device", plan.device] if plan.device else command)
    finally:
        step.keep(found, "peer")


def run_lookup(step: Step) -> None:
    """Prompt lookup on and off, in turns."""
    _speculate(step, "lookup", step.plan.engine())


def run_heads(step: Step) -> None:
    """A hybrid's head on and off, in turns, on weights that can be guessed."""
    model = step.plan.work / "guessable"
    step.run([sys.executable, str(_MAKE_CHECKPOINT), _GUESSED, str(model), "--guessable", "0.75"])
    drafts = ("--speculative-config", '{"method": "mtp"}')
    _speculate(step, "heads", [str(model), *step.plan.common()], *drafts)


def _speculate(step: Step, name: str, engine: list[str], *drafts: str) -> None:
    plan, found = step.plan, step.plan.work / f"{name}.json"
    both = ["--kv-cache-memory", _LOOKUP_CACHE, *engine[1:]]
    command = [sys.executable, "-m", "loadtest.speculation", engine[0], *drafts]
    command += ["--engine-flags", " ".join(both), "--streams", *map(str, plan.batch_sizes)]
    command += ["--input-len", str(plan.input_len), "--output-len", str(plan.output_len)]
    try:
        step.run([*command, "--json", str(found)])
    finally:
        step.keep(found, name)


STEPS: dict[str, Callable[[Step], None]] = {
    "tests": run_tests,
    "latency": run_latency,
    "serve": run_serve,
    "kernels": run_kernels,
    "profile": run_profile,
    "throughput": run_throughput,
    "peer": run_peer,
    "rest": run_rest,
    "sweep": run_sweep,
    "lookup": run_lookup,
    "heads": run_heads,
}


def wait_until_ready(server: subprocess.Popen[str], url: str, seconds: float) -> None:
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


def run_all(plan: Plan, names: Sequence[str], seconds: float = float("inf")) -> int:
    """Runs the steps in the order of `STEPS`, all of them in ``seconds``; returns how many failed.

    A step gets what is left where that is less than its limit; none is begun in the last seconds.
    """
    end = time.monotonic() + seconds
    made = [sys.executable, "tools/make_checkpoint.py", plan.shape, str(plan.model)]
    subprocess.run([*made, "--config-only"], cwd=ROOT, env=environment(), check=True)
    summary: list[str] = []
    num_failed = 0
    for name in (name for name in STEPS if name in names):
        limit = min(plan.limits[name], end - time.monotonic() - 2 * plan.grace_s)
        print(f"{name}: at most {limit:.0f} s", flush=True)
        step, started = Step(plan, name, limit), time.monotonic()
        try:
            if limit <= 0:
                raise StepError("there was no time left")
            STEPS[name](step)
            verdict = "done"
        except Exception as error:
            verdict = f"FAILED: {error}"
            num_failed += 1
        heading = f"{name}: {verdict} ({time.monotonic() - started:.0f} s)"
        summary += [heading, *(f"    {line}" for line in last_lines(step.lines, name)), ""]
        (plan.output / "summary.txt").write_text("\n".join(summary))
        print(heading, flush=True)
    print("\n" + "\n".join(summary), flush=True)
    return num_failed


def last_lines(said: Sequence[str], name: str) -> list[str]:
    """The end of what a step said, which is where each says what came of it."""
    return [line[:240] for line in said if line.strip()][-_SUMMARY_LINES[name] :]


def described(plan: Plan, names: Sequence[str], seconds: float) -> str:
    """What would be run, and how long it may take."""
    chosen = [name for name in STEPS if name in names]
    total = sum(plan.limits[name] for name in chosen)
    lines = [f"{name:12}at most {plan.limits[name]:4.0f} s" for name in chosen]
    lines += [f"{'together':12}at most {min(total, seconds):4.0f} s", ""]
    lines += [f"model        {plan.shape}", f"streams      {plan.streams}"]
    tests = f"tests        of {len(gpu_test_files())} files, first {' '.join(FIRST_TESTS)}"
    return "\n".join([*lines, tests])


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    # What ends this process ends what it has started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    names = PARTS[args.part] if args.steps is None else args.steps
    limits = {name: args.scale_limits * limit for name, limit in _LIMITS.items()}
    work = Path(tempfile.mkdtemp(prefix="gpu-bench-"))
    plan = Plan(
        output=args.output.resolve(),
        work=work,
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
    try:
        if args.list:
            print(described(plan, names, args.seconds))
            return 0
        plan.output.mkdir(parents=True, exist_ok=True)
        return 1 if run_all(plan, names, args.seconds) else 0
    finally:
        shutil.rmtree(work, ignore_errors=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("output", type=Path, help="a directory for logs and results")
    made.add_argument("part", type=int, nargs="?", choices=PARTS, default=1, help="(default: 1)")
    made.add_argument("--list", action="store_true", help="say what would be run, and run nothing")
    made.add_argument("--steps", nargs="+", choices=STEPS, help="these, and not a part's")
    made.add_argument(
        "--seconds", type=float, default=570.0, metavar="S", help="of the whole command"
    )
    made.add_argument("--shape", default="llama-8b", help="of tools/make_checkpoint.py")
    made.add_argument("--device", help="for every step but the tests (default: each one's own)")
    made.add_argument("--engine-flags", default="", metavar="'FLAGS'", help="of the engine")
    made.add_argument("--kernel-flags", default="--quick", metavar="'FLAGS'", help="of run.py")
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
