"""`python -m tests.fake_cuda [CASE ...] [--scenario NAME ...] [--compile]`: a JSON line for each.

Every case is a process of its own, forked from one that has imported everything. ``--compile`` has
Triton compile each kernel for Hopper, in all its specialisations, which takes seconds for each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fake_cuda.cases import CASES, make


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = " ".join(CASES)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"(default: all) {names}")
    parser.add_argument("--scenario", nargs="+", dest="scenarios")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args(argv)
    args.cases = args.cases or list(CASES)
    with tempfile.TemporaryDirectory() as home:
        os.environ["HOME"] = home  # nothing that was measured before
        return play(args, Path(home))


def play(args: argparse.Namespace, root: Path) -> int:
    """Makes the cases' checkpoints in ``root`` and plays them; returns how many failed."""
    made: dict[str, Path | str] = {}
    for name in args.cases:
        (root / name).mkdir()
        try:
            made[name] = make(CASES[name], root / name)
        except Exception as error:
            traceback.print_exc()
            made[name] = f"{type(error).__name__}: {error}"
    from tests.fake_cuda import runtime
    from tests.fake_cuda.scenarios import SCENARIOS

    device = runtime.install(compile_with=runtime.Compiler() if args.compile else None)
    runtime.backend()
    num_failed = 0
    for name in args.cases:
        path = made[name]
        flags = tuple(flag.replace("DIRECTORY", str(path)) for flag in CASES[name].flags)
        if isinstance(path, str):
            num_failed += 1
            print(json.dumps({"case": name, "error": path}), flush=True)
            continue
        if (child := os.fork()) == 0:
            status = 1
            try:
                report = run_case(device, path, flags, args.scenarios or SCENARIOS)
                print(json.dumps({"case": name, **report}), flush=True)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        num_failed += os.waitpid(child, 0)[1] != 0
    return num_failed


def run_case(
    device: Any, path: Path, flags: tuple[str, ...], names: Sequence[str]
) -> dict[str, Any]:
    """Builds the engine of a case and plays scenarios on it; what was found, as data."""
    import torch

    from tests.fake_cuda import runtime
    from tests.fake_cuda.engine import Engine
    from tests.fake_cuda.scenarios import SCENARIOS, adapters, closed, drafts

    torch.set_num_threads(1)
    started = time.monotonic()
    engine = Engine(device, path, *flags)
    report: dict[str, Any] = {
        "seconds": round(time.monotonic() - started, 1),
        "said": engine.said,
        "graphs": engine.target._executor.num_graphs,
        "copies in graphs": sum(
            entry.name == "aten::copy_" for graph in device.graphs for entry in graph.entries
        ),
        "kernels": len(runtime.compiled),
        "findings while building": dict(device.findings),
        "scenarios": {},
    }
    chosen = {name: SCENARIOS[name] for name in names}
    if engine.built.adapters is not None:
        chosen["adapters"] = adapters
    if engine.scheduler.speculative is not None:
        chosen["drafts"] = drafts
    for name, scenario in chosen.items():
        device.findings.clear()
        engine.steps.clear()
        engine.loops.clear()
        waits = len(device.log)
        late, operations = set(engine.met_late), set(engine.operations_met_late)
        error = None
        try:
            scenario(engine)
            failed = [error for loop in engine.loops for error in loop.errors]
            assert not failed or name == "out_of_memory", failed
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
            traceback.print_exc()
        engine.target.on_device_thread(lambda: None)  # it has come past the last step
        shapes = Counter(json.dumps(step.counts) for step in engine.steps)
        report["scenarios"][name] = {
            "error": error,
            "steps": dict(shapes.most_common()),
            "findings": dict(device.findings),
            "waits": dict(
                Counter(
                    f"{entry.thread}: {entry}"
                    for entry in device.log[waits:]
                    if entry.kind == "wait"
                )
            ),
            "late": sorted(set(engine.met_late) - late),
            "late operations": sorted(set(engine.operations_met_late) - operations),
        }
    report["closed"] = closed(engine)
    report["seconds"] = [report["seconds"], round(time.monotonic() - started, 1)]
    report["compilations"] = engine.runner.num_compilations - engine.num_compilations
    return report


if __name__ == "__main__":
    sys.exit(main())
