"""streamserve beside other servers: the same checkpoint, load and machine, in turns.

    python -m loadtest.compare CHECKPOINT W1 W2 --llama-server PATH --vllm-python PATH
    streamserve bench compare CHECKPOINT W1 W2 …

Every server that can be found is started as its own users would start it. Rounds go A B C, A B C;
whoever is not measured is frozen, so that it takes no processor; the memory floor is measured in
the same rounds. A server that dies or hangs is reported as such, and the rest goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from streamserve_loadtest.cli import (
    add_run_flags,
    chosen_workloads,
    clear_line,
    label_of,
    make_prompts,
    progress_line,
    run_async,
    steps_of,
    write_reports,
)
from streamserve_loadtest.client import Target
from streamserve_loadtest.drive import Driver, warm_up
from streamserve_loadtest.floor import (
    BITS_PER_WEIGHT,
    floor_tokens_per_s,
    num_weights,
    read_bandwidth,
)
from streamserve_loadtest.peers.catalog import Catalog, Peer, Places, find_peers
from streamserve_loadtest.peers.process import PeerError, ServerProcess, free_port
from streamserve_loadtest.prompts import PromptMaker
from streamserve_loadtest.ratios import ratio_lines
from streamserve_loadtest.records import Run
from streamserve_loadtest.stats import summarize
from streamserve_loadtest.terminal import workload_report
from streamserve_loadtest.workloads import Workload

_WARM_UP_S = 120.0


_LAST_BREATH_S = 1.0


class Comparison:
    """The servers that run, and what was measured so far."""

    def __init__(self, args: argparse.Namespace, catalog: Catalog, prompts: PromptMaker) -> None:
        self._args = args
        self._prompts = prompts
        self._peers = {peer.name: peer for peer in catalog.peers}
        self.running: dict[str, ServerProcess] = {}
        self._logs = Path(tempfile.mkdtemp(prefix="compare-"))
        self._weights = num_weights(args.checkpoint)
        self.failures: dict[str, str] = {}
        self.ready_s: dict[str, float] = {}
        self.commands: dict[str, list[str]] = {}
        self.floors: list[dict[str, float]] = []
        self.runs: list[Run] = []

    def run(self, workload: Workload) -> None:
        """Play a workload against every server in turns, and print its table."""
        for peer in self._peers.values():
            self._start(peer, workload)
        is_warm = False
        for round_number in range(self._args.rounds):
            for step, rate in steps_of(workload):
                with self._machine():
                    if not is_warm:
                        self._warm_up_all(workload)
                        is_warm = True
                    if rate is None:
                        self._measure_floor()
                    for peer in self._able():
                        self._measure(peer, step, round_number, rate)
        self._print(workload)

    def stop(self) -> None:
        """End every server."""
        for process in self.running.values():
            process.stop()
        self.running.clear()

    def notes(self) -> dict[str, Any]:
        """What the reports say beside the figures."""
        return {
            "machine": machine(),
            "checkpoint": self._args.checkpoint.name,
            "servers": self.servers(),
            "ready_s": self.ready_s,
            "commands": self.commands,
            "failures": self.failures,
            "floors_tokens_per_s": self.floors,
        }

    def servers(self) -> dict[str, dict[str, Any]]:
        """By name: precision, and whether it is ours."""
        return {
            name: {"precision": peer.precision, "is_ours": peer.is_ours}
            for name, peer in self._peers.items()
        }

    def _able(self) -> list[Peer]:
        return [peer for name, peer in self._peers.items() if name in self.running]

    def _start(self, peer: Peer, workload: Workload) -> None:
        """Start it, or start it anew if this workload wants other flags."""
        if peer.name in self.failures:
            return
        process = self.running.get(peer.name)
        if process is not None:
            if peer.command(process.port, workload) == list(process.command):
                return
            self.running.pop(peer.name).stop()
        port = free_port()
        command = peer.command(port, workload)
        log = self._logs / f"{peer.name.replace(' ', '-')}.log"
        show = progress_line(f"starting {peer.name}")
        try:
            process = ServerProcess(command, peer.environment, port, log)
        except OSError as error:
            self._fail(peer, f"cannot be started: {error}")
            return
        self.running[peer.name] = process
        try:
            ready = process.wait_until_ready(
                peer.ready_path, self._args.start_timeout, show and (lambda _elapsed: show(0, 0))
            )
        except PeerError as error:
            self._fail(peer, str(error))
            return
        clear_line()
        if peer.name not in self.ready_s:
            self.ready_s[peer.name] = ready
            print(f"{peer.name}: ready in {ready:.1f} s", flush=True)
        self.commands[f"{peer.name} {workload.name}"] = command
        process.freeze()

    def _warm_up_all(self, workload: Workload) -> None:
        for peer in self._able():
            with self._thawed(peer) as process:
                target = self._target(peer, process)
                record = run_async(
                    partial(warm_up, target, workload, self._prompts, timeout_s=_WARM_UP_S)
                )
                if record.error:
                    self._fail(peer, f"{record.error}\n{process.log_tail}")

    def _measure(self, peer: Peer, step: Workload, round_number: int, rate: float | None) -> None:
        args = self._args
        label = label_of(step, round_number, rate, peer.name)
        with self._thawed(peer) as process:
            driver = Driver(
                self._target(peer, process),
                step,
                self._prompts,
                seed=args.seed,
                round_number=round_number,
                timeout_s=args.timeout,
                on_progress=progress_line(label),
            )
            try:
                self.runs.append(
                    run_async(lambda: _within(driver, peer.name, rate, args.run_timeout))
                )
            except TimeoutError:
                self._fail(peer, f"hangs: {label} did not end within {args.run_timeout:g} s")
                return
            finally:
                clear_line()
            if not sys.stderr.isatty():
                print(f"{label}: {self.runs[-1].seconds:.0f} s", file=sys.stderr, flush=True)
            # Its readers may notice the end before the system does.
            failed = any(record.error for record in self.runs[-1].records)
            if process.ends_within(_LAST_BREATH_S if failed else 0.0):
                self._fail(peer, f"died in {label}:\n{process.log_tail}")

    def _measure_floor(self) -> None:
        bandwidth = read_bandwidth(num_threads=self._args.threads)
        floors = {p: floor_tokens_per_s(self._weights, p, bandwidth) for p in BITS_PER_WEIGHT}
        self.floors.append({**floors, "read_gb_s": bandwidth})

    @contextlib.contextmanager
    def _thawed(self, peer: Peer) -> Iterator[ServerProcess]:
        process = self.running[peer.name]
        process.resume()
        try:
            yield process
        finally:
            process.freeze()

    @contextlib.contextmanager
    def _machine(self) -> Iterator[None]:
        """The machine to ourselves, where several people agreed on a lock."""
        if self._args.lock is None:
            yield
            return
        with self._args.lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _target(self, peer: Peer, process: ServerProcess) -> Target:
        fields = {**peer.extra_body, **self._args.extra_body}
        return Target(process.url, peer.model, extra_body=fields)

    def _fail(self, peer: Peer, reason: str) -> None:
        clear_line()
        print(f"{peer.name} is left out: {reason}", file=sys.stderr, flush=True)
        self.failures[peer.name] = reason
        if (process := self.running.pop(peer.name, None)) is not None:
            process.stop()

    def _print(self, workload: Workload) -> None:
        runs = [run for run in self.runs if run.workload == workload.name]
        if not runs:
            return
        summaries = [summarize(run, workload.limits) for run in runs]
        print(workload_report(summaries, workload.name, workload.title))
        for line in ratio_lines(summaries, workload.name, self.servers(), self.floors):
            print(line)
        print(flush=True)


async def _within(driver: Driver, name: str, rate: float | None, timeout_s: float) -> Run:
    async with asyncio.timeout(timeout_s):
        return await driver.run(name, rate)


def machine() -> str:
    """The processor in words."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{len(os.sched_getaffinity(0))} cores of {model}, Python {platform.python_version()}"


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m loadtest.compare") -> int:
    """Compare; 1 if one of our own servers failed."""
    args = build_parser(prog).parse_args(argv)
    workloads = chosen_workloads(args)
    places = Places(
        checkpoint=args.checkpoint.resolve(),
        streamserve_python=args.streamserve_python,
        streamserve_checkout=args.streamserve_checkout or _own_checkout(),
        streamserve_flags=tuple(args.streamserve_flag),
        llama_server=args.llama_server,
        openvino_python=args.openvino_python,
        vllm_python=args.vllm_python,
        transformers_python=args.transformers_python,
        num_threads=args.threads,
    )
    catalog = _wanted(find_peers(places, tuple(args.precision)), args.servers)
    for name, reason in catalog.missing.items():
        print(f"{name} is left out: {reason}", file=sys.stderr)
    prompts = make_prompts(places.checkpoint, "")
    comparison = Comparison(args, catalog, prompts)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        for workload in workloads:
            comparison.run(workload)
    except KeyboardInterrupt:
        print("\nstopped; what was measured so far is kept", file=sys.stderr)
    finally:
        comparison.stop()
    notes = comparison.notes()
    notes["missing"] = dict(catalog.missing)
    title = f"{args.checkpoint.name} on {notes['machine']}"
    write_reports(comparison.runs, workloads, args.json, args.html, title=title, notes=notes)
    is_ours_well = not any(comparison.servers()[name]["is_ours"] for name in comparison.failures)
    return 0 if is_ours_well else 1


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _own_checkout() -> Path | None:
    """The checkout that this file lies in, None if it is installed."""
    root = Path(__file__).parents[2]
    return root if (root / "streamserve" / "__init__.py").is_file() else None


def _wanted(catalog: Catalog, names: list[str] | None) -> Catalog:
    """Those whose names contain one of ``names``."""
    if not names:
        return catalog
    peers = [p for p in catalog.peers if any(n.lower() in p.name.lower() for n in names)]
    missing = {
        name: reason
        for name, reason in catalog.missing.items()
        if any(n.lower() in name.lower() for n in names)
    }
    return Catalog(tuple(peers), missing)


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a Hugging Face directory")
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help="W1 to W6 (default: W1)")
    parser.add_argument(
        "--precision", nargs="+", choices=("bf16", "int8", "int4"), default=["bf16"]
    )
    parser.add_argument(
        "--servers", nargs="+", metavar="NAME", help="only those with this in their names"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--lock", type=Path, metavar="FILE", help="flock it while measuring")
    parser.add_argument("--start-timeout", type=float, default=300.0, metavar="S")
    parser.add_argument("--run-timeout", type=float, default=600.0, metavar="S", help="of one run")
    add_run_flags(parser)
    places = parser.add_argument_group("where the servers are")
    places.add_argument("--streamserve-python", type=Path, default=Path(sys.executable))
    places.add_argument("--streamserve-checkout", type=Path, metavar="DIR", help="run it from here")
    places.add_argument(
        "--streamserve-flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="for `streamserve serve`, once for each word: --streamserve-flag=--itl-target-ms",
    )
    places.add_argument(
        "--llama-server",
        type=Path,
        help="weights are looked for beside the checkpoint: "
        "CHECKPOINT-bf16.gguf, CHECKPOINT-Q8_0.gguf, CHECKPOINT-Q4_0.gguf",
    )
    places.add_argument("--openvino-python", type=Path, help="its model: CHECKPOINT-openvino")
    places.add_argument("--vllm-python", type=Path)
    places.add_argument("--transformers-python", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())
