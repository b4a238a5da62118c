"""Rows in a process of their own, which a kernel may crash or hang without ending the table.

The worker writes one JSON object a line to a pipe; the parent ends a worker that says nothing for
too long, and starts another one behind the row that it died of.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from device_bench.interpreted import mended_interpreter
from device_bench.measure import Result, Seconds, all_rows, is_device_lost, measure
from device_bench.row import LLAMA_8B, TINY, Bench, Row
from device_bench.timing import ROTATED_BYTES
from streamserve_kernels import load
from streamserve_kernels.ceilings import Ceilings, measure_ceilings
from streamserve_kernels.machine import describe

_STDERR_TAIL = 300
_MOST_RESERVED = 20 * 2**30  # bytes that torch may keep between two rows
_LOST = 3  # exit status: the device is broken for this process


@dataclass(frozen=True, slots=True)
class Options:
    """What a worker is told. `ceilings` are those that the first worker has measured."""

    device: str
    backend: str | None = None
    dtype: str = "bfloat16"
    tiny: bool = False
    quick: bool = False
    flex: bool = False
    only: str = ""
    rest: bool = False
    first: int = 0
    ceilings: dict[str, float | None] | None = None

    def rows(self) -> list[Row]:
        return all_rows(self.quick, self.only, self.rest)


def work(options: Options, send: Callable[[dict[str, Any]], None]) -> int:
    """Measures the rows from `options.first` on. Returns the exit status."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    if options.ceilings is None:
        ceilings = measure_ceilings(device, 0.01 if options.tiny else 1.0)
        send({"machine": describe(device), "ceilings": asdict(ceilings)})
    else:
        ceilings = Ceilings(**options.ceilings)
    bench = Bench(
        kernels=load(device, options.backend, dtype=dtype),
        naive=load(device, "naive"),
        device=device,
        dtype=dtype,
        sizes=TINY if options.tiny else LLAMA_8B,
        rotated_bytes=1 if options.tiny else ROTATED_BYTES,
        with_flex=options.flex,
    )
    seconds = Seconds(0.05, 0.03) if options.quick else Seconds()
    if options.tiny:
        seconds = Seconds(0.0, 0.0)
    send({"kernels": bench.kernels.name})
    for index, row in enumerate(options.rows()[options.first :], start=options.first):
        send({"started": index})
        result = measure(row, bench, ceilings, seconds)
        send({"result": {f.name: getattr(result, f.name) for f in fields(result)}})
        if result.status == "ERROR" and is_device_lost(device):
            return _LOST
        if device.type == "cuda" and torch.cuda.memory_reserved(device) > _MOST_RESERVED:
            torch.cuda.empty_cache()
    return 0


def worker_main(encoded: str, file_descriptor: int) -> int:
    """The child's side."""
    with os.fdopen(file_descriptor, "w", buffering=1) as pipe, mended_interpreter():
        return work(Options(**json.loads(encoded)), lambda m: print(json.dumps(m), file=pipe))


@dataclass(slots=True)
class Report:
    """What has been measured so far."""

    machine: dict[str, str]
    ceilings: dict[str, float | None] | None
    kernels: str
    results: list[Result]


def supervise(
    options: Options,
    *,
    row_timeout_s: float,
    limit_s: float,
    on_change: Callable[[Report], None],
    script: Path,
) -> Report:
    """Runs all rows in workers. `on_change` is called after the ceilings and after each row."""
    rows = options.rows()
    report = Report({}, None, "", [])
    end = time.monotonic() + limit_s
    num_barren = 0  # workers in turn that did not get as far as a row
    while len(report.results) < len(rows) and num_barren < 2:
        before = len(report.results)
        current = Options(**{**asdict(options), "first": before, "ceilings": report.ceilings})
        why = _one_worker(current, report, row_timeout_s, end, on_change, script)
        num_barren = num_barren + 1 if len(report.results) == before else 0
        left = rows[len(report.results) :]
        if left and time.monotonic() >= end:
            _append(report, _unrun(left, f"the limit of {limit_s:g} s was reached"), on_change)
        elif num_barren == 2:
            failed = Result("", "", "ERROR", error=why or "the worker did not start")
            _append(report, [_like(left[0], failed)], on_change)
            _append(report, _unrun(left[1:], "no worker starts"), on_change)
    return report


def _unrun(rows: Sequence[Row], why: str) -> list[Result]:
    return [Result(row.group, row.name, "SKIPPED", error=why) for row in rows]


def _like(row: Row, result: Result) -> Result:
    return Result(row.group, row.name, result.status, error=result.error)


def _append(report: Report, results: Sequence[Result], on_change: Callable[[Report], None]) -> None:
    for result in results:
        report.results.append(result)
        on_change(report)


def _one_worker(
    options: Options,
    report: Report,
    row_timeout_s: float,
    end: float,
    on_change: Callable[[Report], None],
    script: Path,
) -> str | None:
    """Follows one worker to its end; returns why it ended early, if it did."""
    rows = options.rows()
    reading, writing = os.pipe()
    command = [sys.executable, str(script), "--worker", json.dumps(asdict(options)), str(writing)]
    started: int | None = None
    why: str | None = None
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, pass_fds=[writing], stdout=errors, stderr=errors)
        os.close(writing)
        try:
            for message in _messages(reading, row_timeout_s, end):
                if message is None:
                    late = time.monotonic() >= end
                    why = "the limit was reached" if late else f"no end after {row_timeout_s:g} s"
                    break
                if "machine" in message:
                    report.machine, report.ceilings = message["machine"], message["ceilings"]
                    on_change(report)
                elif "kernels" in message:
                    report.kernels = message["kernels"]
                elif "started" in message:
                    started = message["started"]
                else:
                    started = None
                    _append(report, [Result(**message["result"])], on_change)
            else:
                process.wait()  # it has closed its end
        finally:
            os.close(reading)
            process.kill()
            status = process.wait()
        errors.seek(0)
        said = " ".join(errors.read().decode("utf-8", "replace").split())[-_STDERR_TAIL:]
    if why is None and status not in (0, _LOST):
        why = f"the process ended with {status}: {said}"
    if started is not None and time.monotonic() < end:
        failed = Result("", "", "ERROR", error=why or f"the process ended: {said}")
        _append(report, [_like(rows[started], failed)], on_change)
    return why


def _messages(
    file_descriptor: int, timeout_s: float, end: float
) -> Iterator[dict[str, Any] | None]:
    """What a worker sends until it ends; None when it is silent for too long."""
    pending = b""
    while True:
        left = min(timeout_s, max(0.0, end - time.monotonic()))
        ready, _, _ = select.select([file_descriptor], [], [], left)
        if not ready:
            yield None
            return
        received = os.read(file_descriptor, 1 << 16)
        if not received:
            return
        *lines, pending = (pending + received).split(b"\n")
        for line in lines:
            yield json.loads(line)
