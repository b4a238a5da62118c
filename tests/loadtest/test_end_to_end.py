"""A tiny load against the real front and engine over a ``NullRunner``."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from streamserve_loadtest.cli import main
from streamserve_loadtest.client import Target
from streamserve_loadtest.drive import Driver, warm_up
from streamserve_loadtest.stats import summarize
from streamserve_loadtest.workloads import ClosedLoop, Group, Kind, OpenLoop, Turn, Workload
from tests.api.harness import MODEL, Api, server_thread
from tests.loadtest.canned import byte_prompts


def workload(*groups: Group) -> Workload:
    return Workload("tiny", "a tiny load", groups)


def closed(*turns: Turn, clients: int = 2, conversations: int = 2, prefix: int = 0) -> Group:
    return Group("g", (Kind("k", turns, prefix),), ClosedLoop(clients, conversations))


async def play(load: Workload, **api):
    parts = Api(**api)
    async with parts.serving() as (host, port):
        target = Target(f"http://{host}:{port}", MODEL)
        return await Driver(target, load, byte_prompts()).run("null")


async def test_a_closed_loop_with_a_shared_prefix():
    run = await play(workload(closed(Turn(40, 6), prefix=60)))
    assert [r.error for r in run.records] == [None] * 4
    assert [r.prompt_tokens for r in run.records] == [100] * 4
    assert [r.num_tokens for r in run.records] == [6] * 4
    assert sum(r.cached_tokens or 0 for r in run.records) >= 2 * 60
    assert all(r.finish_reason == "length" for r in run.records)
    assert summarize(run)["tokens"] == 24


async def test_a_second_turn_finds_the_first_in_the_cache():
    run = await play(workload(closed(Turn(50, 8), Turn(30, 4), clients=1, conversations=1)))
    first, second = run.records
    assert (first.turn, second.turn) == (0, 1)
    assert second.prompt_tokens > first.prompt_tokens + 8
    assert second.cached_tokens >= first.prompt_tokens
    assert second.due_at >= first.ended_at


async def test_an_open_loop_with_readers_who_leave():
    mix = Kind("k", (Turn(40, 20),))
    load = OpenLoop("burst", 1000.0, 0.008, burst_size=8)
    group = Group("g", (mix,), load, cancel_share=1.0, cancel_after=3)
    run = await play(workload(group))
    assert len(run.records) == 8
    assert all(r.is_cancelled and r.error is None for r in run.records)
    assert all(len(r.chunk_times) == 3 for r in run.records)


async def test_a_background_group_ends_with_the_others():
    steady = Group(
        "steady", (Kind("k", (Turn(40, 100),)),), ClosedLoop(2, 10_000), is_background=True
    )
    run = await play(workload(steady, closed(Turn(40, 50), clients=1, conversations=1)))
    by_group = {name: [r for r in run.records if r.group == name] for name in ("steady", "g")}
    assert [r.num_tokens for r in by_group["g"]] == [50]
    assert sum(r.is_cancelled for r in by_group["steady"]) <= 2
    assert all(r.error is None for r in by_group["steady"])
    assert all(r.ended_at for r in run.records)


async def test_a_refusal_is_an_error_with_the_servers_words():
    run = await play(workload(closed(Turn(600, 8), clients=1, conversations=1)))
    [refused] = run.records
    assert refused.error is not None
    assert refused.error.startswith("HTTP 400")
    assert "512" in refused.error


async def test_nobody_there_is_an_error_of_each_request():
    target = Target("http://127.0.0.1:9", MODEL)
    run = await Driver(target, workload(closed(Turn(40, 4))), byte_prompts()).run()
    assert all(r.error.startswith("no connection") for r in run.records)


async def test_a_stream_that_breaks_off_is_an_error():
    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": []}\n\n')
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        target = Target(f"http://127.0.0.1:{port}", MODEL)
        record = await warm_up(target, workload(closed(Turn(40, 4))), byte_prompts())
    assert record.error == "the stream ended without finish_reason and [DONE]"


def test_the_command_line_writes_its_reports(tmp_path, capsys):
    flags = ["custom", "--prompt-tokens", "8", "--output-tokens", "4", "--clients", "2"]
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    with server_thread() as url:
        code = main([*flags, "--conversations", "2", "--rounds", "2", "--url", url, *files])
    printed = capsys.readouterr().out
    assert code == 0
    assert "custom: as the flags say (2 rounds" in printed
    assert "0/8" in printed
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "r.json").stat().st_size > 1000


def test_a_report_that_cannot_be_written_is_refused_before_the_load(tmp_path, capsys):
    path = tmp_path / "missing" / "report.json"
    with pytest.raises(SystemExit):
        main(["W1", "--json", str(path)])
    assert f"cannot write {path}: No such file or directory" in capsys.readouterr().err


def test_each_request_has_the_fields_that_were_asked_for(capsys):
    with server_thread() as url:
        assert main(["custom", "--url", url, "--extra-body", '{"top_p": 1.5}']) == 1
    assert "top_p" in capsys.readouterr().err


@pytest.mark.parametrize("fields", ["{", "[1]"])
def test_fields_that_are_no_json_object_are_refused(fields, capsys):
    with pytest.raises(SystemExit):
        main(["W1", "--extra-body", fields])
    assert "--extra-body: not " in capsys.readouterr().err


def test_an_unknown_workload_is_refused_by_name():
    with pytest.raises(SystemExit, match="no workload 'W9'"):
        main(["W9"])


@pytest.mark.parametrize(
    ("tool", "module"), [("serve", "loadtest"), ("compare", "loadtest.compare")]
)
def test_a_checkout_and_an_installation_have_the_same_program(tool, module):
    root = Path(__file__).parents[2]
    path = os.pathsep.join(str(root / folder) for folder in (".", "kernels", "loadtest"))

    def usage(*command: str, pythonpath: str) -> str:
        environment = {**os.environ, "PYTHONPATH": pythonpath, "COLUMNS": "200"}
        result = subprocess.run(
            [sys.executable, "-m", *command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            cwd=root,
            env=environment,
        )
        return result.stdout

    installed = usage("streamserve", "bench", tool, pythonpath=path)
    assert installed.startswith(f"usage: streamserve bench {tool}")
    here = usage(module, pythonpath=str(root / "kernels"))
    prefix = f"usage: python -m {module}"
    assert here.startswith(prefix)
    assert here.split("options:")[1] == installed.split("options:")[1]
