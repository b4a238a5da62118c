"""The one command that measures a GPU: a step that fails, hangs or leaves something behind."""

import json
import sys
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path

import psutil
import pytest

import gpu
from tests.interpreter import run_python

# As pyproject.toml has it, which is not read for tests elsewhere: these plugins take a second each.
TEST_FLAGS = ("-m", "not soak", "-p", "no:langsmith_plugin", "-p", "no:schemathesis")


@pytest.fixture
def plan(tmp_path: Path) -> gpu.Plan:
    return gpu.Plan(
        output=tmp_path,
        work=tmp_path,
        shape="tiny",
        device=None,
        engine_flags=(),
        kernel_flags=(),
        test_flags=(),
        streams=(2,),
        input_len=16,
        output_len=4,
        batch_sizes=(1,),
    )


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def test_a_failing_step_does_not_keep_the_next_from_running(plan, monkeypatch, capsys):
    steps = {
        "tests": lambda step: step.run(python("print('two failed'); raise SystemExit(3)")),
        "latency": lambda step: pytest.fail("is not asked for"),
        "kernels": lambda step: step.run(python("print('all rows')")),
    }
    monkeypatch.setattr(gpu, "STEPS", steps)
    assert gpu.run_all(plan, ["kernels", "tests"]) == 1
    summary = (plan.output / "summary.txt").read_text()
    assert "tests: FAILED: ended with 3" in summary
    assert "    two failed" in summary
    assert summary.index("kernels: done") > summary.index("two failed")
    assert "kernels| all rows" in (plan.output / "log.txt").read_text()
    assert summary in capsys.readouterr().out


def test_a_step_that_hangs_is_ended_with_all_that_it_started(plan, tmp_path):
    pids = tmp_path / "pids"
    code = f"""
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
signal.pause()
"""
    for limit in (1.0, 10.0, 60.0):  # a busy machine may not even have started it
        limits = plan.limits | {"tests": limit}
        step = gpu.Step(replace(plan, limits=limits, grace_s=0.2), "tests")
        with pytest.raises(gpu.StepError, match="did not end in time"):
            step.run(python(code))
        if pids.exists():
            break
    deadline = time.monotonic() + 60  # a killed process takes its time to die
    while running := [pid for pid in map(int, pids.read_text().split()) if is_running(pid)]:
        assert time.monotonic() < deadline, f"{running} still run"
        time.sleep(0.01)


def test_no_step_is_begun_when_the_time_is_up(plan, monkeypatch):
    steps = {"tests": lambda step: step.run(python("pass")), "kernels": lambda step: None}
    monkeypatch.setattr(gpu, "STEPS", steps)
    assert gpu.run_all(plan, list(steps), seconds=0.0) == 2
    assert "kernels: FAILED: there was no time left" in (plan.output / "summary.txt").read_text()


def test_the_parts_fit_their_commands_and_the_machine():
    assert sorted([*chain(*gpu.PARTS.values()), "lookup", "heads"]) == sorted(gpu.STEPS)
    assert gpu._LIMITS.keys() == gpu._SUMMARY_LINES.keys() == gpu.STEPS.keys()
    limits = [sum(gpu._LIMITS[name] for name in names) for names in gpu.PARTS.values()]
    default = gpu.parser().parse_args(["out"]).seconds
    assert max(limits) <= default <= 600 - 2 * gpu._GRACE_S
    assert sum(limits[:2]) <= 15 * 60 - 2 * 90  # two starts of a machine


def test_a_failing_test_is_told_at_once(plan, tmp_path, monkeypatch, capsys):
    """With its traceback, before the run has ended; and what is asked for first comes first."""
    (tmp_path / "test_one.py").write_text("def test_well(): pass")
    failing = tmp_path / "test_two.py"
    failing.write_text("""
import os, signal
def test_wrong():
    assert [1] == [2]
def test_that_ends_everything():
    os.killpg(0, signal.SIGKILL)
""")
    monkeypatch.setattr(gpu, "gpu_test_files", lambda: [str(tmp_path)])
    monkeypatch.setattr(gpu, "FIRST_TESTS", (failing.name,))
    monkeypatch.setattr(gpu, "kernels_command", lambda flags, seconds: python("pass"))
    flags = ("-n", "0", *TEST_FLAGS)
    with pytest.raises(gpu.StepError, match="ended with -9"):
        gpu.run_tests(gpu.Step(replace(plan, test_flags=flags), "tests", 120.0))
    [line] = (plan.output / "tests.jsonl").read_text().splitlines()
    assert json.loads(line)["outcome"] == "failed"
    assert "assert [1] == [2]" in (plan.output / "log.txt").read_text()
    assert "assert [1] == [2]" in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_file_that_cannot_be_collected_is_named_and_the_others_run(
    plan, tmp_path, monkeypatch, workers
):
    (tmp_path / "test_one.py").write_text("def test_well(): pass")
    (tmp_path / "test_two.py").write_text("import a_package_that_is_missing")
    monkeypatch.setattr(gpu, "gpu_test_files", lambda: [str(tmp_path)])
    monkeypatch.setattr(gpu, "kernels_command", lambda flags, seconds: python("pass"))
    flags = ("-n", workers, *TEST_FLAGS)
    with pytest.raises(gpu.StepError, match=r"ended with 1; not collected: \S*test_two\.py$"):
        gpu.run_tests(gpu.Step(replace(plan, test_flags=flags), "tests", 120.0))
    told = map(json.loads, (plan.output / "tests.jsonl").read_text().splitlines())
    found = {test["test"].rpartition("/")[2]: test["outcome"] for test in told}
    assert found == {"test_two.py": "not collected", "test_one.py::test_well": "passed"}
    assert "No module named 'a_package_that_is_missing'" in (plan.output / "log.txt").read_text()


def test_no_file_with_tests_of_the_gpu_is_left_out(request):
    """Of what is collected here: where all files are, this is all of them."""
    files = gpu.gpu_test_files()
    with_tests = {
        str(item.path.relative_to(gpu.ROOT))
        for item in request.session.items
        if item.get_closest_marker("gpu") is not None
    }
    assert with_tests <= set(files)
    assert "tests/models/test_staging.py" in files  # its tests are marked
    assert "tests/kernels/test_triton_elementwise.py" in files  # its fixtures are
    for first in gpu.FIRST_TESTS:
        assert any(file.startswith(first) for file in files)


def test_a_server_that_dies_while_starting_is_not_waited_for(plan):
    step = gpu.Step(plan, "serve")
    with step.started(python("raise SystemExit(7)")) as server:
        server.wait()
        with pytest.raises(gpu.StepError, match="ended with 7 before it was ready"):
            gpu.wait_until_ready(server, "http://127.0.0.1:9/health", 60.0)


def test_the_whole_command_on_a_cpu(tmp_path):
    """Every step but the tests themselves, on a model small enough."""
    engine = "--kv-cache-memory 8MiB --dtype float32 --max-num-seqs 4 --max-num-batched-tokens 64"
    kernels = "--quick --device cpu --tiny --backend naive --only layer_norm"
    command = ["kernels/bench/gpu.py", str(tmp_path)]
    command += ["--steps", "serve", "kernels", "rest", "latency", "throughput", "--shape", "tiny"]
    command += ["--engine-flags", engine, "--kernel-flags", kernels, "--batch-size", "2"]
    command += ["--streams", "3", "--input-len", "40", "--output-len", "8"]
    result = run_python(*command, PYTHONPATH="")
    for name in ("kernels", "rest", "latency", "throughput", "serve"):
        assert f"{name}: done" in result.stdout
    assert len(list(tmp_path.iterdir())) <= 8  # few enough to be brought back
    rows = {
        name: [row["name"] for row in json.loads((tmp_path / f"{name}.json").read_text())["rows"]]
        for name in ("kernels", "rest")
    }
    assert rows["kernels"] == ["layer_norm + residual, 64 rows"]
    assert rows["rest"] == ["layer_norm + residual, 2048 rows"]
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    measured = {name: value for line in lines for name, value in json.loads(line).items()}
    assert list(measured) == ["latency", "serve-3", "throughput"]
    assert len(measured["latency"]["results"]) == 1
    [load] = measured["serve-3"]["summaries"]
    assert (load["requests"], load["errors"]) == (6, 0)
