"""The benchmark of a device: what it counts, what it prints, and that it outlives its rows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from device_bench import attention_rows
from device_bench.measure import Result, Seconds, all_rows, failures, measure
from device_bench.row import LLAMA_8B, TINY, Bench, Case, CheckError, Row, check_close, check_equal
from device_bench.table import (
    cells,
    markdown,
    peers_cell,
    replace_text,
    terminal_line,
    to_json,
)
from device_bench.timing import num_copies
from device_bench.worker import Options, Report, supervise
from streamserve_kernels import Kernels, naive
from streamserve_kernels.ceilings import Ceilings, measure_ceilings
from tests.interpreter import run_python

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy=2e12, read=3e12, product=800e12, product_fp8=1600e12)


def bench(kernels: object = naive) -> Bench:
    return Bench(kernels, naive, CPU, torch.float32, TINY, rotated_bytes=1)


def case(**changes: object) -> Case:
    return replace(Case(calls=[lambda: None], check=lambda: None, num_bytes=3e6), **changes)


def test_a_floor_is_the_slower_of_traffic_and_arithmetic():
    assert case().floor(CEILINGS) == (1e-6, "bytes")
    assert case(flops=1.6e9).floor(CEILINGS) == (2e-6, "FLOPs")
    assert case(flops=1.6e9, rate="float8").floor(CEILINGS) == (1e-6, "bytes")
    slow = replace(CEILINGS, product_fp8=None)
    assert case(flops=1.6e9, rate="float8").floor(slow) == (2e-6, "FLOPs")


def test_attention_counts_each_key_once_and_only_visible_pairs():
    decodes = attention_rows.Shape(((4096, 1),) * 64)
    assert (decodes.num_keys(), decodes.num_pairs()) == (64 * 4096, 64 * 4096)
    prompt = attention_rows.Shape(((4, 4),))
    assert (prompt.num_keys(), prompt.num_pairs()) == (4, 1 + 2 + 3 + 4)
    chunk = attention_rows.Shape(((10, 2),))
    assert (chunk.num_keys(), chunk.num_pairs()) == (10, 9 + 10)
    window = attention_rows.Shape(((10, 3), (2, 1)), window=4)
    assert (window.num_keys(), window.num_pairs()) == (6 + 2, 3 * 4 + 2)
    shared = attention_rows.Shape(((4224, 1),) * 64, shared=4096)
    assert shared.num_keys() == 4096 + 64 * 128


def test_the_products_are_those_of_llama_8b():
    assert LLAMA_8B.linears() == {
        "qkv": (6144, 4096),
        "out": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
        "head": (128256, 4096),
    }


def test_buffers_rotate_until_no_cache_holds_them():
    assert num_copies(10**9) == 1
    assert num_copies(50 * 10**6) == 3
    assert num_copies(1) == 64


def test_a_shared_prefix_is_in_every_table():
    shape = attention_rows.Shape(((200, 1),) * 3, block_size=16, shared=96)
    batch = attention_rows.make_batch(bench(), shape)
    assert batch.block_table.shape == (3, 13)
    assert (batch.block_table[:, :6] == batch.block_table[0, :6]).all()
    own = batch.block_table[:, 6:].flatten().tolist()
    assert len({*own, *batch.block_table[0, :6].tolist()}) == 3 * 7 + 6
    assert [x.tolist() for x in batch.prefix_groups] == [[0, 1, 2], [0, 3], [6]]


def test_small_outputs_are_not_within_tolerance_by_being_small():
    expected = torch.full((2, 8), 1e-3)
    check_close(expected * 1.01, expected, 2e-2)
    for wrong in (expected * 1.1, expected * float("nan"), expected[:1]):
        with pytest.raises(CheckError):
            check_close(wrong, expected, 2e-2)
    with pytest.raises(CheckError, match="1 of 3 elements"):
        check_equal(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]))


class Watched:
    """The naive kernels, and the names of those that were asked for."""

    def __init__(self, asked: set[str]) -> None:
        self._asked = asked

    def __getattr__(self, name: str) -> object:
        self._asked.add(name)
        return getattr(naive, name)


def test_every_row_is_built_checked_and_timed_and_every_kernel_has_one():
    asked: set[str] = set()
    for row in all_rows(quick=False):
        result = measure(row, bench(Watched(asked)), CEILINGS, Seconds(0.0, 0.0))
        assert result.status == "OK", result
        assert result.seconds > 0
        assert result.share == result.floor / result.seconds
    functions = {name for name in Kernels.__dict__ if not name.startswith("_")}
    # What is part of another one's row, sizes, and what multiplies nothing.
    functions -= {"rotary_embedding", "write_kv", "chosen_experts"}
    functions -= {"recorder", "warm_up", "compilations"}
    assert functions - asked == {"slow_quantisation"}


def test_a_quick_table_and_the_rest_are_all_rows():
    quick, rest, every = (
        [row.title for row in all_rows(*chosen)] for chosen in ((True,), (True, "", True), (False,))
    )
    assert sorted(quick + rest) == sorted(every)
    assert 0 < len(quick) < len(rest)


def test_a_report_that_is_being_written_takes_nothing_with_it(tmp_path, monkeypatch):
    file = tmp_path / "kernels.json"
    replace_text(file, "one row")

    def ended(self: Path, target: Path) -> None:
        assert self.read_text() == "two rows"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", ended)
        with pytest.raises(KeyboardInterrupt):
            replace_text(file, "two rows")
    assert file.read_text() == "one row"
    replace_text(file, "two rows")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["two rows"]


def test_a_row_that_fails_its_check_is_not_timed():
    def wrong() -> None:
        raise CheckError("off by 3%")

    def untouched() -> None:
        raise AssertionError("timed all the same")

    row = Row("group", "name", lambda _: case(check=wrong, calls=[untouched]))
    result = measure(row, bench(), CEILINGS, Seconds())
    assert (result.status, result.error, result.seconds) == ("FAIL", "off by 3%", None)


def test_a_row_that_raises_says_what_and_a_peer_that_raises_costs_only_itself():
    def broken(*_: object) -> None:
        raise RuntimeError("two\nlines")

    row = Row("group", "name", broken)
    result = measure(row, bench(), CEILINGS, Seconds())
    assert (result.status, result.error) == ("ERROR", "RuntimeError: two lines")
    peers = {"torch": lambda: [lambda: None], "other": broken}
    row = Row("group", "name", lambda _: case(peers=peers))
    result = measure(row, bench(), CEILINGS, Seconds(0.0, 0.0))
    assert result.status == "OK"
    assert result.peers["other"] == "RuntimeError: two lines"
    assert result.peers["torch"] > 0
    assert failures([result]) == 0


RESULT = Result(
    group="attention",
    name="decode 64 x 4k",
    status="OK",
    seconds=400e-6,
    method="graph",
    floor=360e-6,
    floor_of="bytes",
    num_bytes=1.08e9,
    flops=4.3e9,
    peers={"SDPA": 600e-6, "other": "RuntimeError: none"},
)
MACHINE = {"hardware": "NVIDIA H100", "torch": "2.11.0"}


def report(*results: Result) -> Report:
    ceilings = {"copy": 3e12, "read": 2.9e12, "product": 8e14, "product_fp8": None}
    return Report(MACHINE, ceilings, "triton", list(results))


def test_the_table_says_time_floor_share_and_peers():
    assert cells(RESULT)[1:] == ("OK", "400.0", "360.0", "bytes", "90%", "2700 GB/s")
    assert peers_cell(RESULT) == "SDPA 600.0 (1.50x), other: RuntimeError: none"
    eager = replace(RESULT, method="eager", floor_of="FLOPs")
    assert cells(eager)[2] == "400.0 eager"
    assert cells(eager)[-1] == "11 TF/s"
    failed = Result("attention", "prompt", "FAIL", error="off by 3%")
    assert terminal_line(failed).split() == ["prompt", "FAIL", "off", "by", "3%"]
    page = markdown(report(RESULT, failed))
    assert "NVIDIA H100" in page
    assert "copy 3.00 TB/s (read + written), read 2.90 TB/s" in page
    assert page.count("\n| decode 64 x 4k | OK | 400.0 |") == 1
    assert "| prompt | FAIL |" in page


def test_the_json_holds_every_number():
    encoded = json.loads(json.dumps(to_json(report(RESULT))))
    assert encoded["machine"] == MACHINE
    assert encoded["ceilings"]["copy"] == 3e12
    [row] = encoded["rows"]
    assert row["share"] == pytest.approx(0.9)
    assert row["peers"]["SDPA"] == 600e-6


def test_ceilings_of_this_machine_are_numbers():
    measured = measure_ceilings(CPU, scale=1e-3)
    assert min(measured.copy, measured.read, measured.product, measured.product_float32) > 0
    assert measured.product_fp8 is None


@pytest.mark.parametrize(
    ("float32", "best"),
    [(None, (4e10, "bfloat16")), (3e10, (4e10, "bfloat16")), (3e11, (3e11, "float32"))],
)
def test_products_have_the_faster_of_two_ceilings(float32, best):
    assert Ceilings(2e10, 2e10, product=4e10, product_float32=float32).best_product == best


WORKER = """
import json, os, signal, sys
first = json.loads(sys.argv[2])["first"]
pipe = os.fdopen(int(sys.argv[3]), "w", buffering=1)
def send(**message):
    print(json.dumps(message), file=pipe)
if first == 0:
    send(machine={"hardware": "none"}, ceilings={"copy": 1.0, "read": 1.0, "product": 1.0})
for index in range(first, 15):
    send(started=index)
    if index == 1:
        print("an illegal address", file=sys.stderr, flush=True)
        os.abort()
    if index == 2:
        signal.pause()
    send(result={"group": "attention", "name": str(index), "status": "OK"})
"""


def test_the_table_goes_on_behind_a_row_that_crashes_or_hangs(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    options = Options("cpu", only="attention")
    assert len(options.rows()) == 15
    expected = ["OK", "ERROR", "ERROR", *["OK"] * 12]
    for row_timeout_s in (1.0, 10.0, 60.0):  # a busy machine may not even have started the worker
        told = []
        result = supervise(
            options,
            row_timeout_s=row_timeout_s,
            limit_s=300.0,
            on_change=lambda report, told=told: told.append(len(report.results)),
            script=script,
        )
        statuses = [row.status for row in result.results]
        if statuses == expected:
            break
    assert statuses == expected
    assert "an illegal address" in result.results[1].error
    assert result.results[2].error == f"no end after {row_timeout_s:g} s"
    assert told == list(range(16))


def test_what_the_limit_leaves_no_time_for_is_named(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("import signal; signal.pause()")
    options = Options("cpu", only="attention")
    result = supervise(
        options, row_timeout_s=60.0, limit_s=0.1, on_change=lambda _: None, script=script
    )
    assert [row.status for row in result.results] == ["SKIPPED"] * 15


def test_workers_that_do_not_start_end_the_table(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("raise SystemExit('no driver')")
    options = Options("cpu", only="attention")
    result = supervise(
        options, row_timeout_s=60.0, limit_s=60.0, on_change=lambda _: None, script=script
    )
    first, *others = result.results
    assert (first.status, first.error) == ("ERROR", "the process ended with 1: no driver")
    assert [row.status for row in others] == ["SKIPPED"] * 14


def test_the_command_writes_both_files(tmp_path):
    page, data = tmp_path / "table.md", tmp_path / "table.json"
    command = ["kernels/bench/run.py", "--device", "cpu", "--tiny", "--backend", "naive"]
    command += ["--only", "elementwise: rms_norm 64", "--markdown", str(page), "--json", str(data)]
    assert "1 rows, 0 failed" in run_python(*command, PYTHONPATH="").stdout
    [row] = json.loads(data.read_text())["rows"]
    assert (row["status"], row["method"]) == ("OK", "host")
    assert "rms_norm + residual" in page.read_text()
