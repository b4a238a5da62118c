"""Worker processes: what they answer, and that none of them holds anybody up or is left behind."""

import asyncio
import os
import pickle
import signal
import socket
from contextlib import contextmanager

import pytest

from streamserve.engine import worker_pool
from streamserve.engine.child import start_child
from streamserve.engine.worker_main import ANSWER_HEAD, DONE, REQUEST_HEAD, _answer_all
from streamserve.engine.worker_pool import WorkerPool, WorkerTimeoutError
from streamserve.errors import EngineError, InvalidParameterError
from tests.engine.worker_handlers import Answer, Fails

LONG = 60.0


@contextmanager
def workers(factory=Answer, **options):
    pool = WorkerPool(factory, **options)
    try:
        yield pool
    finally:
        pool.close()


async def gone(pid):
    async with asyncio.timeout(LONG):
        while os.path.exists(f"/proc/{pid}"):
            await asyncio.sleep(0)


@pytest.mark.parametrize("size", [0, 10, 3_000_000])
async def test_answers_come_back_whole(size):
    with workers() as pool:
        pool.start()
        await asyncio.sleep(0)  # it starts the process that the call waits for
        assert await pool.call(b"a" * size, timeout_s=LONG) == b"A" * size
        [pid] = pool.pids
        assert await pool.call(b"b", timeout_s=LONG) == b"B"
        assert pool.pids == [pid]
        assert os.getsid(pid) == pid, "a Ctrl-C is the server's"
        assert os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, 0)


async def test_more_at_once_than_there_are_workers():
    payloads = [chr(97 + i).encode() * 1000 for i in range(12)]
    with workers(max_workers=2) as pool:
        answers = await asyncio.gather(*(pool.call(p, timeout_s=LONG) for p in payloads))
        assert answers == [p.upper() for p in payloads]
        assert len(pool.pids) == 2


async def test_who_asks_for_much_holds_up_nobody_else():
    done = []

    async def work(pool, owner, i):
        await pool.call(b"a", timeout_s=LONG, owner=owner)
        done.append(f"{owner}{i}")

    with workers(max_workers=1) as pool:
        await pool.call(b"a", timeout_s=LONG)
        async with asyncio.TaskGroup() as group:
            for i in range(4):
                group.create_task(work(pool, "alice", i))
            given_up = group.create_task(work(pool, "carol", 0))
            for i in range(2):
                group.create_task(work(pool, "bob", i))
            await asyncio.sleep(0)
            given_up.cancel()
    assert done == ["alice0", "alice1", "bob0", "alice2", "bob1", "alice3"]


async def test_one_after_the_other_need_one_worker():
    with workers(max_workers=2) as pool:
        for _ in range(3):
            await pool.call(b"a", timeout_s=LONG)
        assert len(pool.pids) == 1


async def test_errors_of_ours_come_through_and_others_are_not_told():
    with workers() as pool:
        with pytest.raises(InvalidParameterError, match="not like this") as caught:
            await pool.call(b"!", timeout_s=LONG)
        assert (caught.value.param, caught.value.code) == ("prompt", "bad")
        with pytest.raises(EngineError, match="ValueError") as failed:
            await pool.call(b"?", timeout_s=LONG)
        assert "secret" not in str(failed.value)
        with pytest.raises(EngineError, match="it cannot be done"):
            await pool.call(b"#", timeout_s=LONG)
        assert await pool.call(b"a", timeout_s=LONG) == b"A"


async def test_a_worker_that_runs_away_is_replaced():
    with workers(max_workers=1) as pool:
        await pool.call(b"a", timeout_s=LONG)
        [pid] = pool.pids
        late = pool.call(b"~", timeout_s=0.01)
        then = pool.call(b"b", timeout_s=LONG)
        results = await asyncio.gather(late, then, return_exceptions=True)
        assert isinstance(results[0], WorkerTimeoutError)
        assert results[1] == b"B"
        assert pool.pids != [pid]
        await gone(pid)


async def test_a_worker_that_dies_is_replaced():
    with workers(max_workers=1) as pool:
        with pytest.raises(EngineError, match="has died"):
            await pool.call(b"x", timeout_s=LONG)
        assert await pool.call(b"a", timeout_s=LONG) == b"A"
        [pid] = pool.pids
        os.kill(pid, signal.SIGKILL)  # while it is idle: no work is lost
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert await pool.call(b"b", timeout_s=LONG) == b"B"


async def test_a_worker_that_cannot_start_fails_its_work_only():
    with workers(Fails) as pool:
        pool.start()
        for _ in range(2):
            with pytest.raises(EngineError, match="has died"):
                await pool.call(b"a", timeout_s=LONG)


async def test_a_worker_that_starts_too_late_answers_nobody(monkeypatch):
    with workers() as pool:
        monkeypatch.setattr(worker_pool, "_START_TIMEOUT_S", 0.0)
        pool.start()
        await asyncio.wait([pool._warming])
        monkeypatch.setattr(worker_pool, "_START_TIMEOUT_S", LONG)
        assert await pool.call(b"a", timeout_s=LONG) == b"A"


async def test_work_that_nobody_waits_for_ends_its_worker():
    with workers(max_workers=1) as pool:
        await pool.call(b"a", timeout_s=LONG)
        [pid] = pool.pids
        task = asyncio.create_task(pool.call(b"~", timeout_s=LONG))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await gone(pid)
        assert await pool.call(b"b", timeout_s=LONG) == b"B"


async def test_the_system_ends_work_that_the_server_has_forgotten():
    process, ours = start_child("streamserve.engine.worker_main")
    with ours:
        for payload in (pickle.dumps((0, Answer)), b"~"):
            ours.sendall(REQUEST_HEAD.pack(len(payload), 0.0) + payload)
        assert await asyncio.to_thread(process.wait, LONG) == -signal.SIGALRM


def test_the_time_for_work_ends_with_it_and_half_a_request_is_none(monkeypatch):
    alarms, ours_and_theirs = [], socket.socketpair()
    monkeypatch.setattr(signal, "alarm", alarms.append)
    with ours_and_theirs[0] as ours, ours_and_theirs[1] as theirs, theirs.makefile("rb") as asked:
        ours.sendall(REQUEST_HEAD.pack(1, 2.5) + b"a" + REQUEST_HEAD.pack(9, 2.5) + b"half")
        ours.shutdown(socket.SHUT_WR)
        _answer_all(Answer(), theirs, asked)
        theirs.shutdown(socket.SHUT_WR)
        warm, whole = ANSWER_HEAD.pack(0, DONE), ANSWER_HEAD.pack(1, DONE)
        assert ours.recv(100) == warm + whole + b"A"
    assert alarms == [4, 0]


async def test_closing_leaves_no_process_and_no_waiter():
    with workers(max_workers=1) as pool:
        await pool.call(b"a", timeout_s=LONG)
        [pid] = pool.pids
        tasks = [asyncio.create_task(pool.call(b"~", timeout_s=LONG)) for _ in range(2)]
        await asyncio.sleep(0)
        pool.close()
        pool.close()
        for task in tasks:
            with pytest.raises(EngineError):
                await task
        await gone(pid)
        assert pool.pids == []


async def test_closing_while_the_first_worker_starts():
    with workers() as pool:
        pool.start()
        await asyncio.sleep(0)
        [worker, _] = pool._workers
        pool.close()
        assert worker._streams is not None or worker._socket.fileno() < 0
